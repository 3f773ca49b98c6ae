"""The rules of MongoDB's transactions, as a table of cases that a server can be put through.

They are those of the *transactions* and the *convenient API for transactions* specifications:
which commands a callback that is run in a transaction comes to, what the commands carry, how it
ends, and what is stored then. Where this package promises more than they do, a case says so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeAlias

from labels import TRANSIENT, UNKNOWN, labelled
from models import Item
from pymongo import MongoClient
from pymongo.errors import (
    AutoReconnect,
    ConfigurationError,
    DuplicateKeyError,
    OperationFailure,
    PyMongoError,
)
from pymongo.monitoring import (
    CommandFailedEvent,
    CommandListener,
    CommandStartedEvent,
    CommandSucceededEvent,
)
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern
from wire import APP_NAME

from beanie_session_scope import CommitUnknownError, Rollback, TransactionAbortedError
from beanie_session_scope.drivers import DRIVER

RETRYABLE = "RetryableWriteError"

NO_LABEL: tuple[str, ...] = ()


# -- what goes over the wire -------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command of a transaction, with all that the specifications say about its fields.

    ``read_concern`` tells of ``afterClusterTime`` only whether it is there.
    """

    name: str
    read_concern: Mapping[str, Any] | None = None
    write_concern: Mapping[str, Any] | None = None
    max_time_ms: int | None = None


Sent: TypeAlias = "list[list[Command]]"
"""The commands of each transaction, in order."""

INSERT = Command("insert")
COUNT = Command("aggregate")
ABORT = Command("abortTransaction")
# Where nobody knows whether the first operation has arrived, it may begin after the abort.
KILL = Command("killSessions")
COMMIT = Command("commitTransaction")
# The first commit may have been applied by a primary that was then lost: to be sure that the
# answer to the second holds, that one waits for a majority.
COMMIT_AGAIN = Command("commitTransaction", write_concern={"w": "majority", "wtimeout": 10_000})


def sent(events: Sequence[CommandStartedEvent]) -> Sent:
    """Sort commands by transaction, and check what every command of one must carry."""
    transactions: dict[Any, list[Command]] = {}
    for event in events:
        command = event.command
        if event.command_name == "getParameter":
            continue  # how long a transaction may live: asked beside it, where it takes long
        if event.command_name == "killSessions":
            (killed,) = command["killSessions"]
            last = [key for key in transactions if key[0] == bytes(killed["id"])][-1]
            transactions[last].append(KILL)
            continue
        assert command.get("autocommit") is False, f"outside the transaction: {command}"
        key = (bytes(command["lsid"]["id"]), command["txnNumber"])
        assert ("startTransaction" in command) is (key not in transactions), command
        transactions.setdefault(key, []).append(_command(event))
    return list(transactions.values())


def _command(event: CommandStartedEvent) -> Command:
    read_concern = dict(event.command.get("readConcern", {}))
    if "afterClusterTime" in read_concern:
        read_concern["afterClusterTime"] = True
    return Command(
        event.command_name,
        read_concern or None,
        event.command.get("writeConcern"),
        event.command.get("maxTimeMS"),
    )


# -- how the server fails ----------------------------------------------------------------------


@dataclass(frozen=True)
class Fail:
    """What the server is told to answer.

    ``labels`` are left to the server where they are ``None``. A ``write_concern_error`` comes
    after the command was carried out, the others instead.
    """

    commands: str
    times: int = 1
    code: int | None = None
    labels: Sequence[str] | None = None
    close_connection: bool = False
    write_concern_error: Mapping[str, Any] | None = None

    def turn_on(self, admin: MongoClient[Any]) -> None:
        """Tell the server."""
        data: dict[str, Any] = {"failCommands": self.commands.split(), "appName": APP_NAME}
        if self.code is not None:
            data["errorCode"] = self.code
        if self.labels is not None:
            data["errorLabels"] = list(self.labels)
        if self.close_connection:
            data["closeConnection"] = True
        if self.write_concern_error is not None:
            data["writeConcernError"] = dict(self.write_concern_error)
        mode = {"times": self.times}
        admin.admin.command("configureFailPoint", "failCommand", mode=mode, data=data)


class Sequel(CommandListener):
    """Calls a function whenever a commit is sent again, by whomever."""

    def __init__(self) -> None:
        self.call: Callable[[], None] = lambda: None
        self._commits = 0

    def started(self, event: CommandStartedEvent) -> None:
        if event.command_name == "commitTransaction":
            self._commits += 1
            if self._commits > 1:
                self.call()

    def succeeded(self, event: CommandSucceededEvent) -> None:
        """Not of interest."""

    def failed(self, event: CommandFailedEvent) -> None:
        """Not of interest."""


@contextmanager
def failing(uri: str, *fails: Fail | None) -> Iterator[Callable[[], None]]:
    """Let a server fail in one way, and in the next one whenever what is given is called."""
    upcoming = [fail for fail in fails if fail is not None]
    with MongoClient[Any](uri) as admin:

        def next_one() -> None:
            if upcoming:
                upcoming.pop(0).turn_on(admin)

        next_one()
        try:
            yield next_one
        finally:
            admin.admin.command("configureFailPoint", "failCommand", mode="off")


def network(commands: str, times: int = 1) -> Fail:
    return Fail(commands, times, close_connection=True)


def write_concern_error(code: int, times: int = 1, **answer: Any) -> Fail:
    labels = answer.pop("labels", None)
    error = {"code": code, "errmsg": "as the test asked for", **answer}
    return Fail("commitTransaction", times, labels=labels, write_concern_error=error)


# -- what the callback does --------------------------------------------------------------------


class Calls:
    """What a callback works with, over all its calls.

    Attributes:
        documents: The document of each call.
        number: How often it has been called.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.number = 0
        self.documents: list[Item] = []

    @property
    def first(self) -> bool:
        return self.number == 1

    @property
    def session(self) -> Any:
        return Item.get_session()

    async def insert(self) -> Item:
        """Insert a document that has the number of the call as its name."""
        document = Item(name=str(self.number))
        self.documents.append(document)
        await document.insert()
        return document

    def kill(self) -> None:
        """Let the server forget the transaction, as a failover would."""
        with MongoClient[Any](self.uri) as admin:
            admin.admin.command("killSessions", [self.session.session_id])


Callback: TypeAlias = Callable[[Calls], Awaitable[Any]]


class ApplicationError(Exception):
    """An error of the application."""


async def insert(calls: Calls) -> None:
    await calls.insert()


async def insert_twice(calls: Calls) -> None:
    await calls.insert()
    await calls.insert()


async def insert_and_count(calls: Calls) -> None:
    await calls.insert()
    await Item.count()


async def nothing(calls: Calls) -> None:
    pass


async def insert_and_raise(calls: Calls) -> None:
    await calls.insert()
    raise ApplicationError


async def only_raise(calls: Calls) -> None:
    raise ApplicationError


async def insert_and_roll_back(calls: Calls) -> None:
    await calls.insert()
    raise Rollback


async def roll_back(calls: Calls) -> None:
    raise Rollback


async def insert_a_duplicate(calls: Calls) -> None:
    first = await calls.insert()
    await Item(id=first.id).insert()


async def insert_a_duplicate_and_catch(calls: Calls) -> None:
    with suppress(DuplicateKeyError):
        await insert_a_duplicate(calls)


async def insert_and_catch(calls: Calls) -> None:
    with suppress(OperationFailure):
        await calls.insert()


async def raise_transient_at_first(calls: Calls) -> None:
    if calls.first:
        raise labelled(TRANSIENT)
    await calls.insert()


async def insert_and_raise_transient_at_first(calls: Calls) -> None:
    await calls.insert()
    if calls.first:
        raise labelled(TRANSIENT)


async def insert_and_raise_unknown(calls: Calls) -> None:
    await calls.insert()
    raise labelled(UNKNOWN)


async def be_killed_at_first(calls: Calls) -> None:
    await calls.insert()
    if calls.first:
        calls.kill()


async def commit(calls: Calls) -> None:
    await calls.session.commit_transaction()


async def abort(calls: Calls) -> None:
    await calls.session.abort_transaction()


async def insert_and_commit(calls: Calls) -> None:
    await calls.insert()
    await commit(calls)


async def insert_and_abort(calls: Calls) -> None:
    await calls.insert()
    await abort(calls)


async def commit_and_raise(calls: Calls) -> None:
    await insert_and_commit(calls)
    raise ApplicationError


async def abort_and_raise(calls: Calls) -> None:
    await insert_and_abort(calls)
    raise ApplicationError


async def commit_and_insert(calls: Calls) -> None:
    await insert_and_commit(calls)
    await calls.insert()


async def abort_and_insert(calls: Calls) -> None:
    await insert_and_abort(calls)
    await calls.insert()


async def abort_and_raise_transient_at_first(calls: Calls) -> None:
    await calls.insert()
    if calls.first:
        await abort(calls)
        raise labelled(TRANSIENT)


async def commit_and_start_another(calls: Calls) -> None:
    await insert_and_commit(calls)
    await DRIVER.start_transaction(calls.session)
    await calls.insert()


# -- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        it: What happens, as a name.
        sent: The commands of each transaction.
        stored: The numbers of the calls whose documents are in the database in the end.
        error: What the caller gets; ``None`` where that is the result of the last call.
        code: The code of the server's error that the caller gets, or of its cause.
        labels: Of ``TRANSIENT`` and ``UNKNOWN``, what the error carries.
        callback: What runs in the transaction.
        fails: How the server fails; each but the first when a commit is sent again.
        options: Of the transaction.
        client: Options of a client for this case.
        session: Options of the session that is passed; ``None`` lets the package start one.
        used: Whether that session has run an operation before.
    """

    it: str
    sent: Sent
    stored: Sequence[int] = (1,)
    error: type[BaseException] | None = None
    code: int | None = None
    labels: Sequence[str] | None = None
    callback: Callback = insert
    fails: Sequence[Fail] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    client: Mapping[str, Any] = field(default_factory=dict)
    session: Mapping[str, Any] | None = None
    used: bool = False


CALLBACKS = [
    Case("succeeds", [[INSERT, COMMIT]]),
    Case("sends nothing", [], stored=(), callback=nothing),
    Case(
        "raises",
        [[INSERT, ABORT]],
        stored=(),
        error=ApplicationError,
        callback=insert_and_raise,
    ),
    Case("raises and has sent nothing", [], stored=(), error=ApplicationError, callback=only_raise),
    Case("rolls back", [[INSERT, ABORT]], stored=(), callback=insert_and_roll_back),
    Case("rolls back and has sent nothing", [], stored=(), callback=roll_back),
    Case(
        "meets an error of the server that is not transient",
        [[INSERT, INSERT, ABORT]],
        stored=(),
        error=DuplicateKeyError,
        code=11000,
        labels=NO_LABEL,
        callback=insert_a_duplicate,
    ),
    # The commit would be answered as if the transaction had lost a conflict, again and again.
    Case(
        "catches an error of the server that is not transient",
        [[INSERT, INSERT, ABORT]],
        stored=(),
        error=TransactionAbortedError,
        code=11000,
        labels=NO_LABEL,
        callback=insert_a_duplicate_and_catch,
    ),
    Case("commits", [[INSERT, COMMIT]], callback=insert_and_commit),
    Case("commits and has sent nothing", [], stored=(), callback=commit),
    Case(
        "commits and raises", [[INSERT, COMMIT]], error=ApplicationError, callback=commit_and_raise
    ),
    Case("aborts", [[INSERT, ABORT]], stored=(), callback=insert_and_abort),
    Case("aborts and has sent nothing", [], stored=(), callback=abort),
    Case(
        "aborts and raises",
        [[INSERT, ABORT]],
        stored=(),
        error=ApplicationError,
        callback=abort_and_raise,
    ),
    # The drivers run what comes then without a transaction.
    Case(
        "commits and goes on",
        [[INSERT, COMMIT]],
        error=TransactionAbortedError,
        labels=NO_LABEL,
        callback=commit_and_insert,
    ),
    Case(
        "aborts and goes on",
        [[INSERT, ABORT]],
        stored=(),
        error=TransactionAbortedError,
        labels=NO_LABEL,
        callback=abort_and_insert,
    ),
    Case(
        "commits and starts another transaction",
        [[INSERT, COMMIT], [Command("insert", {"afterClusterTime": True}), COMMIT]],
        stored=(1, 1),
        callback=commit_and_start_another,
    ),
]

TRANSIENT_ERRORS = [
    Case(
        "of the server, twice",
        [[INSERT, ABORT], [INSERT, ABORT], [INSERT, COMMIT]],
        stored=(3,),
        fails=[Fail("insert", times=2, code=112)],
    ),
    Case(
        "of the network, twice",
        [[INSERT, ABORT, KILL], [INSERT, ABORT, KILL], [INSERT, COMMIT]],
        stored=(3,),
        fails=[network("insert", times=2)],
    ),
    Case(
        "of the network, at a read that the driver repeats outside a transaction",
        [[INSERT, COUNT, ABORT], [INSERT, COUNT, COMMIT]],
        stored=(2,),
        callback=insert_and_count,
        fails=[network("aggregate")],
    ),
    Case(
        "that the callback has caught",
        [[INSERT, ABORT], [INSERT, COMMIT]],
        stored=(2,),
        callback=insert_and_catch,
        fails=[Fail("insert", code=112)],
    ),
    Case(
        "that the callback raises",
        [[INSERT, ABORT], [INSERT, COMMIT]],
        stored=(2,),
        callback=insert_and_raise_transient_at_first,
    ),
    Case(
        "that the callback raises before it sends anything",
        [[INSERT, COMMIT]],
        stored=(2,),
        callback=raise_transient_at_first,
    ),
    Case(
        "that the callback raises after an abort of its own",
        [[INSERT, ABORT], [INSERT, COMMIT]],
        stored=(2,),
        callback=abort_and_raise_transient_at_first,
    ),
    Case(
        "of a commit by the callback",
        [[INSERT, COMMIT], [INSERT, COMMIT]],
        stored=(2,),
        callback=insert_and_commit,
        fails=[Fail("commitTransaction", code=251)],
    ),
    Case(
        "whose abort fails as well",
        [[INSERT, ABORT, ABORT, KILL], [INSERT, COMMIT]],
        stored=(2,),
        fails=[network("insert abortTransaction", times=2)],
    ),
    *(
        Case(
            f"of a commit, {name} ({code})",
            [[INSERT, COMMIT], [INSERT, COMMIT], [INSERT, COMMIT]],
            stored=(3,),
            fails=[Fail("commitTransaction", times=2, code=code)],
        )
        for name, code in {
            "LockTimeout": 24,
            "WriteConflict": 112,
            "SnapshotUnavailable": 246,
            "NoSuchTransaction": 251,
            "PreparedTransactionInProgress": 267,
        }.items()
    ),
    Case(
        "of a commit whose first answer was lost",
        [[INSERT, COMMIT, COMMIT_AGAIN], [INSERT, COMMIT]],
        stored=(2,),
        callback=be_killed_at_first,
        fails=[network("commitTransaction")],
    ),
]

# The driver doesn't ask a server at once that says it is shutting down.
QUICK = {"heartbeatFrequencyMS": 500}

UNKNOWN_COMMITS = [
    *(
        Case(
            f"after {times} lost answers",
            [[INSERT, COMMIT, *[COMMIT_AGAIN] * times]],
            fails=[network("commitTransaction", times=times)],
        )
        for times in (1, 2, 3)
    ),
    Case(
        "though the client retries no writes",
        [[INSERT, COMMIT, COMMIT_AGAIN]],
        client={"retryWrites": False},
        fails=[network("commitTransaction")],
    ),
    *(
        Case(
            f"after {name} ({code})",
            [[INSERT, COMMIT, COMMIT_AGAIN, COMMIT_AGAIN]],
            client=QUICK,
            fails=[Fail("commitTransaction", times=2, code=code, labels=[RETRYABLE])],
        )
        for name, code in {
            "ShutdownInProgress": 91,
            "NotWritablePrimary": 10107,
            "InterruptedAtShutdown": 11600,
            "PrimarySteppedDown": 189,
        }.items()
    ),
    Case(
        "after an error with its label",
        [[INSERT, COMMIT, COMMIT_AGAIN, COMMIT_AGAIN]],
        fails=[Fail("commitTransaction", times=2, code=8000, labels=[UNKNOWN])],
    ),
    Case(
        "after a write concern timed out (64)",
        [[INSERT, COMMIT, COMMIT_AGAIN, COMMIT_AGAIN]],
        fails=[write_concern_error(64, times=2, errInfo={"wtimeout": True})],
    ),
    Case(
        "after a write concern failed (64)",
        [[INSERT, COMMIT, COMMIT_AGAIN, COMMIT_AGAIN]],
        fails=[write_concern_error(64, times=2)],
    ),
    Case(
        "after a shutdown while it waited for its write concern (91)",
        [[INSERT, COMMIT, COMMIT_AGAIN]],
        client=QUICK,
        fails=[write_concern_error(91, labels=[RETRYABLE])],
    ),
    Case(
        "with the other terms of its write concern",
        [
            [
                INSERT,
                Command("commitTransaction", write_concern={"w": 1, "j": True, "wtimeout": 5_000}),
                *[
                    Command(
                        "commitTransaction",
                        write_concern={"w": "majority", "j": True, "wtimeout": 5_000},
                    )
                ]
                * 2,
            ]
        ],
        options={"write_concern": WriteConcern(w=1, j=True, wtimeout=5_000)},
        fails=[network("commitTransaction", times=2)],
    ),
    Case(
        "with its time limit",
        [
            [
                INSERT,
                Command("commitTransaction", max_time_ms=60_000),
                Command(
                    "commitTransaction",
                    max_time_ms=60_000,
                    write_concern={"w": "majority", "wtimeout": 10_000},
                ),
            ]
        ],
        options={"max_commit_time_ms": 60_000},
        fails=[network("commitTransaction")],
    ),
]

FAILED_COMMITS = [
    Case(
        "without a label",
        [[INSERT, COMMIT]],
        stored=(),
        error=OperationFailure,
        code=8000,
        labels=NO_LABEL,
        fails=[Fail("commitTransaction", code=8000, labels=[])],
    ),
    Case(
        "by the callback, of unknown outcome",
        [[INSERT, COMMIT, COMMIT_AGAIN]],
        stored=(),
        error=AutoReconnect,
        labels=[UNKNOWN],
        callback=insert_and_commit,
        fails=[network("commitTransaction", times=2)],
    ),
    Case(
        "by an error of the callback with the label of a commit",
        [[INSERT, ABORT]],
        stored=(),
        error=PyMongoError,
        labels=[UNKNOWN],
        callback=insert_and_raise_unknown,
    ),
    Case(
        "by its time limit, MaxTimeMSExpired (50)",
        [[INSERT, Command("commitTransaction", max_time_ms=60_000)]],
        stored=(),
        error=CommitUnknownError,
        code=50,
        labels=[UNKNOWN],
        options={"max_commit_time_ms": 60_000},
        fails=[Fail("commitTransaction", code=50)],
    ),
    Case(
        "by its time limit while it waits for its write concern",
        [[INSERT, COMMIT]],
        error=CommitUnknownError,
        code=50,
        labels=[UNKNOWN],
        fails=[write_concern_error(50)],
    ),
    # Applied, but not as widely as asked for: it stays unless this primary is lost. To send it
    # again would come to the same.
    *(
        Case(
            f"by {name} ({code})",
            [[INSERT, COMMIT]],
            error=CommitUnknownError,
            code=code,
            labels=NO_LABEL,
            fails=[write_concern_error(code)],
        )
        for name, code in {
            "UnknownReplWriteConcern": 79,
            "UnsatisfiableWriteConcern": 100,
        }.items()
    ),
    # The first one was applied. What answers the second says nothing about that.
    *(
        Case(
            f"without a label, when {who} had sent it again",
            [[INSERT, COMMIT, COMMIT_AGAIN]],
            error=CommitUnknownError,
            code=8000,
            labels=NO_LABEL,
            client=QUICK,
            fails=[fail, Fail("commitTransaction", code=8000, labels=[])],
        )
        for who, fail in {
            "the scope": write_concern_error(64),
            "the driver": write_concern_error(91, labels=[RETRYABLE]),
        }.items()
    ),
]

ABORTS = [
    *(
        Case(
            f"with an error that may be retried, {name}",
            [[INSERT, ABORT, ABORT]],
            stored=(),
            error=ApplicationError,
            callback=insert_and_raise,
            fails=[fail],
        )
        for name, fail in {
            "of the network": network("abortTransaction"),
            "NotWritablePrimary": Fail("abortTransaction", code=10107, labels=[RETRYABLE]),
            "InterruptedDueToReplStateChange": Fail(
                "abortTransaction", code=11602, labels=[RETRYABLE]
            ),
        }.items()
    ),
    # The specification has the driver ignore that. The transaction would stay open, though.
    Case(
        "with an error that may be retried, of the network, twice",
        [[INSERT, ABORT, ABORT, KILL]],
        stored=(),
        error=ApplicationError,
        callback=insert_and_raise,
        fails=[network("abortTransaction", times=2)],
    ),
    *(
        Case(
            f"with an error that may not be retried, {code}",
            [[INSERT, ABORT]],
            stored=(),
            error=ApplicationError,
            callback=insert_and_raise,
            fails=[Fail("abortTransaction", code=code)],
        )
        for code in (251, 8000)
    ),
    Case(
        "with an error, when nothing was to be raised",
        [[INSERT, ABORT]],
        stored=(),
        callback=insert_and_roll_back,
        fails=[Fail("abortTransaction", code=8000)],
    ),
]

MAJORITY = {"w": "majority"}
COMMIT_MAJORITY = Command("commitTransaction", write_concern=MAJORITY)
# In older PyMongo each of its two APIs takes only its own class.
API = "asynchronous." if DRIVER.name == "PyMongo Async" else ""
DEFAULTS = import_module(f"pymongo.{API}client_session").TransactionOptions(
    read_concern=ReadConcern("majority"),
    write_concern=WriteConcern("majority"),
    max_commit_time_ms=60_000,
)
GIVEN = {
    "read_concern": ReadConcern("snapshot"),
    "write_concern": WriteConcern(w=1),
    "max_commit_time_ms": 50_000,
}
COMMIT_AS_GIVEN = Command("commitTransaction", write_concern={"w": 1}, max_time_ms=50_000)


def reads(**read_concern: Any) -> Command:
    """Return the insert that opens a transaction with a read concern."""
    return Command("insert", read_concern=read_concern)


OPTIONS = [
    Case(
        "read concern goes with the first command alone",
        [[reads(level="snapshot"), INSERT, COMMIT]],
        stored=(1, 1),
        callback=insert_twice,
        options={"read_concern": ReadConcern("snapshot")},
    ),
    Case(
        "read concern goes with the first command of each attempt",
        [[reads(level="majority"), ABORT], [reads(level="majority"), COMMIT]],
        stored=(2,),
        options={"read_concern": ReadConcern("majority")},
        fails=[Fail("insert", code=112)],
    ),
    Case(
        "write concern goes with the commit alone",
        [[INSERT, INSERT, COMMIT_MAJORITY]],
        stored=(1, 1),
        callback=insert_twice,
        options={"write_concern": WriteConcern("majority")},
    ),
    Case(
        "write concern goes with the abort as it is, and the time limit not",
        [[INSERT, *[Command("abortTransaction", write_concern={"w": 1})] * 2]],
        stored=(),
        error=ApplicationError,
        callback=insert_and_raise,
        options={"write_concern": WriteConcern(w=1), "max_commit_time_ms": 60_000},
        fails=[network("abortTransaction")],
    ),
    Case(
        "write concern without acknowledgement is refused",
        [],
        stored=(),
        error=ConfigurationError,
        options={"write_concern": WriteConcern(w=0)},
    ),
    Case(
        "concerns are inherited from the client",
        [[reads(level="majority"), INSERT, COMMIT_MAJORITY]],
        stored=(1, 1),
        callback=insert_twice,
        client={"readConcernLevel": "majority", "w": "majority"},
    ),
    Case(
        "concerns given win over those of the client",
        [[reads(level="snapshot"), COMMIT_AS_GIVEN]],
        client={"readConcernLevel": "majority", "w": "majority"},
        options=GIVEN,
    ),
    Case(
        "all are inherited from the session",
        [
            [
                reads(level="majority"),
                Command("commitTransaction", write_concern=MAJORITY, max_time_ms=60_000),
            ]
        ],
        session={"default_transaction_options": DEFAULTS},
    ),
    Case(
        "those of the session win over those of the client",
        [
            [
                reads(level="majority"),
                Command("commitTransaction", write_concern=MAJORITY, max_time_ms=60_000),
            ]
        ],
        client={"readConcernLevel": "local", "w": 1},
        session={"default_transaction_options": DEFAULTS},
    ),
    Case(
        "those given win over those of the session",
        [[reads(level="snapshot"), COMMIT_AS_GIVEN]],
        session={"default_transaction_options": DEFAULTS},
        options=GIVEN,
    ),
    Case(
        "one that is given leaves the others of the session",
        [
            [
                reads(level="majority"),
                Command("commitTransaction", write_concern=MAJORITY, max_time_ms=50_000),
            ]
        ],
        session={"default_transaction_options": DEFAULTS},
        options={"max_commit_time_ms": 50_000},
    ),
    Case(
        "a session that was used reads after what it did",
        [[reads(afterClusterTime=True), INSERT, COMMIT]],
        stored=(1, 1),
        callback=insert_twice,
        session={},
        used=True,
    ),
    Case(
        "a session that was used reads after that in each attempt",
        [
            [reads(level="snapshot", afterClusterTime=True), ABORT],
            [reads(level="snapshot", afterClusterTime=True), COMMIT],
        ],
        stored=(2,),
        session={},
        used=True,
        options={"read_concern": ReadConcern("snapshot")},
        fails=[Fail("insert", code=112)],
    ),
    Case(
        "a session without causal consistency does not",
        [[INSERT, COMMIT]],
        session={"causal_consistency": False},
        used=True,
    ),
]

TABLE: dict[str, list[Case]] = {
    "callback": CALLBACKS,
    "transient error": TRANSIENT_ERRORS,
    "commit is sent again": UNKNOWN_COMMITS,
    "commit fails": FAILED_COMMITS,
    "abort is answered": ABORTS,
    "options": OPTIONS,
}
