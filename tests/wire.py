"""What went over the wire, as the driver's command listener saw it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pymongo.monitoring import (
    CommandFailedEvent,
    CommandListener,
    CommandStartedEvent,
    CommandSucceededEvent,
)

DATABASE = "beanie_session_scope_tests"
ENDS = ("commitTransaction", "abortTransaction")


class Wire(CommandListener):
    """Records every command that a client starts."""

    def __init__(self) -> None:
        self._events: list[CommandStartedEvent] = []

    def started(self, event: CommandStartedEvent) -> None:
        self._events.append(event)

    def succeeded(self, event: CommandSucceededEvent) -> None:
        """Not of interest."""

    def failed(self, event: CommandFailedEvent) -> None:
        """Not of interest."""

    @contextmanager
    def record(self) -> Iterator[list[CommandStartedEvent]]:
        """Collect the commands that start inside the block."""
        seen: list[CommandStartedEvent] = []
        first = len(self._events)
        try:
            yield seen
        finally:
            seen.extend(self._events[first:])


def names(events: list[CommandStartedEvent]) -> list[str]:
    """Return the commands' names, in order."""
    return [event.command_name for event in events]


def lsid(event: CommandStartedEvent) -> Any:
    """Return the id of the session that a command carries, or ``None``."""
    return event.command.get("lsid")


def outside(events: list[CommandStartedEvent], session: Any) -> list[str]:
    """Return the commands that do not belong to the session's transaction.

    Ask while the session is open: an ended one does not tell its id.
    """
    return [
        event.command_name
        for event in events
        if lsid(event) != session.session_id
        or "txnNumber" not in event.command
        or event.command.get("autocommit") is not False
    ]
