"""A client that speaks ASGI by hand, so that a test sees every message, and when it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

START = "http.response.start"
BODY = "http.response.body"


async def nothing(message: Message) -> None:
    """What a client does with a message, where a test asks for nothing else."""


class Connection:
    """One request, up to its response.

    Args:
        app: The application.
        on_send: Called with each message, before it counts as sent.
        scope: What to change in the scope.
    """

    def __init__(
        self,
        app: App,
        on_send: Callable[[Message], Awaitable[object]] = nothing,
        body: bytes = b"",
        **scope: Any,
    ) -> None:
        self._app = app
        self._on_send = on_send
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/",
            "raw_path": b"/",
            "root_path": "",
            "query_string": b"",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            **scope,
        }
        self.coming: asyncio.Queue[Message | Exception] = asyncio.Queue()
        self.coming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self.received = 0
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        message = await self.coming.get()
        self.received += 1
        if isinstance(message, Exception):
            raise message
        return message

    async def send(self, message: Message) -> None:
        await self._on_send(message)
        self.sent.append(message)
        if message["type"] == BODY and not message.get("more_body"):
            self.disconnect()  # as servers report the end of a response, too

    def disconnect(self) -> None:
        """Close the connection, as the server reports it."""
        self.coming.put_nowait({"type": "http.disconnect"})

    async def run(self) -> Connection:
        """Let the application answer."""
        await self._app(self.scope, self.receive, self.send)
        return self

    @property
    def status(self) -> int:
        """The status of the response; 0 where there was none."""
        return next((each["status"] for each in self.sent if each["type"] == START), 0)

    @property
    def headers(self) -> dict[str, str]:
        (start,) = (each for each in self.sent if each["type"] == START)
        return {name.decode(): value.decode() for name, value in start["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(each["body"] for each in self.sent if each["type"] == BODY)

    @property
    def problem(self) -> dict[str, Any]:
        """The problem details of an answer that the middleware made."""
        assert self.headers["content-type"] == "application/problem+json"
        found: dict[str, Any] = json.loads(self.body)
        return found


def start(status: int = 200) -> Message:
    return {"type": START, "status": status, "headers": [(b"x-app", b"yes")]}


def body(content: bytes = b"done", *, more: bool = False) -> Message:
    return {"type": BODY, "body": content, "more_body": more}


async def respond(send: Send, status: int = 200, content: bytes = b"done") -> None:
    await send(start(status))
    await send(body(content))
