"""What MongoDB's specifications ask for when a command of a transaction fails.

The rules are those of the *transactions*, *convenient API for transactions* and *retryable
writes* specifications, and of the server for its error labels. They ask neither the package
nor a driver: ``tell`` plays a transaction by them, and says what must then be on the wire.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import count
from typing import Any

from labels import TRANSIENT, UNKNOWN
from pymongo import MongoClient
from pymongo.errors import (
    AutoReconnect,
    NetworkTimeout,
    NotPrimaryError,
    OperationFailure,
    PyMongoError,
)
from wire import APP_NAME, DATABASE

COMMIT, ABORT = "commitTransaction", "abortTransaction"

SOCKET_TIMEOUT_MS = 200
BLOCK_MS = 350  # well past the timeout, so that the answer can't be in time

LIMIT = 3
"""The time of a cell is the number of its commands that failed, and is up at this one."""


@dataclass(frozen=True)
class Fault:
    """One way for a command to fail.

    Attributes:
        error: What the driver raises, exactly.
        settings: What the fail point does; nothing runs on the server, unless it is only slow.
        code: The server's error code, where the server answers at all.
    """

    name: str
    error: type[PyMongoError]
    settings: Mapping[str, Any]
    code: int | None = None

    @property
    def retryable(self) -> bool:
        """Whether the driver sends a commit or abort again (*retryable writes*)."""
        return self.code in (None, 10107, 189, 11602)

    @property
    def slow(self) -> bool:
        """Whether the server runs the command, when nobody waits for the answer any more."""
        return "blockTimeMS" in self.settings

    def labels(self, command: str) -> set[str]:
        """Return the labels of the error: the server's, and those that the driver adds."""
        if command == COMMIT and self.retryable:
            return {UNKNOWN}
        # An operation's lost answer is labelled by the driver, the others by the server.
        return {TRANSIENT} if self.retryable or self.code in (112, 251) else set()


def _answer(name: str, code: int, error: type[PyMongoError] = OperationFailure) -> Fault:
    return Fault(name, error, {"errorCode": code}, code)


FAULTS = [
    _answer("WriteConflict", 112),
    _answer("NoSuchTransaction", 251),
    _answer("NotWritablePrimary", 10107, NotPrimaryError),
    _answer("PrimarySteppedDown", 189, NotPrimaryError),
    _answer("Interrupted", 11601),
    _answer("InterruptedDueToReplStateChange", 11602, NotPrimaryError),
    Fault("closed-connection", AutoReconnect, {"closeConnection": True}),
    Fault("slow-answer", NetworkTimeout, {"blockConnection": True, "blockTimeMS": BLOCK_MS}),
]


@dataclass(frozen=True)
class Case:
    """One cell of the matrix.

    Attributes:
        target: The command that fails.
        commands: What the body sends.
        times: How often it fails; ``None`` for always.
        retrying: Whether the body may be run again.
    """

    target: str
    commands: tuple[str, ...]
    fault: Fault
    times: int | None
    retrying: bool


class Outcome(Enum):
    """How a transaction ends, as its caller sees it."""

    COMMITTED = auto()
    RAISED = auto()
    TIMED_OUT = auto()
    UNKNOWN = auto()


@dataclass
class Story:
    """What happens in a case.

    Attributes:
        commands: What is on the wire: of each command, its attempt, from 0, and its name.
        hits: How many commands have failed.
        outcome: How it ends.
        left_open: Whether the server is left with the transaction of the last attempt. That is
            an artefact: the fail point answers in the place of a commit or abort, where a real
            server ends the transaction, or ends it when it is no longer primary.
        killed: Whether the package has to kill the session: no abort has reached the server.
    """

    case: Case
    commands: list[tuple[int, str]] = field(default_factory=list)
    hits: int = 0
    outcome: Outcome = Outcome.COMMITTED
    left_open: bool = False
    killed: bool = False

    @property
    def time_is_up(self) -> bool:
        """Whether nothing is tried again any more."""
        return self.hits >= LIMIT

    @property
    def stored(self) -> bool:
        """Whether the data is there in the end."""
        late = self.outcome is Outcome.UNKNOWN and self.case.fault.slow
        return late or self.outcome is Outcome.COMMITTED

    def send(self, attempt: int, command: str) -> bool:
        """Send a command, and tell whether it fails."""
        self.commands.append((attempt, command))
        times = self.case.times
        failed = command == self.case.target and (times is None or self.hits < times)
        self.hits += failed
        return failed

    def body(self, attempt: int) -> bool:
        """Run the body: an operation in a transaction is never sent again by the driver."""
        for command in self.case.commands:
            if self.send(attempt, command):
                if command == "getMore" and not self.case.fault.retryable:
                    # The cursor is there still, as far as the driver knows.
                    self.send(attempt, "killCursors")
                return True
        return False

    def end(self, attempt: int, command: str) -> bool:
        """Commit or abort: sent again by the driver, once, after a retryable error."""
        failed = self.send(attempt, command)
        if failed and self.case.fault.retryable:
            failed = self.send(attempt, command)
        self.killed = failed and command == ABORT and self.case.fault.retryable
        self.left_open = failed and not self.case.fault.slow and not self.killed
        return failed

    def commit(self, attempt: int) -> bool:
        """Commit, again and again while nobody can tell whether that was done."""
        failed = self.end(attempt, COMMIT)
        while failed and UNKNOWN in self.case.fault.labels(COMMIT) and not self.time_is_up:
            failed = self.end(attempt, COMMIT)
        return failed


def tell(case: Case) -> Story:
    """Play a case by the rules."""
    story = Story(case)
    labels = case.fault.labels(case.target)
    for attempt in count():
        if case.target == ABORT:
            # The body raises an error of its own. Those of the abort are ignored.
            story.body(attempt)
            story.end(attempt, ABORT)
            story.outcome = Outcome.RAISED
            return story
        if story.body(attempt):
            story.end(attempt, ABORT)
        elif not story.commit(attempt):
            return story
        if UNKNOWN in labels:
            story.outcome = Outcome.UNKNOWN
            return story
        if TRANSIENT not in labels or not case.retrying:
            story.outcome = Outcome.RAISED
            return story
        if story.time_is_up:
            story.outcome = Outcome.TIMED_OUT
            return story
    raise AssertionError


@contextmanager
def failing(admin: MongoClient[Any], story: Story) -> Iterator[None]:
    """Let the command of a case fail, of the tests' own client, as often as its story says."""
    case = story.case
    data = {"failCommands": [case.target], "appName": APP_NAME, **case.fault.settings}
    if case.target not in (COMMIT, ABORT):
        # The server itself runs a "find" when it meets a session that is new to it, and for
        # the fail point that is one of the client.
        data["namespace"] = f"{DATABASE}.item"
    mode = "alwaysOn" if case.times is None else {"times": case.times}
    hits = _configure(admin, mode=mode, data=data) + story.hits
    try:
        yield
        # What the client gave up may still be on its way.
        admin.admin.command("waitForFailPoint", _NAME, timesEntered=hits, maxTimeMS=5_000)
    finally:
        done = _configure(admin, mode="off")
    assert done == hits


_NAME = "failCommand"


def _configure(admin: MongoClient[Any], **settings: Any) -> int:
    """Set the fail point, and return how many commands it has hit since the server started."""
    return int(admin.admin.command("configureFailPoint", _NAME, **settings)["count"])


def is_busy(admin: MongoClient[Any]) -> bool:
    """Tell whether the server works on something that the tests' own client asked for."""
    pipeline: list[dict[str, Any]] = [
        {"$currentOp": {"localOps": True}},
        {"$match": {"appName": APP_NAME, "active": True, "lsid": {"$exists": True}}},
    ]
    return bool(list(admin.admin.aggregate(pipeline)))
