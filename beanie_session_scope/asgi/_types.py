"""The types of the ASGI specification, as far as the middleware needs them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeAlias

HTTPScope: TypeAlias = "MutableMapping[str, Any]"
Message: TypeAlias = "MutableMapping[str, Any]"
Receive: TypeAlias = "Callable[[], Awaitable[Message]]"
Send: TypeAlias = "Callable[[Message], Awaitable[None]]"
ASGIApp: TypeAlias = "Callable[[HTTPScope, Receive, Send], Awaitable[None]]"
ShouldCommit: TypeAlias = "Callable[[int, Mapping[str, Any]], bool]"

START = "http.response.start"
BODY = "http.response.body"
DISCONNECT = "http.disconnect"
