"""What went over the wire, as the driver's command listener saw it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from pymongo import MongoClient
from pymongo.monitoring import (
    CommandFailedEvent,
    CommandListener,
    CommandStartedEvent,
    CommandSucceededEvent,
)

DATABASE = "beanie_session_scope_tests"
APP_NAME = "beanie_session_scope_tests"

FailPoint = Callable[..., AbstractContextManager[None]]
ENDS = ("commitTransaction", "abortTransaction")


class Wire(CommandListener):
    """Records every command that a client starts."""

    def __init__(self) -> None:
        self._events: list[CommandStartedEvent] = []
        self.on_start: Callable[[], object] = lambda: None

    def started(self, event: CommandStartedEvent) -> None:
        self._events.append(event)
        self.on_start()

    def succeeded(self, event: CommandSucceededEvent) -> None:
        """Not of interest."""

    def failed(self, event: CommandFailedEvent) -> None:
        """Not of interest."""

    @property
    def last(self) -> str:
        """Return the name of the command that started last."""
        return self._events[-1].command_name

    def sessions(self) -> list[Any]:
        """Return the ids of all sessions that ran a transaction."""
        ids = {
            bytes(event.command["lsid"]["id"]): event.command["lsid"]
            for event in self._events
            if "txnNumber" in event.command
        }
        return list(ids.values())

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


def open_transactions(uri: str) -> int:
    """Return how many transactions of the tests' own client are open on the server."""
    pipeline: list[dict[str, Any]] = [
        {"$currentOp": {"idleSessions": True, "localOps": True}},
        {"$match": {"transaction": {"$exists": True}, "appName": APP_NAME}},
    ]
    with MongoClient[Any](uri) as admin:
        return len(list(admin.admin.aggregate(pipeline)))


def fail_point_of(uri: str) -> FailPoint:
    """Return what turns the ``failCommand`` fail point on for the tests' own client.

    It works on any server that runs with ``enableTestCommands=1``, the one of
    ``MONGODB_URI`` included.
    """

    @contextmanager
    def fail_point(
        *commands: str,
        times: int | None = None,
        block_ms: int | None = None,
        error_code: int | None = None,
        labels: list[str] | None = None,
        close_connection: bool = False,
        write_concern_error: int | None = None,
    ) -> Iterator[None]:
        refused = {"code": write_concern_error, "errmsg": "from the fail point"}
        data: Mapping[str, Any] = {
            "failCommands": list(commands),
            "appName": APP_NAME,
            **({"blockConnection": True, "blockTimeMS": block_ms} if block_ms else {}),
            **({"errorCode": error_code} if error_code else {}),
            **({"errorLabels": labels} if labels is not None else {}),
            **({"closeConnection": True} if close_connection else {}),
            **({"writeConcernError": refused} if write_concern_error else {}),
        }
        with MongoClient[Any](uri) as admin:
            mode = {"times": times} if times else "alwaysOn"
            admin.admin.command("configureFailPoint", "failCommand", mode=mode, data=data)
            try:
                yield
            finally:
                admin.admin.command("configureFailPoint", "failCommand", mode="off")

    return fail_point
