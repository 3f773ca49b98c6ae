"""The answers of the middleware itself, where a response can't be true any more.

They are problem details in JSON (RFC 9457), and say nothing of what went wrong inside. Their
``type`` is ``about:blank``, so the ``title`` is that of the status. The extension member
``outcome`` tells programs what the ``detail`` tells people.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

from ._types import BODY, START, Message

RETRY_AFTER = 1
"""When to repeat a request that failed on something transient, in seconds."""


@dataclass(frozen=True)
class Problem:
    """An answer.

    Attributes:
        status: Of HTTP.
        outcome: Whether the client may assume that nothing was stored.
        detail: For people.
    """

    status: HTTPStatus
    outcome: Literal["aborted", "unknown"]
    detail: str

    def messages(self, *, head: bool) -> list[Message]:
        """Return the whole response, as ASGI messages.

        Args:
            head: Whether the method was ``HEAD``, which is answered without the body.
        """
        status = self.status
        fields = {"type": "about:blank", "title": status.phrase, "status": status.value}
        content = {**fields, "detail": self.detail, "outcome": self.outcome}
        body = json.dumps(content).encode()
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", str(len(body)).encode()),
        ]
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append((b"retry-after", str(RETRY_AFTER).encode()))
        return [
            {"type": START, "status": status.value, "headers": headers},
            {"type": BODY, "body": b"" if head else body},
        ]


ABORTED = Problem(
    HTTPStatus.INTERNAL_SERVER_ERROR,
    "aborted",
    "The changes of this request could not be stored.",
)
TRANSIENT = Problem(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "aborted",
    "The changes of this request could not be stored at the moment. Repeat the request.",
)
UNKNOWN = Problem(
    HTTPStatus.INTERNAL_SERVER_ERROR,
    "unknown",
    "It is not known whether the changes of this request were stored. Check that before "
    "repeating the request.",
)
