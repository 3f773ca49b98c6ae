"""Each command of a transaction fails, in each way, once, twice and always.

What must be on the wire, and how it must end, is said by the rules in ``faults``, the same for
both drivers.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from beanie import init_beanie
from clients import close
from faults import (
    ABORT,
    COMMIT,
    FAULTS,
    LIMIT,
    SOCKET_TIMEOUT_MS,
    Case,
    Fault,
    Outcome,
    Story,
    failing,
    is_busy,
    tell,
)
from labels import TRANSIENT, UNKNOWN
from models import Item
from pymongo import MongoClient
from pymongo.monitoring import CommandStartedEvent
from wire import APP_NAME, DATABASE, Wire, names, open_transactions

from beanie_session_scope import (
    CommitUnknownError,
    TransactionTimeoutError,
    current_scope,
    run_in_transaction,
    with_session,
)
from beanie_session_scope.drivers import DRIVER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(30)]

Contents = list[tuple[str, int]]
Step = Callable[[], Awaitable[object]]

BEFORE: Contents = [("seed", 0), ("spare", 0)]


class BodyError(Exception):
    """Raised by the body, so that its transaction is aborted."""


async def insert() -> None:
    await Item(name="mark").insert()


async def find() -> None:
    assert await Item.find_one(Item.name == "seed") is not None


async def update() -> None:
    await Item.find(Item.name == "seed").update({"$inc": {"n": 1}})


async def delete() -> None:
    await Item.find(Item.name == "spare").delete()


async def aggregate() -> None:
    assert len(await Item.aggregate([{"$match": {}}]).to_list()) == 2


async def find_and_get_more() -> None:
    assert len(await Item.find({}, batch_size=2).to_list()) == 3


async def fail() -> None:
    raise BodyError


@dataclass(frozen=True)
class Job:
    """A body: its steps, what they send, and what is stored once they are committed.

    Each inserts a document, so that what is done twice, or by half, shows. The command that
    fails comes first in some, where it would have opened the transaction, and later in others.
    """

    steps: tuple[Step, ...]
    commands: tuple[str, ...]
    after: Contents


JOBS = {
    "insert": Job((insert,), ("insert",), [("mark", 0), *BEFORE]),
    "find": Job((find, insert), ("find", "insert"), [("mark", 0), *BEFORE]),
    "update": Job((insert, update), ("insert", "update"), [("mark", 0), ("seed", 1), ("spare", 0)]),
    "delete": Job((delete, insert), ("delete", "insert"), [("mark", 0), ("seed", 0)]),
    "aggregate": Job((aggregate, insert), ("aggregate", "insert"), [("mark", 0), *BEFORE]),
    "getMore": Job(
        (insert, find_and_get_more), ("insert", "find", "getMore"), [("mark", 0), *BEFORE]
    ),
    COMMIT: Job((insert, update), ("insert", "update"), [("mark", 0), ("seed", 1), ("spare", 0)]),
    ABORT: Job((insert, update, fail), ("insert", "update"), BEFORE),
}

TIMES = {"once": 1, "twice": 2, "often": None}
# How long with_session() sends a commit again is a matter of real time: not always here.
TIMES_PLAIN = {"once": 1, "twice": 2}


def case_of(target: str, fault: Fault, times: int | None, retrying: bool) -> Case:
    return Case(target, JOBS[target].commands, fault, times, retrying)


def every_case() -> list[Case]:
    return [
        case_of(target, fault, times, retrying)
        for target in JOBS
        for fault in FAULTS
        for retrying, how_often in [(True, TIMES), (False, TIMES_PLAIN)]
        for times in how_often.values()
    ]


@pytest.fixture(scope="module")
def admin(server_uri: str) -> Iterator[MongoClient[Any]]:
    """A client that no fail point reaches: what it reads is what the server holds."""
    with MongoClient[Any](server_uri) as client:
        yield client


@pytest.fixture(autouse=True)
def rediscover_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a driver that has lost its server look for it at once, and not in half a second."""
    monkeypatch.setattr("pymongo.common.MIN_HEARTBEAT_INTERVAL", 0.02)
    for name in ("pymongo.network_layer", "pymongo.network"):  # newer and older releases
        if name in sys.modules:
            # How soon a monitor sees that its wait for news was cancelled.
            monkeypatch.setattr(f"{name}._POLL_TIMEOUT", 0.02, raising=False)


class Cell:
    """One case in real life: a client of its own, and what came of it."""

    done = 0
    passed = 0

    def __init__(self, case: Case, uri: str, admin: MongoClient[Any], wire: Wire) -> None:
        self.case = case
        self.job = JOBS[case.target]
        self.story = tell(case)
        self.uri = uri
        self.admin = admin
        self.items = admin[DATABASE]["item"]
        self.wire = wire
        self.sessions: list[Any] = []

    async def check(self) -> None:
        """Run the case, and compare it with what the rules tell."""
        Cell.done += 1
        self.fill()
        async with self.client() as client:
            before = asyncio.all_tasks()
            with self.wire.record() as seen, failing(self.admin, self.story):
                error = await self.run(client)
            await self.settle(before)
            check_commands(seen, self.story)
            check_error(error, self.story)
            assert self.contents() == (self.job.after if self.story.stored else BEFORE)
            self.check_leaks()
        Cell.passed += 1

    def fill(self) -> None:
        self.items.delete_many({})
        self.items.insert_many([{"name": name, "n": n} for name, n in BEFORE])

    def contents(self) -> Contents:
        return sorted((item["name"], item["n"]) for item in self.items.find())

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        options = {"socketTimeoutMS": SOCKET_TIMEOUT_MS} if self.case.fault.slow else {}
        client = DRIVER.client_class(
            self.uri, event_listeners=[self.wire], appname=APP_NAME, **options
        )
        try:
            await init_beanie(database=client[DATABASE], document_models=[Item])
            yield client
        finally:
            if sessions := self.wire.sessions():
                self.admin.admin.command("killSessions", sessions)
            await close(client)

    async def run(self, client: Any) -> BaseException | None:
        try:
            if self.case.retrying:
                await run_in_transaction(
                    self.body,
                    client=client,
                    collections=[Item],
                    timeout=LIMIT,
                    clock=self.time(),
                    jitter=lambda: 0.0,
                )
            else:
                async with with_session(client=client, collections=[Item]):
                    await self.body()
        except Exception as error:
            return error
        return None

    async def body(self) -> None:
        self.sessions.append(Item.get_session())
        for step in self.job.steps:
            await step()

    def time(self) -> Callable[[], float]:
        """Return the clock of the case: it counts the commands of the kind that fails."""
        already = len(self.wire._events)
        return lambda: float(names(self.wire._events[already:]).count(self.case.target))

    async def settle(self, before: set[asyncio.Task[Any]]) -> None:
        """Wait until the server is through with what the client gave up, and tasks are done."""
        while is_busy(self.admin) or any(map(is_ours, asyncio.all_tasks() - before)):
            await asyncio.sleep(0.01)

    def check_leaks(self) -> None:
        assert open_transactions(self.uri) == self.story.left_open
        assert self.sessions and all(session.has_ended for session in self.sessions)
        assert Item.get_session() is None
        assert current_scope() is None


def is_ours(task: asyncio.Task[Any]) -> bool:
    """Tell whether a task is none of the driver's monitors, nor one of their reads."""
    code = getattr(task.get_coro(), "cr_code", None)
    reads = code is not None and code.co_filename.endswith("network_layer.py")
    return not reads and not task.get_name().startswith("pymongo")


def attempt_of(event: CommandStartedEvent) -> tuple[bytes, int]:
    return bytes(event.command["lsid"]["id"]), event.command["txnNumber"]


def check_commands(seen: list[CommandStartedEvent], story: Story) -> None:
    inside = [event for event in seen if "txnNumber" in event.command]
    attempts = list(dict.fromkeys(map(attempt_of, inside)))
    assert [(attempts.index(attempt_of(e)), e.command_name) for e in inside] == story.commands
    assert all(event.command["autocommit"] is False for event in inside)
    begun: set[tuple[bytes, int]] = set()
    committed: set[tuple[bytes, int]] = set()
    for event in inside:
        attempt = attempt_of(event)
        assert event.command.get("startTransaction", False) is (attempt not in begun)
        begun.add(attempt)
        if event.command_name == COMMIT:
            concern = event.command.get("writeConcern", {}).get("w")
            assert concern == ("majority" if attempt in committed else None)
            committed.add(attempt)
    check_housekeeping([event for event in seen if event not in inside], story)


def check_housekeeping(outside: list[CommandStartedEvent], story: Story) -> None:
    """What else the package sends is no part of the transaction."""
    allowed = {"getParameter"}  # how old may a transaction get?
    if story.case.fault.code is None and story.case.target == story.case.commands[0]:
        allowed.add("killSessions")  # without an answer: it may open the transaction yet
    required = {"killSessions"} if story.killed else set()
    assert required <= set(names(outside)) <= allowed | required


def check_error(error: BaseException | None, story: Story) -> None:
    case = story.case
    if story.outcome is Outcome.COMMITTED:
        assert error is None
    elif case.target == ABORT:
        assert type(error) is BodyError
        assert error.__cause__ is None
    else:
        assert error is not None
        check_driver_error(driver_error_of(error, story.outcome), case.fault)
        labels = {each for each in (TRANSIENT, UNKNOWN) if error.has_error_label(each)}  # type: ignore[attr-defined]
        assert labels == case.fault.labels(case.target)


def driver_error_of(error: BaseException, outcome: Outcome) -> BaseException | None:
    if outcome is Outcome.RAISED:
        return error
    wrapper = TransactionTimeoutError if outcome is Outcome.TIMED_OUT else CommitUnknownError
    assert type(error) is wrapper
    return error.__cause__


def check_driver_error(error: Any, fault: Fault) -> None:
    assert type(error) is fault.error
    if fault.code is not None:
        assert error.details["code"] == fault.code


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("target", JOBS)
class TestAFault:
    @pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
    async def test_in_run_in_transaction_goes_by_the_specifications(
        self,
        server_uri: str,
        admin: MongoClient[Any],
        wire: Wire,
        target: str,
        fault: Fault,
        times: int | None,
    ) -> None:
        case = case_of(target, fault, times, retrying=True)
        await Cell(case, server_uri, admin, wire).check()

    @pytest.mark.parametrize("times", TIMES_PLAIN.values(), ids=TIMES_PLAIN)
    async def test_in_with_session_goes_by_the_specifications(
        self,
        server_uri: str,
        admin: MongoClient[Any],
        wire: Wire,
        target: str,
        fault: Fault,
        times: int,
    ) -> None:
        case = case_of(target, fault, times, retrying=False)
        await Cell(case, server_uri, admin, wire).check()


class TestAnOperationWithoutAnAnswer:
    async def test_that_begins_late_is_not_in_the_way_of_the_next_attempt(
        self, server_uri: str, admin: MongoClient[Any], wire: Wire
    ) -> None:
        """It would hold the lock of its document until the server's limit, a minute."""
        slow = next(fault for fault in FAULTS if fault.slow)
        cell = Cell(case_of("delete", slow, 1, retrying=True), server_uri, admin, wire)

        async def body() -> None:
            while cell.sessions and is_busy(admin):
                await asyncio.sleep(0.01)
            await cell.body()

        cell.fill()
        async with cell.client() as client:
            with failing(admin, cell.story):
                await run_in_transaction(body, client=client, collections=[Item], timeout=5)
        assert len(cell.sessions) == 2
        assert cell.contents() == cell.job.after


def test_the_number_of_cells(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        total = len(every_case())
        print(f"\nfaults, {DRIVER.name}: {Cell.passed} / {Cell.done} cells ({total} in all)")
    assert Cell.passed == Cell.done


def told(target: str, fault: str, times: int | None, *, retrying: bool = True) -> str:
    """Tell a case in one line: the commands of each attempt, and the outcome."""
    named = next(each for each in FAULTS if each.name == fault)
    story = tell(case_of(target, named, times, retrying))
    attempts: dict[int, list[str]] = {}
    for attempt, command in story.commands:
        attempts.setdefault(attempt, []).append(command.replace("Transaction", ""))
    return " | ".join(map(" ".join, attempts.values())) + f" -> {story.outcome.name}"


class TestTheRules:
    """Against what one reads in the specifications, so that rule and package can't both err."""

    def test_run_the_whole_again_after_a_transient_error(self) -> None:
        once = told("update", "WriteConflict", 1)
        assert once == "insert update abort | insert update commit -> COMMITTED"
        assert told("insert", "closed-connection", 2) == (
            "insert abort | insert abort | insert commit -> COMMITTED"
        )

    def test_do_not_outlast_the_time(self) -> None:
        assert told("insert", "NoSuchTransaction", None) == (
            "insert abort | insert abort | insert abort -> TIMED_OUT"
        )

    def test_run_nothing_again_after_another_error(self) -> None:
        assert told("insert", "Interrupted", 1) == "insert abort -> RAISED"
        assert told(COMMIT, "Interrupted", None) == "insert update commit -> RAISED"

    def test_run_nothing_again_in_a_plain_scope(self) -> None:
        assert told("find", "WriteConflict", 1, retrying=False) == "find abort -> RAISED"

    def test_send_a_commit_of_unknown_outcome_again(self) -> None:
        unknown = "insert update commit commit commit"
        assert told(COMMIT, "NotWritablePrimary", 2) == f"{unknown} -> COMMITTED"
        assert told(COMMIT, "slow-answer", None) == f"{unknown} commit -> UNKNOWN"

    def test_run_the_whole_again_after_a_commit_that_failed_for_good(self) -> None:
        assert told(COMMIT, "NoSuchTransaction", 1) == (
            "insert update commit | insert update commit -> COMMITTED"
        )

    def test_send_an_abort_twice_at_most_and_ignore_its_errors(self) -> None:
        assert told(ABORT, "WriteConflict", None) == "insert update abort -> RAISED"
        assert told(ABORT, "closed-connection", None) == "insert update abort abort -> RAISED"

    def test_close_a_cursor_that_an_answer_left_open(self) -> None:
        assert told("getMore", "Interrupted", 1) == (
            "insert find getMore killCursors abort -> RAISED"
        )
        assert told("getMore", "slow-answer", 1, retrying=False) == (
            "insert find getMore abort -> RAISED"
        )

    def test_make_one_attempt_wherever_the_error_is_not_transient(self) -> None:
        final = [c for c in every_case() if TRANSIENT not in c.fault.labels(c.target)]
        assert final
        assert {attempt for case in final for attempt, _ in tell(case).commands} == {0}
