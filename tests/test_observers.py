"""What an observer of scopes is told, when, and in which context."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import pytest
from labels import TRANSIENT, UNKNOWN
from models import Item, scope_of
from pymongo.errors import OperationFailure, PyMongoError
from wire import FailPoint

from beanie_session_scope import (
    CommitUnknownError,
    Rollback,
    ScopeClosedError,
    ScopeObserver,
    SessionScope,
    TransactionAttempt,
    TransactionTimeoutError,
    current_scope,
    observe,
    on_commit,
    run_in_transaction,
    transaction_attempts,
)


class Recorder(ScopeObserver):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.scopes: list[SessionScope] = []

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.told]

    def all(self, name: str) -> list[tuple[Any, ...]]:
        return [tuple(rest) for each, *rest in self.told if each == name]

    def scope_entered(self, scope: SessionScope) -> None:
        self.scopes.append(scope)
        self.told.append(("entered",))

    def transaction_started(self, scope: SessionScope) -> None:
        self.told.append(("started",))

    def lock_waited(self, scope: SessionScope | None, seconds: float) -> None:
        self.told.append(("waited", seconds))

    def commit_retried(
        self, scope: SessionScope, error: BaseException, attempt: int, wait: float
    ) -> None:
        self.told.append(("commit retried", type(error), attempt, wait))

    def transaction_ended(
        self,
        scope: SessionScope,
        outcome: Any,
        seconds: float,
        operations: int,
        error: BaseException | None,
    ) -> None:
        self.told.append(("ended", outcome.value, operations, seconds, error))

    def scope_left(
        self, scope: SessionScope, error: BaseException | None, retry_in: float | None
    ) -> None:
        self.told.append(("left", error, retry_in))


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    stop = observe(recorder)
    yield recorder
    stop()


class TestAScope:
    async def test_is_told_about_from_its_entry_to_its_end(
        self, client: Any, recorder: Recorder
    ) -> None:
        async with scope_of(client):
            assert recorder.names == ["entered", "started"]
            await Item().insert()
            await Item.find_one()

        ((outcome, operations, seconds, error),) = recorder.all("ended")
        assert recorder.names == ["entered", "started", "ended", "left"]
        assert (outcome, operations, error) == ("committed", 2, None)
        assert seconds > 0
        assert recorder.all("left") == [(None, None)]

    async def test_that_fails_is_left_with_its_error(self, client: Any, recorder: Recorder) -> None:
        error = KeyError("item")
        with pytest.raises(KeyError):
            async with scope_of(client):
                await Item().insert()
                raise error

        ((outcome, _, _, why),) = recorder.all("ended")
        assert (outcome, why) == ("aborted", error)
        assert recorder.all("left") == [(error, None)]

    async def test_is_left_with_the_error_of_its_commit(
        self, client: Any, recorder: Recorder, fail_point: FailPoint
    ) -> None:
        with fail_point("commitTransaction", error_code=50):
            with pytest.raises(CommitUnknownError) as caught:
                async with scope_of(client):
                    await Item().insert()

        ((outcome, _, _, why),) = recorder.all("ended")
        assert (outcome, why) == ("unknown", caught.value)
        assert recorder.all("left") == [(caught.value, None)]

    async def test_that_is_rolled_back_quietly_is_left_with_the_rollback(
        self, client: Any, recorder: Recorder
    ) -> None:
        async with scope_of(client):
            raise Rollback

        ((error, _),) = recorder.all("left")
        assert isinstance(error, Rollback)

    async def test_that_begins_anew_has_several_transactions(
        self, client: Any, recorder: Recorder
    ) -> None:
        scope = scope_of(client)
        async with scope:
            await Item().insert()
            await scope.commit()
            await scope.abort()

        assert recorder.names == ["entered", *["started", "ended"] * 3, "left"]
        outcomes = [(outcome, count, error) for outcome, count, _, error in recorder.all("ended")]
        assert outcomes == [("committed", 1, None), ("aborted", 0, None), ("committed", 0, None)]

    async def test_whose_transaction_was_ended_by_hand_says_so(
        self, client: Any, recorder: Recorder
    ) -> None:
        async with scope_of(client) as session:
            await session.abort_transaction()

        assert [outcome for outcome, *_ in recorder.all("ended")] == ["ended"]

    async def test_that_joins_another_one_is_not_told_about(
        self, client: Any, recorder: Recorder
    ) -> None:
        async with scope_of(client):
            async with scope_of(client):
                await Item().insert()

        assert recorder.names == ["entered", "started", "ended", "left"]

    async def test_without_a_transaction_has_none_to_tell_about(
        self, client: Any, recorder: Recorder
    ) -> None:
        async with scope_of(client, transaction=False):
            await Item().insert()

        assert recorder.names == ["entered", "left"]

    async def test_that_is_refused_is_not_told_about(self, client: Any, recorder: Recorder) -> None:
        scope = scope_of(client)
        async with scope:
            pass
        recorder.told.clear()

        with pytest.raises(Exception, match="entered before"):
            await scope.__aenter__()
        with pytest.raises(Exception, match="not open"):
            await scope.__aexit__(None, None, None)
        assert recorder.told == []


class Refusing(ScopeObserver):
    """Lets no block be entered."""

    def __init__(self) -> None:
        self.refused: list[SessionScope] = []

    def scope_entering(self, scope: SessionScope) -> None:
        self.refused.append(scope)
        raise KeyError("refused")


class TestAScopeThatIsRefused:
    async def test_is_not_entered(self, client: Any, recorder: Recorder) -> None:
        refusing = Refusing()
        stop = observe(refusing)
        scope = scope_of(client)
        try:
            with pytest.raises(KeyError, match="refused"):
                await scope.__aenter__()
        finally:
            stop()

        assert recorder.told == []
        assert current_scope() is None
        assert Item.get_session() is None
        assert refusing.refused == [scope]
        assert scope.client is client
        assert scope.state.value == "new"

    async def test_is_never_one_that_joins(self, client: Any) -> None:
        async with scope_of(client):
            stop = observe(Refusing())
            try:
                async with scope_of(client):
                    await Item().insert()
            finally:
                stop()


class TestItsHooks:
    async def test_are_those_of_the_owner(self, client: Any) -> None:
        ran = []
        async with scope_of(client) as _, scope_of(client):
            on_commit(lambda: ran.append("dropped"))
            scope = current_scope(Item)
            assert scope is not None
            (hook,) = scope.hooks.after_commit
            hook()
            scope.hooks.after_commit.clear()

        assert ran == ["dropped"]
        with pytest.raises(ScopeClosedError):
            _ = scope.hooks


class TestACommitThatIsSentAgain:
    async def test_is_told_about(
        self, client: Any, recorder: Recorder, fail_point: FailPoint
    ) -> None:
        with fail_point("commitTransaction", error_code=24, labels=[UNKNOWN], times=2):
            async with scope_of(client):
                await Item().insert()

        told = recorder.all("commit retried")
        assert [attempt for _, attempt, _ in told] == [1, 2]
        assert all(issubclass(error, PyMongoError) and wait >= 0 for error, _, wait in told)


class TestAnOperation:
    async def test_that_waits_for_another_one_says_how_long(
        self, client: Any, recorder: Recorder, fail_point: FailPoint
    ) -> None:
        async with scope_of(client):
            await Item.find_one()
            assert recorder.all("waited") == []
            with fail_point("find", block_ms=50):
                await asyncio.gather(Item.find_one(), Item.find_one())

        ((seconds,),) = recorder.all("waited")
        assert seconds > 0.01


class TestARetriedBlock:
    async def test_is_told_about_attempt_by_attempt(
        self, client: Any, recorder: Recorder, fail_point: FailPoint
    ) -> None:
        async def insert() -> None:
            await Item().insert()

        with fail_point("insert", error_code=112, labels=[TRANSIENT], times=2):
            await run_in_transaction(insert, client=client, collections=[Item], jitter=lambda: 1.0)

        first, second, last = recorder.all("left")
        attempts = [each for each in recorder.scopes if isinstance(each, TransactionAttempt)]
        assert [each.number for each in attempts] == [1, 2, 3]
        assert len({id(each.attempts) for each in attempts}) == 1
        assert [isinstance(error, OperationFailure) for error, _ in (first, second)] == [True] * 2
        assert 0 < first[1] < second[1]
        assert last == (None, None)
        assert recorder.names == ["entered", "started", "ended", "left"] * 3

    async def test_tells_the_error_of_a_commit_after_which_it_goes_on(
        self, client: Any, recorder: Recorder, fail_point: FailPoint
    ) -> None:
        with fail_point("commitTransaction", error_code=251, labels=[TRANSIENT], times=1):
            async for attempt in transaction_attempts(client, [Item]):
                async with attempt:
                    await Item().insert()

        (error, retry_in), last = recorder.all("left")
        assert isinstance(error, OperationFailure)
        assert retry_in is not None
        assert last == (None, None)

    async def test_tells_that_its_time_is_up(
        self, client: Any, recorder: Recorder, fail_point: FailPoint
    ) -> None:
        async def insert() -> None:
            await Item().insert()

        with fail_point("insert", error_code=112, labels=[TRANSIENT]):
            with pytest.raises(TransactionTimeoutError) as caught:
                await run_in_transaction(insert, client=client, collections=[Item], timeout=0.001)

        assert recorder.all("left")[-1] == (caught.value, None)

    async def test_tells_that_the_attempt_announced_does_not_come(
        self, client: Any, recorder: Recorder, fail_point: FailPoint
    ) -> None:
        async def insert() -> None:
            await Item().insert()

        with fail_point("insert", error_code=112, labels=[TRANSIENT]):
            task = asyncio.ensure_future(
                run_in_transaction(insert, client=client, collections=[Item], jitter=lambda: 99.0)
            )
            while not recorder.all("left"):
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        (_, retry_in), (error, never) = recorder.all("left")
        assert retry_in is not None
        assert isinstance(error, asyncio.CancelledError)
        assert never is None


HERE: ContextVar[str] = ContextVar("here", default="outside")


class Marker(ScopeObserver):
    """Sets a ContextVar for the length of a block, and puts hooks outside again."""

    def __init__(self) -> None:
        self.at: list[str] = []

    def scope_entered(self, scope: SessionScope) -> None:
        HERE.set("inside")

    def transaction_ended(self, scope: SessionScope, *_: Any) -> None:
        HERE.set("ended")

    def scope_left(self, scope: SessionScope, *_: Any) -> None:
        self.at.append(HERE.get())
        HERE.set("left")


class TestTheContext:
    async def test_is_that_of_the_block_and_that_of_the_hooks(self, client: Any) -> None:
        marker = Marker()
        stop = observe(marker)
        seen = []
        try:
            async with scope_of(client):
                on_commit(lambda: seen.append(HERE.get()))
                seen.append(HERE.get())
                seen.append(await asyncio.ensure_future(_here()))
            seen.append(HERE.get())
        finally:
            stop()

        assert seen == ["inside", "inside", "ended", "left"]
        assert marker.at == ["inside"]


async def _here() -> str:
    return HERE.get()


class Failing(ScopeObserver):
    """Fails at whatever it is told."""

    def _fail(self, *_: Any) -> None:
        raise KeyError("secret")

    scope_entered = transaction_started = lock_waited = commit_retried = _fail
    transaction_ended = scope_left = _fail


class TestAnObserver:
    async def test_that_fails_changes_nothing_and_is_logged(
        self, client: Any, database: Any, recorder: Recorder, caplog: pytest.LogCaptureFixture
    ) -> None:
        recorder_stop, stop = observe(Failing()), observe(late := Recorder())
        try:
            async with scope_of(client):
                await Item().insert()
        finally:
            recorder_stop()
            stop()

        assert await database["item"].count_documents({}) == 1
        assert late.names == recorder.names == ["entered", "started", "ended", "left"]
        failed: list[Any] = [each for each in caplog.records if each.levelno == logging.ERROR]
        assert [each.event for each in failed] == ["observer.failed"] * 4
        assert "secret" not in caplog.text

    async def test_that_was_stopped_hears_nothing(self, client: Any) -> None:
        recorder = Recorder()
        stop = observe(recorder)
        stop()
        stop()
        async with scope_of(client):
            await Item().insert()

        assert recorder.told == []

    async def test_that_fails_a_test_leaves_no_scope_open(self, client: Any) -> None:
        class Strict(ScopeObserver):
            def scope_entered(self, scope: SessionScope) -> None:
                pytest.fail("too many scopes")  # no Exception

        stop = observe(Strict())
        try:
            async with scope_of(client):
                await Item().insert()
        finally:
            stop()

        assert current_scope() is None

    def test_is_told_once(self) -> None:
        recorder = Recorder()
        stop = observe(recorder)
        try:
            with pytest.raises(ValueError, match="told already"):
                observe(recorder)
        finally:
            stop()

    def test_must_be_one(self) -> None:
        with pytest.raises(TypeError, match="derive the class from ScopeObserver"):
            observe(Recorder)  # type: ignore[arg-type]
