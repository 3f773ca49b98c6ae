"""Spans and metrics of scopes, next to the spans that the driver's instrumentation makes."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from importlib.metadata import version
from typing import Any

import pytest
import pytest_asyncio
from beanie import PydanticObjectId, init_beanie
from clients import close, kill_sessions
from labels import TRANSIENT, UNKNOWN
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode
from pymongo.errors import BulkWriteError, OperationFailure, PyMongoError
from telemetry_models import Coin
from telemetry_recorded import Recorded, about, events
from wire import APP_NAME, DATABASE, FailPoint, Wire

from beanie_session_scope import (
    CommitUnknownError,
    HookError,
    Rollback,
    SessionScope,
    TransactionAbortedError,
    TransactionTimeoutError,
    bind_session,
    current_scope,
    on_abort,
    on_commit,
    run_in_transaction,
    transaction_attempts,
    with_session,
)
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.observers import OBSERVERS
from beanie_session_scope.telemetry import SessionScopeInstrumentor

WRITE_CONFLICT = {
    "error.type": "OperationFailure",
    "db.response.status_code": "112",
    "error.labels": (TRANSIENT,),
}


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    """What telemetry records during the test."""
    recorded = Recorded()
    SessionScopeInstrumentor().instrument(recorded.tracers, recorded.meters)
    yield recorded
    SessionScopeInstrumentor().uninstrument()


@pytest_asyncio.fixture
async def client(server_uri: str, wire: Wire, recorded: Recorded) -> AsyncIterator[Any]:
    """A client whose commands have spans, as those of an instrumented application have."""
    listeners = [wire, recorded.commands]
    client = DRIVER.client_class(server_uri, event_listeners=listeners, appname=APP_NAME)
    await init_beanie(database=client[DATABASE], document_models=[Coin])
    await Coin().insert()
    await Coin.delete_all()
    recorded.clear()
    yield client
    await kill_sessions(client, wire)
    await close(client)


@pytest.fixture(autouse=True)
def no_errors_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """OpenTelemetry logs what goes wrong in it, and raises nothing; neither do observers."""
    yield
    records = caplog.get_records("call")
    assert [record.message for record in records if record.levelname == "ERROR"] == []


@pytest.fixture
def transaction(client: Any) -> Callable[..., SessionScope]:
    """Make a scope of the test's client."""
    return lambda **options: with_session(client=client, collections=[Coin], **options)


Scopes = Callable[..., SessionScope]


async def insert() -> None:
    await Coin().insert()


async def find() -> None:
    await Coin.find_one()


@asynccontextmanager
async def session_of(client: Any) -> AsyncIterator[Any]:
    """A session that no scope owns."""
    session = await DRIVER.start_session(client)
    try:
        yield session
    finally:
        await session.end_session()


class Several(Exception):
    """A group of errors, as Python 3.11 has it."""

    def __init__(self, *exceptions: Exception) -> None:
        self.exceptions = exceptions


class TestTheSpanOfATransaction:
    async def test_has_the_spans_of_its_operations_under_it(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        async with transaction():
            await Coin().insert()
            await Coin.find_one()
        await Coin.find_one()

        assert recorded.under(recorded.transaction) == ["insert", "find", "commitTransaction"]
        assert recorded.under(None) == ["transaction", "find"]

    async def test_is_what_the_specification_says(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        async with transaction():
            await Coin().insert()

        span = recorded.transaction
        assert span.kind is SpanKind.CLIENT
        assert span.status.status_code is StatusCode.UNSET
        assert about(span) == {
            "db.system.name": "mongodb",
            "propagation": "required",
            "outcome": "committed",
            "operations": 1,
        }
        assert events(span) == []
        scope = span.instrumentation_scope
        assert scope is not None
        assert (scope.name, scope.version) == (
            "beanie_session_scope",
            version("beanie_session_scope"),
        )

    async def test_sits_under_the_span_around_the_block(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        with recorded.tracer.start_as_current_span("request") as request:
            async with transaction():
                await Coin().insert()
            await Coin.find_one()

        assert recorded.under(_readable(request)) == ["transaction", "find"]

    async def test_has_the_spans_of_the_block_under_it(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        async with transaction():
            with recorded.tracer.start_as_current_span("step") as step:
                await Coin().insert()

        assert recorded.under(recorded.transaction) == ["step", "commitTransaction"]
        assert recorded.under(_readable(step)) == ["insert"]

    async def test_can_be_given_attributes_in_the_block(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        with recorded.tracer.start_as_current_span("request") as request:
            async with transaction():
                span = trace.get_current_span()
                assert span.is_recording()
                span.set_attribute("one", 1)
                span.set_attributes({"two": 2})
                span.add_event("three")
                span.add_link(request.get_span_context())
                span.record_exception(KeyError("four"))
                span.set_status(StatusCode.OK)
                span.update_name("transfer")
                span.end()  # as "with" does; it is not the block's to end
                await Coin().insert()

        (span,) = [span for span in recorded.spans if span.name == "transfer"]
        assert (about(span)["one"], about(span)["two"]) == (1, 2)
        assert about(span)["outcome"] == "committed"
        assert [event.name for event in span.events] == ["three", "exception"]
        assert [link.context for link in span.links] == [request.get_span_context()]
        assert span.status.status_code is StatusCode.OK
        assert recorded.under(span) == ["insert", "commitTransaction"]

    async def test_has_what_tasks_do_under_it(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        async with transaction():
            await asyncio.gather(*(Coin().insert() for _ in range(3)))
            await asyncio.create_task(find())

        assert recorded.under(recorded.transaction) == [
            *["insert"] * 3,
            "find",
            "commitTransaction",
        ]

    async def test_is_one_for_each_of_several_at_once(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        async def deposit() -> None:
            async with transaction():
                await Coin.find_one()
                await Coin().insert()

        with recorded.tracer.start_as_current_span("request") as request:
            await asyncio.gather(*(deposit() for _ in range(5)))

        assert recorded.under(_readable(request)) == ["transaction"] * 5
        for span in recorded.transactions:
            assert recorded.under(span) == ["find", "insert", "commitTransaction"]

    async def test_can_be_read_by_who_processes_the_spans_under_it(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        async with transaction():
            span = trace.get_current_span()
            assert getattr(span, "name", None) == "transaction"
            assert not hasattr(span, "unheard_of")

    async def test_is_not_recorded_where_the_trace_is_not(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        unsampled = trace.SpanContext(7, 7, is_remote=True, trace_flags=trace.TraceFlags(0))
        with trace.use_span(trace.NonRecordingSpan(unsampled)):
            async with transaction():
                assert trace.get_current_span().get_span_context().trace_id == 7
                await Coin().insert()

        assert recorded.spans == []

    if sys.version_info >= (3, 11):

        async def test_has_what_a_task_group_does_under_it(
            self, recorded: Recorded, transaction: Scopes
        ) -> None:
            async with transaction(), asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(insert())

            assert recorded.under(recorded.transaction) == [*["insert"] * 3, "commitTransaction"]

    async def test_has_the_span_of_an_independent_one_in_it_under_it(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        async with transaction():
            async with transaction(propagation="requires_new"):
                await Coin().insert()
            await Coin.find_one()

        outer, inner = recorded.transactions
        assert recorded.under(outer) == ["transaction", "find", "commitTransaction"]
        assert recorded.under(inner) == ["insert", "commitTransaction"]
        assert about(inner)["propagation"] == "requires_new"

    async def test_is_that_of_the_owner_in_a_block_that_joins(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        async def spend() -> None:
            async with transaction():
                await Coin().insert()

        async with transaction():
            await spend()
            await run_in_transaction(spend, client=current_scope().client)  # type: ignore[union-attr]

        assert recorded.under(recorded.transaction) == ["insert", "insert", "commitTransaction"]

    async def test_is_not_there_without_a_transaction(
        self, recorded: Recorded, transaction: Scopes, client: Any
    ) -> None:
        before = context.get_current()
        async with transaction(transaction=False):
            assert context.get_current() is before
            await Coin().insert()
        async with session_of(client) as session:
            with bind_session(session, collections=[Coin]):
                await Coin().insert()

        assert recorded.transactions == []

    async def test_is_another_one_after_a_commit_in_the_block(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        scope, go_on = transaction(), asyncio.Event()

        async def later() -> None:
            await go_on.wait()
            await Coin.find_one()

        with recorded.tracer.start_as_current_span("request") as request:
            async with scope:
                task = asyncio.create_task(later())
                await Coin().insert()
                await scope.commit()
                go_on.set()
                await task

        first, second = recorded.transactions
        assert recorded.under(_readable(request)) == ["transaction", "transaction"]
        assert recorded.under(first) == ["insert", "commitTransaction"]
        assert recorded.under(second) == ["find", "commitTransaction"]


class TestTheOutcome:
    async def test_of_an_error_is_an_error(self, recorded: Recorded, transaction: Scopes) -> None:
        with pytest.raises(KeyError):
            async with transaction():
                await Coin().insert()
                raise KeyError("secret")

        assert recorded.under(recorded.transaction) == ["insert", "abortTransaction"]
        assert _ended(recorded.transaction) == ("aborted", {"error.type": "KeyError"})

    async def test_shows_nothing_of_an_error_but_its_kind(
        self, recorded: Recorded, transaction: Scopes, client: Any, server_uri: str
    ) -> None:
        secret = PydanticObjectId()
        with pytest.raises(BulkWriteError) as caught:
            async with transaction():
                await Coin.insert_many([Coin(id=secret), Coin(id=secret)])

        text = recorded.transaction.to_json() + repr(recorded.metric("scope.duration"))
        assert _ended(recorded.transaction) == (
            "aborted",
            {"error.type": "BulkWriteError", "db.response.status_code": "65"},
        )
        assert str(secret) in repr(caught.value.details)
        assert str(secret) not in text
        assert server_uri.removeprefix("mongodb://").split("/")[0] not in text

    @pytest.mark.parametrize("error", [Rollback(), Several(Rollback(), Rollback())])
    async def test_of_a_rollback_is_no_error(
        self, recorded: Recorded, transaction: Scopes, error: Exception
    ) -> None:
        async with transaction():
            await Coin().insert()
            raise error

        assert _ended(recorded.transaction) == ("aborted", None)

    async def test_of_an_abort_in_the_block_is_no_error(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        scope = transaction()
        async with scope:
            await Coin().insert()
            await scope.abort()

        assert [*map(_ended, recorded.transactions)] == [("aborted", None), ("committed", None)]

    async def test_of_a_commit_in_the_block_that_was_refused_is_an_error(
        self, recorded: Recorded, transaction: Scopes, fail_point: FailPoint
    ) -> None:
        scope = transaction()
        async with scope:
            await Coin().insert()
            with fail_point("commitTransaction", error_code=112, labels=[TRANSIENT], times=1):
                with pytest.raises(OperationFailure):
                    await scope.commit()
            await scope.abort()

        assert [*map(_ended, recorded.transactions)] == [
            ("aborted", WRITE_CONFLICT),
            ("committed", None),
        ]

    async def test_of_a_caught_error_of_the_server_is_an_error(
        self, recorded: Recorded, transaction: Scopes, fail_point: FailPoint
    ) -> None:
        with fail_point("insert", error_code=11000, times=1):
            with pytest.raises(TransactionAbortedError):
                async with transaction():
                    with suppress(PyMongoError):
                        await Coin().insert()

        assert _ended(recorded.transaction) == (
            "aborted",
            {"error.type": "TransactionAbortedError"},
        )

    async def test_that_nobody_knows_is_an_error(
        self, recorded: Recorded, transaction: Scopes, fail_point: FailPoint
    ) -> None:
        with fail_point("commitTransaction", error_code=50), pytest.raises(CommitUnknownError):
            async with transaction():
                await Coin().insert()

        failure = {"error.type": "CommitUnknownError", "error.labels": (UNKNOWN,)}
        assert _ended(recorded.transaction) == ("unknown", failure)

    async def test_of_a_transaction_that_was_ended_by_hand_is_no_error(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        async with transaction() as session:
            await Coin().insert()
            await session.commit_transaction()

        assert _ended(recorded.transaction) == ("ended", None)

    async def test_of_a_commit_is_none_where_a_hook_fails(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        async def fail() -> None:
            raise OSError

        with pytest.raises(HookError):
            async with transaction():
                await Coin().insert()
                on_commit(fail)

        assert _ended(recorded.transaction) == ("committed", None)

    async def test_of_a_cancelled_task_is_an_error(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        inside = asyncio.Event()

        async def work() -> None:
            async with transaction():
                await Coin().insert()
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert _ended(recorded.transaction) == ("aborted", {"error.type": "CancelledError"})
        assert recorded.under(recorded.transaction) == ["insert", "abortTransaction"]

    async def test_is_waited_for_where_the_clean_up_goes_on_in_the_background(
        self, recorded: Recorded, transaction: Scopes, fail_point: FailPoint
    ) -> None:
        with fail_point("abortTransaction", block_ms=200, times=1), pytest.raises(KeyError):
            async with transaction(cleanup_timeout=0.01):
                await Coin().insert()
                raise KeyError
        assert recorded.transactions == []

        while not recorded.transactions:
            await asyncio.sleep(0.01)
        assert _ended(recorded.transaction) == ("aborted", {"error.type": "KeyError"})
        assert recorded.under(recorded.transaction) == ["insert", "abortTransaction"]


class TestRetries:
    async def test_of_a_commit_are_events(
        self, recorded: Recorded, transaction: Scopes, fail_point: FailPoint
    ) -> None:
        with fail_point("commitTransaction", error_code=24, labels=[UNKNOWN], times=3):
            async with transaction():
                await Coin().insert()

        kind = {"error.type": "OperationFailure", "db.response.status_code": "24"}
        assert _ended(recorded.transaction) == ("committed", None)
        assert events(recorded.transaction) == [
            ("commit.retry", {"attempt": number, **kind, "error.labels": (UNKNOWN,)})
            for number in (1, 2, 3)
        ]
        assert recorded.metric("commit.retries") == [(kind, 3)]

    async def test_of_a_transaction_are_events_of_one_span(
        self, recorded: Recorded, client: Any, fail_point: FailPoint
    ) -> None:
        with fail_point("insert", error_code=112, labels=[TRANSIENT], times=2):
            with recorded.tracer.start_as_current_span("request") as request:
                await run_in_transaction(insert, client=client, collections=[Coin])

        span = recorded.transaction
        assert recorded.under(_readable(request)) == ["transaction"]
        assert recorded.under(span) == [
            *["insert", "abortTransaction"] * 2,
            *["insert", "commitTransaction"],
        ]
        assert events(span) == [
            ("attempt", {"attempt": 1}),
            ("retry", {"attempt": 1, **WRITE_CONFLICT}),
            ("attempt", {"attempt": 2}),
            ("retry", {"attempt": 2, **WRITE_CONFLICT}),
            ("attempt", {"attempt": 3}),
        ]
        assert _ended(span) == ("committed", None)
        assert about(span)["attempts"] == 3

    async def test_after_a_commit_that_was_refused_are_events(
        self, recorded: Recorded, client: Any, fail_point: FailPoint
    ) -> None:
        with fail_point("commitTransaction", error_code=112, labels=[TRANSIENT], times=1):
            await run_in_transaction(insert, client=client, collections=[Coin])

        assert [name for name, _ in events(recorded.transaction)] == ["attempt", "retry", "attempt"]
        assert _ended(recorded.transaction) == ("committed", None)

    async def test_that_find_the_time_up_are_an_error(
        self, recorded: Recorded, client: Any, fail_point: FailPoint
    ) -> None:
        with fail_point("insert", error_code=112, labels=[TRANSIENT]):
            with pytest.raises(TransactionTimeoutError):
                await run_in_transaction(insert, client=client, collections=[Coin], timeout=0.001)

        outcome, failure = _ended(recorded.transaction)
        assert outcome == "aborted"
        assert failure is not None
        assert failure["error.type"] == "TransactionTimeoutError"

    async def test_are_over_where_the_wait_for_one_is_cancelled(
        self, recorded: Recorded, client: Any, fail_point: FailPoint
    ) -> None:
        with fail_point("insert", error_code=112, labels=[TRANSIENT]):
            task = asyncio.ensure_future(
                run_in_transaction(insert, client=client, collections=[Coin], jitter=lambda: 99.0)
            )
            while not recorded.metric("retries"):
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        assert _ended(recorded.transaction) == ("aborted", {"error.type": "CancelledError"})

    async def test_are_over_where_the_loop_is_left(
        self, recorded: Recorded, client: Any, fail_point: FailPoint
    ) -> None:
        with fail_point("insert", error_code=112, labels=[TRANSIENT]):
            async for attempt in transaction_attempts(client, [Coin]):
                async with attempt:
                    await Coin().insert()
                break
        assert recorded.transactions == []

        del attempt
        while not recorded.transactions:
            gc.collect()
            await asyncio.sleep(0)
        assert _ended(recorded.transaction) == ("aborted", WRITE_CONFLICT)

    def test_are_forgotten_where_the_event_loop_is_closed_before(
        self, server_uri: str, recorded: Recorded
    ) -> None:
        async def fail_once() -> Any:
            client = DRIVER.client_class(server_uri)
            await init_beanie(database=client[DATABASE], document_models=[Coin])
            attempts = transaction_attempts(client, [Coin])
            async with await attempts.__anext__():
                raise OperationFailure("try again", 112, {"errorLabels": [TRANSIENT]})
            await close(client)
            return attempts

        attempts = asyncio.run(fail_once())
        assert len(recorded.metric("retries")) == 1
        del attempts
        gc.collect()

        assert recorded.transactions == []

    async def test_have_nothing_in_common_with_what_is_done_between_them(
        self, recorded: Recorded, client: Any, fail_point: FailPoint
    ) -> None:
        with fail_point("insert", error_code=112, labels=[TRANSIENT], times=1):
            async for attempt in transaction_attempts(client, [Coin]):
                await Coin.find_one()
                async with attempt:
                    await Coin().insert()
                await Coin.find_one()

        assert recorded.under(None) == ["find", "transaction", "find", "find", "find"]

    @pytest.mark.parametrize("jitter", [0.0, 50.0], ids=["before", "after"])
    async def test_go_on_whenever_the_clean_up_is_done_with_the_attempt_before(
        self, recorded: Recorded, client: Any, fail_point: FailPoint, jitter: float
    ) -> None:
        async def conflict_once() -> None:
            await Coin().insert()
            if not recorded.metric("retries"):
                raise OperationFailure("try again", 112, {"errorLabels": [TRANSIENT]})

        options: dict[str, Any] = {"cleanup_timeout": 0.01, "jitter": lambda: jitter}
        with fail_point("abortTransaction", block_ms=100, times=1):
            await run_in_transaction(conflict_once, client=client, collections=[Coin], **options)
        assert _ended(recorded.transaction) == ("committed", None)

        while len(recorded.metric("transaction.duration")) < 2:
            await asyncio.sleep(0.01)
        assert about(recorded.transaction)["attempts"] == 2


class TestTheContext:
    async def test_is_the_one_before_when_the_block_is_left(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        before = context.get_current()
        async with transaction():
            assert context.get_current() is not before

        assert context.get_current() is before

    async def test_of_a_hook_is_that_around_the_block(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        with recorded.tracer.start_as_current_span("request") as request:
            async with transaction():
                await Coin().insert()
                on_commit(insert)
            with pytest.raises(KeyError):
                async with transaction():
                    on_abort(find)
                    raise KeyError

        assert recorded.under(_readable(request)) == [
            *["transaction", "insert"],
            *["transaction", "find"],
        ]

    async def test_of_a_task_that_goes_on_is_that_around_the_block(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        over = asyncio.Event()

        async def work() -> None:
            await over.wait()
            with recorded.tracer.start_as_current_span("late"):
                pass

        with recorded.tracer.start_as_current_span("request") as request:
            async with transaction():
                task = asyncio.create_task(work())
            over.set()
            await task

        assert recorded.under(_readable(request)) == ["transaction", "late"]

    async def test_is_the_one_before_where_another_task_leaves_the_block(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        scope = transaction()
        seen = []

        async def leave() -> None:
            await Coin().insert()
            await scope.__aexit__(None, None, None)
            seen.append(trace.get_current_span())

        with recorded.tracer.start_as_current_span("request") as request:
            await scope.__aenter__()
            await asyncio.create_task(leave())
            with recorded.tracer.start_as_current_span("after"):
                pass

        assert seen == [request]
        assert recorded.under(_readable(request)) == ["transaction", "after"]
        assert recorded.under(recorded.transaction) == ["insert", "commitTransaction"]

    async def test_of_an_unrelated_task_that_leaves_the_block_stays(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        scope = transaction()

        async def leave() -> None:
            with recorded.tracer.start_as_current_span("other") as other:
                await scope.__aexit__(None, None, None)
                assert trace.get_current_span() is other

        with recorded.tracer.start_as_current_span("request") as request:
            await scope.__aenter__()
            await Context().run(asyncio.ensure_future, leave())
            with recorded.tracer.start_as_current_span("after"):
                pass

        assert recorded.under(_readable(request)) == ["transaction", "after"]

    async def test_is_the_one_around_after_generators_that_were_abandoned(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        async def coins() -> AsyncIterator[int]:
            async with transaction():
                yield 1

        with recorded.tracer.start_as_current_span("request") as request:
            for number in range(3):
                async for _ in coins():
                    break
                while len(recorded.transactions) == number:
                    gc.collect()
                    await asyncio.sleep(0.001)
            async with transaction():
                pass
            with recorded.tracer.start_as_current_span("after"):
                pass

        assert recorded.under(_readable(request)) == [*["transaction"] * 4, "after"]

    async def test_does_not_grow_with_every_block_that_is_left_elsewhere(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        with recorded.tracer.start_as_current_span("request") as request:
            for _ in range(sys.getrecursionlimit()):
                scope = transaction()
                await scope.__aenter__()
                await Context().run(asyncio.ensure_future, scope.__aexit__(None, None, None))
            recorded.clear()
            with recorded.tracer.start_as_current_span("after"):
                pass

        assert recorded.under(_readable(request)) == ["after"]

    async def test_keeps_what_the_block_has_put_there(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        before = context.get_current()
        try:
            async with transaction():
                context.attach(baggage.set_baggage("customer", "7"))
            assert baggage.get_baggage("customer") == "7"
            with recorded.tracer.start_as_current_span("after"):
                pass
        finally:
            context.attach(before)

        assert recorded.under(None) == ["transaction", "after"]


class TestTheMetrics:
    async def test_count_the_scopes_that_are_open(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        async with transaction(), transaction(propagation="requires_new"), transaction():
            assert recorded.metric("active_scopes") == [({}, 2)]
        async with transaction(transaction=False):
            assert recorded.metric("active_scopes") == [({}, 1)]

        assert recorded.metric("active_scopes") == [({}, 0)]

    async def test_tell_how_long_scopes_and_transactions_took_and_how_they_ended(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        scope = transaction()
        async with scope:
            await scope.commit()
        async with transaction():
            raise Rollback
        with pytest.raises(KeyError):
            async with transaction():
                raise KeyError

        assert recorded.metric("transaction.duration") == [
            ({"beanie_session_scope.outcome": "committed"}, 2),
            ({"beanie_session_scope.outcome": "aborted"}, 2),
        ]
        assert recorded.metric("scope.duration") == [({}, 2), ({"error.type": "KeyError"}, 1)]

    async def test_tell_how_long_operations_waited(
        self, recorded: Recorded, transaction: Scopes, client: Any
    ) -> None:
        async with transaction():
            await asyncio.gather(*(Coin().insert() for _ in range(3)))
        async with session_of(client) as session:
            with bind_session(session, collections=[Coin]):
                await asyncio.gather(*(Coin().insert() for _ in range(3)))

        assert recorded.metric("lock.wait_time") == [({}, 4)]

    async def test_count_retries(
        self, recorded: Recorded, client: Any, fail_point: FailPoint
    ) -> None:
        with fail_point("insert", error_code=112, labels=[TRANSIENT], times=2):
            await run_in_transaction(insert, client=client, collections=[Coin])

        kind = {"error.type": "OperationFailure", "db.response.status_code": "112"}
        assert recorded.metric("retries") == [(kind, 2)]


class TestTheInstrumentor:
    async def test_is_the_same_for_the_whole_process(self, recorded: Recorded) -> None:
        assert SessionScopeInstrumentor() is SessionScopeInstrumentor()
        assert SessionScopeInstrumentor().is_instrumented_by_opentelemetry

    async def test_turned_on_twice_records_once(
        self, recorded: Recorded, transaction: Scopes, caplog: pytest.LogCaptureFixture
    ) -> None:
        SessionScopeInstrumentor().instrument(recorded.tracers, recorded.meters)
        async with transaction():
            await Coin().insert()

        assert len(recorded.transactions) == 1
        assert "is on already" in caplog.text

    async def test_turned_off_leaves_nothing_behind(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        SessionScopeInstrumentor().uninstrument()
        SessionScopeInstrumentor().uninstrument()
        before = context.get_current()
        async with transaction():
            assert context.get_current() is before
            await Coin().insert()

        assert OBSERVERS == []
        assert recorded.transactions == []
        assert recorded.metric("scope.duration") == []
        assert not SessionScopeInstrumentor().is_instrumented_by_opentelemetry

    async def test_turned_off_ends_what_is_open(
        self, recorded: Recorded, transaction: Scopes
    ) -> None:
        scope = transaction()
        with recorded.tracer.start_as_current_span("request") as request:
            async with scope:
                await scope.commit()
                SessionScopeInstrumentor().uninstrument()
                await Coin().insert()

        first, last = recorded.transactions
        assert about(first)["outcome"] == "committed"
        assert about(last) == {"db.system.name": "mongodb", "propagation": "required"}
        assert recorded.under(_readable(request))[:3] == ["transaction", "transaction", "insert"]
        assert recorded.metric("active_scopes") == [({}, 0)]

    async def test_turned_off_ends_what_waits_for_another_attempt(
        self, recorded: Recorded, client: Any, fail_point: FailPoint
    ) -> None:
        with fail_point("insert", error_code=112, labels=[TRANSIENT], times=1):
            async for attempt in transaction_attempts(client, [Coin]):
                async with attempt:
                    await Coin().insert()
                SessionScopeInstrumentor().uninstrument()

        assert _ended(recorded.transaction) == ("aborted", WRITE_CONFLICT)

    async def test_turned_on_in_a_block_begins_with_the_next_one(
        self, recorded: Recorded, transaction: Scopes, fail_point: FailPoint
    ) -> None:
        SessionScopeInstrumentor().uninstrument()
        scope = transaction()
        async with scope:
            SessionScopeInstrumentor().instrument(recorded.tracers, recorded.meters)
            await Coin().insert()
            with fail_point("commitTransaction", error_code=24, labels=[UNKNOWN], times=1):
                await scope.commit()

        assert recorded.transactions == []
        assert recorded.metric("active_scopes") == []

    async def test_refuses_what_is_no_provider(self, recorded: Recorded) -> None:
        SessionScopeInstrumentor().uninstrument()

        with pytest.raises(TypeError, match="tracer_provider must be an OpenTelemetry Tracer"):
            SessionScopeInstrumentor().instrument("jaeger")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="meter_provider must be an OpenTelemetry Meter"):
            SessionScopeInstrumentor().instrument(None, recorded.tracers)  # type: ignore[arg-type]
        assert OBSERVERS == []

    async def test_does_without_an_sdk(self, recorded: Recorded, transaction: Scopes) -> None:
        SessionScopeInstrumentor().uninstrument()
        SessionScopeInstrumentor().instrument(trace.NoOpTracerProvider())
        with recorded.tracer.start_as_current_span("request") as request:
            async with transaction():
                await Coin().insert()

        assert recorded.under(_readable(request)) == ["insert", "commitTransaction"]

    def test_is_what_the_opentelemetry_instrument_command_calls(self) -> None:
        SessionScopeInstrumentor().instrument(skip_dep_check=True)
        try:
            assert SessionScopeInstrumentor().is_instrumented_by_opentelemetry
        finally:
            SessionScopeInstrumentor().uninstrument()


class TestTheImport:
    def test_of_the_package_does_not_import_opentelemetry(self) -> None:
        assert _python(
            "import beanie_session_scope, sys; print('opentelemetry' in sys.modules)"
        ) == ("False\n")

    def test_without_opentelemetry_says_what_to_install(self) -> None:
        code = (
            "import sys; sys.modules['opentelemetry'] = None\n"
            "try:\n    import beanie_session_scope.telemetry\n"
            "except ImportError as error:\n    print(error)"
        )
        assert "pip install 'beanie_session_scope[otel]'" in _python(code)


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def _readable(span: trace.Span) -> ReadableSpan:
    assert isinstance(span, ReadableSpan)
    return span


def _ended(span: ReadableSpan) -> tuple[Any, dict[str, Any] | None]:
    """Return the outcome, and what is said about an error where the status is one."""
    own = ("db.system.name", "propagation", "outcome", "operations", "attempts")
    failure = {name: value for name, value in about(span).items() if name not in own}
    is_error = span.status.status_code is StatusCode.ERROR
    assert is_error or failure == {}
    assert span.status.description is None
    return about(span).get("outcome"), failure if is_error else None
