"""The retrying forms keep to MongoDB's specifications: the table, and the tests in prose."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from beanie import init_beanie
from clients import close, kill_sessions
from forms import FORMS, Form, by_decorator, by_function, by_loop
from labels import TRANSIENT, UNKNOWN, labelled
from models import Item
from pymongo.errors import OperationFailure, PyMongoError
from specification import (
    ABORT,
    COMMIT,
    INSERT,
    TABLE,
    ApplicationError,
    Calls,
    Case,
    Fail,
    Sequel,
    failing,
    sent,
    write_concern_error,
)
from wire import APP_NAME, DATABASE, Wire

from beanie_session_scope import (
    CommitUnknownError,
    SessionScopeError,
    TransactionTimeoutError,
    run_in_transaction,
)
from beanie_session_scope.deadline import Deadline
from beanie_session_scope.drivers import DRIVER

CASES = [pytest.param(case, id=f"{topic}-{case.it}") for topic, cs in TABLE.items() for case in cs]
SAMPLE = [
    pytest.param(case, id=f"{topic}-{case.it}")
    for topic, cases in TABLE.items()
    for case in cases[::3]
    if case.session is None
]


async def call(calls: Calls, case: Case) -> str:
    calls.number += 1
    await case.callback(calls)
    return f"result {calls.number}"


class Run:
    """A case that was put through the server.

    Attributes:
        calls: What the callback worked with.
        error: What the caller got, or ``None``.
        result: What the caller got otherwise.
        stored: The names of what is stored in the end.
    """

    def __init__(self, case: Case, uri: str, wire: Wire) -> None:
        self.case = case
        self.calls = Calls(uri)
        self.wire = wire
        self.sequel = Sequel()
        self.error: BaseException | None = None
        self.result: Any = None
        self.stored: list[str] = []

    async def on(self, client: Any, form: Form) -> None:
        """Run the case with a client."""
        session = await self._start_session(client)
        with failing(self.calls.uri, *self.case.fails) as next_fail:
            self.sequel.call = next_fail
            options = {"jitter": lambda: 0.0, **self.case.options}
            if session is not None:
                options["session"] = session
            with self.wire.record() as self.seen:
                try:
                    self.result = await form(call, self.calls, self.case, **options)
                except Exception as error:
                    self.error = error
        if session is not None:
            assert not session.has_ended
            await session.end_session()
        await kill_sessions(client, self.wire)

    async def _start_session(self, client: Any) -> Any:
        if self.case.session is None:
            return None
        session = await DRIVER.start_session(client, **self.case.session)
        if self.case.used:
            await client[DATABASE]["item"].find_one({}, session=session)
        return session

    def check(self) -> None:
        """Compare all of it with the table."""
        assert sent(self.seen) == self.case.sent
        self._check_error()
        assert self.stored == [str(number) for number in self.case.stored]
        assert Item.get_session() is None
        # Before each retry, a document is again what it was before it was written.
        earlier = [each for each in self.calls.documents if each.name != str(self.calls.number)]
        assert [each.id for each in earlier] == [None] * len(earlier)

    def _check_error(self) -> None:
        case, error = self.case, self.error
        if case.error is None:
            assert error is None, repr(error)
            return
        assert type(error) is case.error, repr(error)
        server = error if isinstance(error, PyMongoError) else error.__cause__
        assert getattr(server, "code", None) == case.code
        if isinstance(error, (PyMongoError, SessionScopeError)) and case.labels is not None:
            assert [x for x in (TRANSIENT, UNKNOWN) if error.has_error_label(x)] == [*case.labels]


class TestTheTable:
    @pytest.mark.parametrize("case", CASES)
    async def test_holds_for_run_in_transaction(
        self, server_uri: str, client: Any, wire: Wire, case: Case
    ) -> None:
        run = await self._run(server_uri, client, wire, case, by_function)
        run.check()
        rolled_back = case.it.startswith("rolls back") or "nothing was to be raised" in case.it
        expected = None if rolled_back or case.error else f"result {run.calls.number}"
        assert run.result == expected

    @pytest.mark.parametrize("form", [by_decorator, by_loop])
    @pytest.mark.parametrize("case", SAMPLE)
    async def test_holds_for_the_other_forms(
        self, server_uri: str, client: Any, wire: Wire, case: Case, form: Form
    ) -> None:
        run = await self._run(server_uri, client, wire, case, form)
        run.check()

    async def _run(self, uri: str, client: Any, wire: Wire, case: Case, form: Form) -> Run:
        run = Run(case, uri, wire)
        if not case.client:
            await run.on(client, form)
        else:
            options = {"event_listeners": [wire, run.sequel], "appname": APP_NAME, **case.client}
            other = DRIVER.client_class(uri, **options)
            await init_beanie(database=other[DATABASE], document_models=[Item])
            await run.on(other, form)
            await close(other)
        run.stored = [each["name"] async for each in client[DATABASE]["item"].find()]
        return run


FAILURES = 13
FULL = [min(0.005 * 1.5**attempt, 0.5) for attempt in range(1, FAILURES + 1)]
"""How long to wait after each of these failures, without jitter: 2.3 s in all."""


class Clock:
    """Tells the time that a test wants it to be."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def case_of(callback: Callable[[Calls], Any]) -> Case:
    return Case("of a prose test", [], callback=callback)


class TestTheCallback:
    @pytest.mark.parametrize("form", FORMS)
    async def test_raises_an_error_of_its_own_and_the_caller_gets_just_that(
        self, server_uri: str, client: Any, form: Form
    ) -> None:
        mine = ApplicationError()

        async def callback(calls: Calls) -> None:
            await calls.insert()
            raise mine

        with pytest.raises(ApplicationError) as caught:
            await form(call, Calls(server_uri), case_of(callback))
        assert caught.value is mine
        assert (mine.__cause__, mine.__context__) == (None, None)


@pytest.mark.parametrize("form", FORMS)
class TestTheTimeLimit:
    """Of 120 seconds, unless another one is asked for."""

    async def test_ends_the_retries_of_a_callback(
        self, server_uri: str, client: Any, wire: Wire, form: Form
    ) -> None:
        clock, error = Clock(), labelled(TRANSIENT)

        async def callback(calls: Calls) -> None:
            await calls.insert()
            clock.now += 121
            raise error

        with wire.record() as seen, pytest.raises(TransactionTimeoutError) as caught:
            await form(call, Calls(server_uri), case_of(callback), clock=clock)
        assert caught.value.__cause__ is error
        assert caught.value.has_error_label(TRANSIENT)
        assert not caught.value.has_error_label(UNKNOWN)
        assert sent(seen) == [[INSERT, ABORT]]

    async def test_ends_the_retries_of_a_transaction_whose_commit_failed(
        self, server_uri: str, client: Any, wire: Wire, form: Form
    ) -> None:
        with failing(server_uri, Fail("commitTransaction", times=9, code=251)):
            with wire.record() as seen, pytest.raises(TransactionTimeoutError) as caught:
                await self._commit_late(server_uri, form)
        assert isinstance(caught.value.__cause__, OperationFailure)
        assert caught.value.__cause__.code == 251
        assert caught.value.has_error_label(TRANSIENT)
        assert sent(seen) == [[INSERT, COMMIT]]

    async def test_ends_the_retries_of_a_commit_of_unknown_outcome(
        self, server_uri: str, client: Any, wire: Wire, form: Form
    ) -> None:
        with failing(server_uri, write_concern_error(64, times=9)):
            with wire.record() as seen, pytest.raises(CommitUnknownError) as caught:
                await self._commit_late(server_uri, form)
        assert isinstance(caught.value.__cause__, OperationFailure)
        assert caught.value.__cause__.code == 64
        assert caught.value.has_error_label(UNKNOWN)
        assert not caught.value.has_error_label(TRANSIENT)
        assert sent(seen) == [[INSERT, COMMIT]]

    async def test_is_one_for_all_attempts_and_the_commit(
        self, server_uri: str, client: Any, wire: Wire, form: Form
    ) -> None:
        clock = Clock()

        async def callback(calls: Calls) -> None:
            await calls.insert()
            clock.now += 50
            if calls.number < 3:
                raise labelled(TRANSIENT)

        with failing(server_uri, write_concern_error(64, times=9)):
            with wire.record() as seen, pytest.raises(CommitUnknownError):
                await form(call, Calls(server_uri), case_of(callback), clock=clock)
        assert sent(seen) == [[INSERT, ABORT], [INSERT, ABORT], [INSERT, COMMIT]]

    @pytest.mark.parametrize(("elapsed", "attempts"), [(9.990, 2), (9.993, 1), (10.0, 1)])
    async def test_holds_for_the_end_of_the_wait(
        self, server_uri: str, client: Any, form: Form, elapsed: float, attempts: int
    ) -> None:
        """The first wait is one of 7.5 ms: a new attempt after the limit is none."""
        clock, calls = Clock(), Calls(server_uri)

        async def callback(calls: Calls) -> None:
            clock.now += elapsed
            raise labelled(TRANSIENT)

        options = {"timeout": 10, "clock": clock, "jitter": lambda: 1.0}
        with pytest.raises(TransactionTimeoutError, match=f"{attempts} times"):
            await form(call, calls, case_of(callback), **options)
        assert calls.number == attempts

    async def test_is_one_of_real_time(self, server_uri: str, client: Any, form: Form) -> None:
        calls = Calls(server_uri)

        async def callback(calls: Calls) -> None:
            raise labelled(TRANSIENT)

        began = time.monotonic()
        with pytest.raises(TransactionTimeoutError, match=r"timeout=0.1 s"):
            await form(call, calls, case_of(callback), timeout=0.1, jitter=lambda: 1.0)
        # The waits are of 7.5, 11, 17, 25, 38 and 57 ms: the last one would end past the limit.
        assert 1 < calls.number <= 6
        assert time.monotonic() - began >= sum(FULL[: calls.number - 1])

    async def _commit_late(self, uri: str, form: Form) -> None:
        clock = Clock()

        async def callback(calls: Calls) -> None:
            await calls.insert()
            clock.now += 121

        await form(call, Calls(uri), case_of(callback), clock=clock)


class TestTheBackoff:
    @pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
    async def test_grows_from_attempt_to_attempt(
        self, server_uri: str, client: Any, caplog: pytest.LogCaptureFixture, share: float
    ) -> None:
        fail = Fail("commitTransaction", times=FAILURES, code=251, labels=[TRANSIENT])
        began = time.monotonic()
        await self._run(server_uri, caplog, fail, jitter=lambda: share)
        retries = self._records(caplog, "retry")
        assert [each["attempt"] for each in retries] == [*range(1, FAILURES + 1)]
        assert [each["wait"] for each in retries] == pytest.approx([share * w for w in FULL])
        assert {each["label"] for each in retries} == {TRANSIENT}
        assert {each["error"] for each in retries} == {"OperationFailure (code 251)"}
        assert time.monotonic() - began >= share * sum(FULL), "it has not waited"

    async def test_has_a_jitter_of_its_own_for_each_wait(
        self, server_uri: str, client: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        shares: list[float] = []

        def jitter() -> float:
            shares.append(0.02 * (1 + len(shares)))
            return shares[-1]

        fail = Fail("insert", times=4, code=112)
        await self._run(server_uri, caplog, fail, jitter=jitter)
        expected = [share * full for share, full in zip(shares, FULL[:4], strict=True)]
        waits = [each["wait"] for each in self._records(caplog, "retry")]
        assert waits == pytest.approx(expected)

    async def test_is_random_where_no_jitter_is_given(
        self, server_uri: str, client: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        await self._run(server_uri, caplog, Fail("insert", times=6, code=112))
        waits = [each["wait"] for each in self._records(caplog, "retry")]
        shares = [wait / full for wait, full in zip(waits, FULL[:6], strict=True)]
        assert all(0 <= share <= 1 for share in shares)
        assert len(set(shares)) == 6

    async def test_comes_between_commits_of_unknown_outcome_as_well(
        self, server_uri: str, client: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        fail = write_concern_error(64, times=4)
        await self._run(server_uri, caplog, fail, jitter=lambda: 0.1)
        retries = self._records(caplog, "commit.retry")
        assert [each["attempt"] for each in retries] == [1, 2, 3, 4]
        assert [each["wait"] for each in retries] == pytest.approx([0.1 * w for w in FULL[:4]])
        assert {each["label"] for each in retries} == {UNKNOWN}
        assert self._records(caplog, "retry") == []

    def test_never_exceeds_half_a_second(self) -> None:
        deadline = Deadline(120, jitter=lambda: 1.0)
        assert [deadline.backoff(attempt) for attempt in (11, 12, 13, 10_000)] == [
            pytest.approx(0.4325, abs=0.0001),
            0.5,
            0.5,
            0.5,
        ]

    async def _run(
        self, uri: str, caplog: pytest.LogCaptureFixture, fail: Fail, **options: Any
    ) -> None:
        with failing(uri, fail), caplog.at_level(logging.INFO, "beanie_session_scope"):
            await run_in_transaction(Calls(uri).insert, collections=[Item], **options)

    def _records(self, caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
        return [vars(each) for each in caplog.records if getattr(each, "event", "") == event]
