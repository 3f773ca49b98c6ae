"""What the package writes to the logger ``beanie_session_scope``.

Every record carries the name of its event and the figures that belong to it as attributes
(``extra``), for handlers that write structured logs. No record shows a connection string,
the message of a driver error or the contents of a document: such a message can quote one.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("beanie_session_scope")


def log(level: int, event: str, message: str, *args: object, **fields: Any) -> None:
    """Write a record.

    Args:
        level: One of the levels of ``logging``.
        event: The name of what happened, such as ``"commit"``.
        message: For readers, with the placeholders of ``logging`` for ``args``.
        args: What to put in.
        fields: Durations (in seconds), counts and the like; become attributes of the record.
    """
    if logger.isEnabledFor(level):
        logger.log(level, message, *args, extra={"event": event, **fields}, stacklevel=2)


def nameof(error: BaseException | None) -> str:
    """Name an error for the log: its class and, of a server error, its code."""
    code = getattr(error, "code", None)
    return type(error).__name__ + (f" (code {code})" if isinstance(code, int) else "")
