"""The three forms that run a transaction again, as their users see them."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio
from beanie import init_beanie
from forms import FORMS, Form
from models import Holder, Item, Linked, Plain
from pymongo import MongoClient
from pymongo.errors import DuplicateKeyError, OperationFailure, PyMongoError
from specification import TRANSIENT, labelled
from wire import APP_NAME, DATABASE, FailPoint, Wire, names, open_transactions

from beanie_session_scope import (
    ClientMismatchError,
    HookError,
    ModelNotScopedError,
    NotAClientError,
    PropagationError,
    Rollback,
    ScopeReusedError,
    ScopeState,
    SessionScopeError,
    TransactionAbortedError,
    TransactionExpiredError,
    TransactionTimeoutError,
    UnexpectedRollbackError,
    current_scope,
    on_abort,
    on_commit,
    run_in_transaction,
    transaction_attempts,
    with_session,
)
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.testing import ReplicaSet


class Conflicts:
    """Lets the first calls of something fail as if they had lost a conflict.

    Attributes:
        calls: How often it was called.
    """

    def __init__(self, times: int = 2) -> None:
        self.calls = 0
        self._times = times

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self._times:
            raise labelled(TRANSIENT)


class Late:
    """A clock that is past the limit from the second time on that it is asked."""

    def __init__(self) -> None:
        self._now = iter([0.0])

    def __call__(self) -> float:
        return next(self._now, 1_000.0)


async def stored(database: Any, document: Any) -> Any:
    """Return the field ``n`` of a document, as the server has it."""
    found = await database[document.get_settings().name].find_one({"_id": document.id})
    return None if found is None else found["n"]


async def close(client: Any) -> None:
    closing = client.close()
    if inspect.isawaitable(closing):
        await closing


async def raise_together(*errors: Exception) -> None:
    """Raise errors in tasks, as a group."""

    async def child(error: Exception) -> None:
        raise error

    async with asyncio.TaskGroup() as group:
        for error in errors:
            group.create_task(child(error))


@pytest_asyncio.fixture
async def other(server_uri: str) -> AsyncIterator[Any]:
    """Another client of the same server, on which no class is initialised."""
    client = DRIVER.client_class(server_uri, appname=APP_NAME)
    yield client
    await close(client)


@pytest.mark.parametrize("form", FORMS)
class TestTheResult:
    async def test_is_that_of_the_last_call(self, client: Any, database: Any, form: Form) -> None:
        conflict = Conflicts()

        async def work(first: str, second: str) -> tuple[str, str, int]:
            await Item(name=first).insert()
            conflict()
            return first, second, conflict.calls

        assert await form(work, "a", "b") == ("a", "b", 3)
        assert await database["item"].count_documents({}) == 1

    async def test_is_none_after_a_rollback(self, client: Any, database: Any, form: Form) -> None:
        conflict = Conflicts()

        async def work() -> None:
            await Item().insert()
            conflict()
            raise Rollback

        assert await form(work) is None
        assert conflict.calls == 3
        assert await database["item"].count_documents({}) == 0

    async def test_is_not_that_of_an_attempt_whose_commit_failed(
        self, client: Any, form: Form, fail_point: FailPoint
    ) -> None:
        conflict = Conflicts(times=0)

        async def work() -> str:
            await Item().insert()
            conflict()
            if conflict.calls == 2:
                raise Rollback
            return "not committed"

        with fail_point("commitTransaction", error_code=112, times=1):
            assert await form(work) is None
        assert conflict.calls == 2


class TestDocuments:
    """What is passed in, or tracked, is rewound whole before each new attempt."""

    @pytest.mark.parametrize("failing", ["callback", "insert", "commitTransaction"])
    @pytest.mark.parametrize("form", FORMS[:2])
    async def test_that_are_arguments_are_changed_once(
        self, client: Any, database: Any, form: Form, fail_point: FailPoint, failing: str
    ) -> None:
        conflict = Conflicts(times=2 if failing == "callback" else 0)

        async def work(document: Item) -> None:
            conflict()
            document.n += 1
            document.name += "!"
            await document.save()
            await Item().insert()

        document = await Item().insert()
        with fail_point(failing, error_code=112, times=2):
            await form(work, document)
        assert conflict.calls == 3
        assert (document.n, document.name) == (1, "new!")
        assert await stored(database, document) == 1

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda document: [document],
            lambda document: (1, document),
            lambda document: {"item": document},
            lambda document: [{"items": [document]}],
        ],
        ids=["list", "tuple", "dict", "nested"],
    )
    @pytest.mark.parametrize("form", FORMS[:2])
    async def test_are_found_in_containers(
        self, client: Any, database: Any, form: Form, wrap: Callable[[Item], Any]
    ) -> None:
        conflict = Conflicts()
        document = await Item().insert()

        async def work(_: Any) -> None:
            document.n += 1
            await document.save()
            conflict()

        await form(work, wrap(document))
        assert (conflict.calls, document.n, await stored(database, document)) == (3, 1, 1)

    async def test_that_are_tracked_are_changed_once(self, client: Any, database: Any) -> None:
        conflict = Conflicts()
        document = await Item().insert()
        async for attempt in transaction_attempts(collections=[Item]):
            async with attempt:
                attempt.track(document)
                document.n += 1
                await document.save()
                conflict()
        assert (conflict.calls, document.n, await stored(database, document)) == (3, 1, 1)

    @pytest.mark.parametrize("form", FORMS[:2])
    async def test_that_are_linked_from_those_are_changed_once(
        self, client: Any, database: Any, form: Form
    ) -> None:
        conflict = Conflicts()
        linked = await Linked().insert()
        holder = await Holder(one=linked).insert()  # type: ignore[arg-type]

        async def work(holder: Holder) -> None:
            holder.one.n += 1  # type: ignore[union-attr]
            await holder.one.save()  # type: ignore[union-attr]
            conflict()

        await form(work, holder, collections=[Holder])
        assert (conflict.calls, linked.n, await stored(database, linked)) == (3, 1, 1)

    @pytest.mark.parametrize("form", FORMS[:2])
    async def test_are_rewound_where_the_callback_ended_the_transaction_itself(
        self, client: Any, database: Any, form: Form, fail_point: FailPoint
    ) -> None:
        calls = []

        async def work(document: Item) -> None:
            calls.append(document.n)
            document.n += 1
            await document.save()
            await Item.get_session().commit_transaction()

        document = await Item().insert()
        with fail_point("commitTransaction", error_code=112, times=2):
            await form(work, document)
        assert calls == [0, 0, 0]
        assert (document.n, await stored(database, document)) == (1, 1)

    @pytest.mark.parametrize("form", FORMS[:2])
    async def test_are_what_they_were_when_the_last_attempt_has_failed(
        self, client: Any, database: Any, form: Form
    ) -> None:
        async def work(document: Item) -> None:
            document.n += 1
            await document.save()
            raise labelled(TRANSIENT)

        document = await Item().insert()
        with pytest.raises(TransactionTimeoutError):
            await form(work, document, clock=Late())
        assert (document.n, await stored(database, document)) == (0, 0)

    @pytest.mark.parametrize("form", FORMS[:2])
    async def test_of_a_joined_form_are_rewound_by_the_owner(
        self, client: Any, database: Any, form: Form
    ) -> None:
        conflict = Conflicts()

        async def add(document: Item) -> None:
            document.n += 1
            await document.save()
            conflict()

        document = await Item().insert()
        async for attempt in transaction_attempts(collections=[Item]):
            async with attempt:
                await form(add, document)
        assert (conflict.calls, document.n, await stored(database, document)) == (3, 1, 1)


@pytest.mark.parametrize("form", FORMS)
class TestInsideAnOpenScope:
    async def test_joins_it(self, client: Any, wire: Wire, form: Form) -> None:
        async def work() -> Any:
            await Item().insert()
            return Item.get_session()

        with wire.record() as seen:
            async with with_session(collections=[Item]) as session:
                assert await form(work) is session
                assert await form(work) is session
        assert names(seen) == ["insert", "insert", "commitTransaction"]

    @pytest.mark.parametrize("late", [False, True])
    async def test_retries_nothing_and_changes_no_error(
        self, client: Any, form: Form, late: bool
    ) -> None:
        conflict, raised = Conflicts(times=0), labelled(TRANSIENT)

        async def work() -> None:
            conflict()
            raise raised

        with pytest.raises(PyMongoError) as caught:
            async with with_session(collections=[Item]):
                await form(work, **({"clock": Late()} if late else {}))
        assert caught.value is raised
        assert conflict.calls == 1

    async def test_is_retried_by_the_owner(self, client: Any, database: Any, form: Form) -> None:
        inner, outer = Conflicts(), Conflicts(times=0)

        async def work() -> None:
            await Item().insert()
            inner()

        async def owner() -> None:
            outer()
            await Item().insert()
            await form(work)

        await form(owner)
        assert (inner.calls, outer.calls) == (3, 3)
        assert await database["item"].count_documents({}) == 2

    async def test_is_retried_by_the_owner_though_that_one_has_caught_the_error(
        self, client: Any, database: Any, form: Form, fail_point: FailPoint
    ) -> None:
        outer = Conflicts(times=0)

        async def owner() -> None:
            outer()
            try:
                await form(Item().insert)
            except OperationFailure:
                await asyncio.sleep(0)

        with fail_point("insert", error_code=112, times=1):
            await form(owner)
        assert outer.calls == 2
        assert await database["item"].count_documents({}) == 1

    async def test_rolls_all_of_it_back_quietly(
        self, client: Any, database: Any, form: Form
    ) -> None:
        async def work() -> None:
            await Item().insert()
            raise Rollback

        async def owner() -> str:
            await Item().insert()
            await form(work)
            return "went on"

        assert await form(owner) is None
        assert await database["item"].count_documents({}) == 0

    async def test_asks_what_propagation_says(self, client: Any, form: Form) -> None:
        async def work() -> None:
            pytest.fail("the body ran")

        with pytest.raises(PropagationError, match="mandatory"):
            await form(work, propagation="mandatory")
        async with with_session(collections=[Item]):
            with pytest.raises(PropagationError, match="never"):
                await form(work, propagation="never")


@pytest.mark.parametrize("form", FORMS)
class TestAnIndependentTransactionInside:
    """Its outcome is settled: what its labels say is no reason to run the outer one again."""

    async def test_that_is_not_retried_does_not_make_the_outer_one_retry(
        self, client: Any, form: Form, fail_point: FailPoint
    ) -> None:
        outer = Conflicts(times=0)

        async def owner() -> None:
            outer()
            async with with_session(collections=[Item], propagation="requires_new"):
                await Item().insert()

        with fail_point("insert", error_code=112, times=9):
            with pytest.raises(OperationFailure) as caught:
                await form(owner)
        assert caught.value.has_error_label(TRANSIENT)
        assert outer.calls == 1

    async def test_that_ran_out_of_time_does_not_make_the_outer_one_retry(
        self, client: Any, form: Form
    ) -> None:
        inner, outer = Conflicts(times=9), Conflicts(times=0)

        async def work() -> None:
            inner()

        async def owner() -> None:
            outer()
            await form(work, propagation="requires_new", clock=Late())

        with pytest.raises(TransactionTimeoutError) as caught:
            await form(owner)
        assert caught.value.has_error_label(TRANSIENT)
        assert (inner.calls, outer.calls) == (1, 1)

    async def test_of_a_child_task_does_not_make_the_outer_one_retry(
        self, client: Any, form: Form
    ) -> None:
        inner, outer = Conflicts(times=9), Conflicts(times=0)

        async def work() -> None:
            inner()

        async def owner() -> None:
            outer()
            child = form(work, propagation="requires_new", clock=Late())
            await asyncio.gather(asyncio.ensure_future(child))

        with pytest.raises(TransactionTimeoutError):
            await form(owner)
        assert (inner.calls, outer.calls) == (1, 1)

    async def test_on_another_client_does_not_make_the_outer_one_retry(
        self, client: Any, other: Any, form: Form
    ) -> None:
        outer = Conflicts(times=0)

        async def owner() -> None:
            outer()
            async with with_session(client=other, collections=[]):
                raise labelled(TRANSIENT)

        with pytest.raises(PyMongoError):
            await form(owner)
        assert outer.calls == 1

    async def test_is_retried_by_itself(self, client: Any, database: Any, form: Form) -> None:
        inner, outer = Conflicts(), Conflicts(times=0)

        async def work() -> None:
            await Item(name="inner").insert()
            inner()

        async def owner() -> None:
            outer()
            await Item(name="outer").insert()
            await form(work, propagation="requires_new")

        await form(owner)
        assert (inner.calls, outer.calls) == (3, 1)
        assert sorted(await database["item"].distinct("name")) == ["inner", "outer"]

    async def test_that_failed_leaves_the_outer_one_its_own_retries(
        self, client: Any, database: Any, form: Form
    ) -> None:
        outer = Conflicts()

        async def owner() -> None:
            await Item().insert()
            with pytest.raises(PyMongoError):
                async with with_session(collections=[Item], propagation="requires_new"):
                    raise labelled(TRANSIENT)
            outer()

        await form(owner)
        assert outer.calls == 3
        assert await database["item"].count_documents({}) == 1


@pytest.mark.parametrize("form", FORMS)
class TestGroupsOfErrors:
    """As a ``TaskGroup`` raises them, which came with Python 3.11."""

    async def test_that_are_all_transient_are_retried(
        self, client: Any, database: Any, form: Form, fail_point: FailPoint
    ) -> None:
        if sys.version_info < (3, 11):
            return
        conflict = Conflicts(times=0)

        async def work() -> None:
            conflict()
            async with asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(Item().insert())

        with fail_point("insert", error_code=112, times=2):
            await form(work)
        assert conflict.calls == 3
        assert await database["item"].count_documents({}) == 3

    async def test_with_another_error_among_them_are_not(self, client: Any, form: Form) -> None:
        if sys.version_info < (3, 11):
            return
        conflict = Conflicts(times=0)

        async def work() -> None:
            conflict()
            await raise_together(labelled(TRANSIENT), KeyError())

        with pytest.raises(Exception, match="TaskGroup"):
            await form(work)
        assert conflict.calls == 1

    async def test_keep_their_labels_when_time_is_up(self, client: Any, form: Form) -> None:
        if sys.version_info < (3, 11):
            return

        async def work() -> None:
            await raise_together(labelled(TRANSIENT), labelled(TRANSIENT))

        with pytest.raises(TransactionTimeoutError) as caught:
            await form(work, clock=Late())
        assert "TaskGroup" in str(caught.value.__cause__)
        assert caught.value.has_error_label(TRANSIENT)
        assert not caught.value.has_error_label("another")


@pytest.mark.parametrize("form", FORMS)
class TestHooks:
    async def test_of_an_attempt_that_is_retried_are_dropped(self, client: Any, form: Form) -> None:
        conflict = Conflicts()
        ran = []

        async def work() -> None:
            number = conflict.calls + 1
            await Item().insert()
            on_commit(lambda: ran.append(f"commit {number}"))
            on_abort(lambda: ran.append(f"abort {number}"))
            conflict()

        await form(work)
        assert ran == ["commit 3"]

    async def test_of_an_attempt_whose_commit_failed_are_dropped(
        self, client: Any, form: Form, fail_point: FailPoint
    ) -> None:
        conflict = Conflicts(times=0)
        ran = []

        async def work() -> None:
            conflict()
            number = conflict.calls
            on_commit(lambda: ran.append(f"commit {number}"))
            on_abort(lambda: ran.append(f"abort {number}"))
            await Item().insert()

        with fail_point("commitTransaction", error_code=112, times=2):
            await form(work)
        assert ran == ["commit 3"]

    async def test_of_the_last_attempt_run_when_it_has_failed(
        self, client: Any, form: Form
    ) -> None:
        conflict = Conflicts()
        ran = []

        async def work() -> None:
            number = conflict.calls + 1
            on_commit(lambda: ran.append(f"commit {number}"))
            on_abort(lambda: ran.append(f"abort {number}"))
            conflict()
            raise KeyError

        with pytest.raises(KeyError):
            await form(work)
        assert ran == ["abort 3"]

    async def test_of_the_last_attempt_run_when_time_is_up(self, client: Any, form: Form) -> None:
        ran = []

        async def work() -> None:
            on_abort(lambda: ran.append("abort"))
            raise labelled(TRANSIENT)

        with pytest.raises(TransactionTimeoutError):
            await form(work, clock=Late())
        assert ran == ["abort"]

    async def test_of_an_attempt_that_is_not_retried_after_all_run(
        self, client: Any, form: Form, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It was the last one: the task is cancelled while it waits for the next."""
        ran = []

        async def work() -> None:
            await Item().insert()
            on_abort(lambda: ran.append("abort"))
            raise labelled(TRANSIENT)

        with caplog.at_level(logging.INFO, "beanie_session_scope"):
            task = asyncio.ensure_future(form(work, jitter=lambda: 1_000.0))
            while "retry" not in {vars(each).get("event") for each in caplog.records}:
                await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ran == ["abort"]

    async def test_of_an_attempt_whose_task_is_cancelled_while_it_ends_run(
        self, client: Any, form: Form, fail_point: FailPoint
    ) -> None:
        ran: list[str] = []
        scopes: list[Any] = []

        async def work() -> None:
            await Item().insert()
            scopes.append(current_scope())
            on_abort(lambda: ran.append("abort"))
            raise labelled(TRANSIENT)

        with fail_point("abortTransaction", block_ms=100, times=1):
            task = asyncio.ensure_future(form(work))
            while not scopes or scopes[0].state is not ScopeState.ABORTING:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert ran == ["abort"]

    async def test_that_fail_after_the_commit_make_nobody_retry(
        self, client: Any, database: Any, form: Form
    ) -> None:
        conflict = Conflicts(times=0)

        def hook() -> None:
            raise labelled(TRANSIENT)

        async def work() -> None:
            conflict()
            on_commit(hook)
            await Item().insert()

        with pytest.raises(HookError) as caught:
            await form(work)
        assert caught.value.committed
        assert conflict.calls == 1
        assert await database["item"].count_documents({}) == 1


class TestHooksBeforeTheCommit:
    async def test_run_in_each_attempt_that_comes_so_far(self, client: Any) -> None:
        conflict = Conflicts()
        ran = []
        async for attempt in transaction_attempts(collections=[Item]):
            async with attempt:
                attempt.before_commit(lambda number=attempt.number: ran.append(number))
                conflict()
        assert ran == [3]

    async def test_may_meet_a_conflict_after_which_the_attempt_is_retried(
        self, client: Any, database: Any
    ) -> None:
        conflict = Conflicts()

        async def hook() -> None:
            await Item().insert()
            conflict()

        async for attempt in transaction_attempts(collections=[Item]):
            async with attempt:
                attempt.before_commit(hook)
        assert conflict.calls == 3
        assert await database["item"].count_documents({}) == 1


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2]])
class TestAGivenSession:
    async def test_is_used_by_each_attempt_and_not_ended(
        self, client: Any, wire: Wire, database: Any, form: Form
    ) -> None:
        conflict = Conflicts()
        session = await DRIVER.start_session(client)

        async def work() -> None:
            assert Item.get_session() is session
            await Item().insert()
            conflict()

        with wire.record() as seen:
            await form(work, session=session)
            await form(work, session=session)
        assert {bytes(e.command["lsid"]["id"]) for e in seen} == {bytes(session.session_id["id"])}
        assert names(seen) == [
            *["insert", "abortTransaction"] * 2,
            *["insert", "commitTransaction"] * 2,
        ]
        assert not session.has_ended and not session.in_transaction
        await session.end_session()

    async def test_in_a_transaction_is_refused_and_left_alone(
        self, client: Any, wire: Wire, form: Form
    ) -> None:
        session = await DRIVER.start_session(client)
        await DRIVER.start_transaction(session)
        with wire.record() as seen, pytest.raises(PropagationError, match="in a transaction"):
            await form(self._fail, session=session)
        assert seen == []
        assert session.in_transaction
        await session.end_session()

    async def test_of_another_client_is_refused(
        self, client: Any, other: Any, wire: Wire, form: Form
    ) -> None:
        session = await DRIVER.start_session(other)
        with wire.record() as seen:
            with pytest.raises(ClientMismatchError, match="session="):
                await form(self._fail, session=session, client=client)
            with pytest.raises(ClientMismatchError, match="Item"):
                await form(self._fail, session=session)
        assert seen == []
        await session.end_session()

    async def test_beside_an_open_scope_is_refused(self, client: Any, form: Form) -> None:
        session = await DRIVER.start_session(client)
        async with with_session(collections=[Item]):
            with pytest.raises(PropagationError, match="session="):
                await form(self._fail, session=session)
        await session.end_session()

    async def test_of_the_open_scope_joins_that_one(
        self, client: Any, wire: Wire, form: Form
    ) -> None:
        async def work() -> None:
            await Item().insert()

        with wire.record() as seen:
            async with with_session(collections=[Item]) as session:
                await form(work, session=session)
        assert names(seen) == ["insert", "commitTransaction"]

    @pytest.mark.parametrize("wanted", [True, False])
    async def test_has_its_causal_consistency_already(
        self, client: Any, form: Form, wanted: bool
    ) -> None:
        """To take the option, and do nothing about it, would be quietly wrong."""
        session = await DRIVER.start_session(client, causal_consistency=not wanted)
        with pytest.raises(ValueError, match="causal_consistency"):
            await form(self._fail, session=session, causal_consistency=wanted)
        await session.end_session()

    async def test_that_is_none_of_the_driver_is_refused(self, client: Any, form: Form) -> None:
        with pytest.raises(NotAClientError, match="session"):
            await form(self._fail, session="session")

    async def _fail(self) -> None:
        pytest.fail("the body ran")


class TestTheLoop:
    async def test_numbers_its_attempts(self, client: Any) -> None:
        conflict = Conflicts()
        numbers = []
        async for attempt in transaction_attempts(collections=[Item]):
            numbers.append(attempt.number)
            async with attempt as session:
                assert Item.get_session() is session
                conflict()
        assert numbers == [1, 2, 3]
        assert attempt.state is ScopeState.COMMITTED

    async def test_refuses_to_go_on_when_an_attempt_was_not_entered(self, client: Any) -> None:
        with pytest.raises(RuntimeError, match="async with attempt"):
            async for _ in transaction_attempts(collections=[Item]):
                pass

    async def test_may_be_left_by_break(self, client: Any, database: Any) -> None:
        async for attempt in transaction_attempts(collections=[Item]):
            async with attempt:
                await Item().insert()
                break
        assert attempt.state is ScopeState.COMMITTED
        assert await database["item"].count_documents({}) == 1

    async def test_may_be_left_by_return(self, client: Any, database: Any) -> None:
        conflict = Conflicts()

        async def work() -> str:
            async for attempt in transaction_attempts(collections=[Item]):
                async with attempt:
                    await Item().insert()
                    conflict()
                    return "done"
            raise AssertionError("not reached")

        assert await work() == "done"
        assert await database["item"].count_documents({}) == 1

    async def test_ends_after_an_attempt_that_continue_has_left(
        self, client: Any, database: Any
    ) -> None:
        async for attempt in transaction_attempts(collections=[Item]):
            async with attempt:
                await Item().insert()
                continue
        assert await database["item"].count_documents({}) == 1

    async def test_enters_each_attempt_once(self, client: Any, database: Any) -> None:
        async for attempt in transaction_attempts(collections=[Item]):
            async with attempt:
                await Item().insert()
            with pytest.raises(ScopeReusedError):
                async with attempt:
                    pytest.fail("the body ran")
        assert await database["item"].count_documents({}) == 1

    async def test_runs_once(self, client: Any) -> None:
        """A second loop over the same attempts would do nothing, and seem to have worked."""
        attempts = transaction_attempts(collections=[Item])
        async for attempt in attempts:
            async with attempt:
                pass
        with pytest.raises(ScopeReusedError):
            async for _ in attempts:
                pytest.fail("the body ran")

    async def test_tells_of_an_attempt_that_it_has_failed(self, client: Any) -> None:
        conflict = Conflicts(times=1)
        states = []
        async for attempt in transaction_attempts(collections=[Item]):
            async with attempt:
                conflict()
            states.append(attempt.state)
        assert states == [ScopeState.ABORTED, ScopeState.COMMITTED]


@pytest.mark.parametrize("form", FORMS)
class TestBadInput:
    """Is refused before anything is sent."""

    @pytest.mark.parametrize(
        ("error", "options"),
        [
            (ValueError, {"transaction": False}),
            (ValueError, {"snapshot": True}),
            (ValueError, {"timeout": 0}),
            (ValueError, {"timeout": -1}),
            (ValueError, {"timeout": float("nan")}),
            (ValueError, {"timeout": None}),
            (ValueError, {"propagation": "nested"}),
            (TypeError, {"no_such_option": 1}),
            (NotAClientError, {"client": 1}),
            (ModelNotScopedError, {"collections": Item}),
            (ModelNotScopedError, {"collections": [Plain]}),
            (ModelNotScopedError, {"collections": "item"}),
            (ModelNotScopedError, {"collections": [1]}),
        ],
        ids=lambda value: None if isinstance(value, type) else repr(value),
    )
    async def test_of_an_option(
        self, client: Any, wire: Wire, form: Form, error: type[Exception], options: dict[str, Any]
    ) -> None:
        async def work() -> None:
            pytest.fail("the body ran")

        with wire.record() as seen, pytest.raises(error):
            await form(work, **options)
        assert seen == []


class TestAFunctionThatIsNone:
    @pytest.mark.parametrize("fn", [None, 1, "work"])
    async def test_is_refused(self, client: Any, wire: Wire, fn: Any) -> None:
        with wire.record() as seen, pytest.raises(TypeError, match="function"):
            await run_in_transaction(fn, collections=[Item])
        assert seen == []

    async def test_is_refused_where_it_is_a_coroutine(self, client: Any) -> None:
        async def work() -> None:
            """Not called by the test, but before it."""

        coroutine = work()
        with pytest.raises(TypeError, match="the function itself"):
            await run_in_transaction(coroutine, collections=[Item])  # type: ignore[arg-type]
        coroutine.close()

    async def test_is_refused_where_it_is_no_coroutine_function(
        self, client: Any, wire: Wire
    ) -> None:
        with wire.record() as seen, pytest.raises(TypeError, match="async def"):
            await run_in_transaction(lambda: 1, collections=[Item])  # type: ignore[arg-type, return-value]
        assert seen == []

    async def test_may_be_any_callable_that_returns_an_awaitable(self, client: Any) -> None:
        async def work(number: int) -> int:
            return number

        assert await run_in_transaction(lambda: work(1), collections=[Item]) == 1


class TestRealConflicts:
    @pytest.mark.parametrize("how", ["inc", "read, modify, write"])
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.timeout(60)
    async def test_lose_no_update(self, client: Any, database: Any, form: Form, how: str) -> None:
        document = await Item().insert()
        calls = Conflicts(times=0)

        async def increment() -> None:
            calls()
            mine = await Item.get(document.id)
            if how == "inc":
                await mine.inc({Item.n: 1})
            else:
                mine.n += 1
                await mine.save()

        await asyncio.gather(*(form(increment) for _ in range(20)))
        assert await stored(database, document) == 20
        assert calls.calls > 20, "there was no conflict"

    @pytest.mark.parametrize("form", FORMS)
    async def test_with_a_transaction_that_is_open_are_retried_until_it_is_over(
        self, client: Any, database: Any, form: Form
    ) -> None:
        document = await Item().insert()
        second_try = asyncio.Event()
        calls = Conflicts(times=0)

        async def increment() -> None:
            calls()
            if calls.calls == 2:
                second_try.set()
            await Item.find_one(Item.id == document.id).inc({Item.n: 1})

        async with with_session(collections=[Item]):
            await Item.find_one(Item.id == document.id).inc({Item.n: 1})
            task = asyncio.ensure_future(form(increment, propagation="requires_new"))
            await second_try.wait()
        await task
        assert await stored(database, document) == 2


@pytest.mark.parametrize("form", FORMS)
class TestAnErrorThatTheBodyCaught:
    async def test_ends_the_attempts_where_it_is_not_transient(
        self, client: Any, wire: Wire, form: Form
    ) -> None:
        """Its commit would be answered with the label that says to run it again, for ever."""
        first = await Item().insert()
        calls = Conflicts(times=0)

        async def work() -> None:
            calls()
            with pytest.raises(DuplicateKeyError):
                await Item(id=first.id).insert()

        with wire.record() as seen, pytest.raises(TransactionAbortedError) as caught:
            await form(work)
        assert isinstance(caught.value.__cause__, DuplicateKeyError)
        assert not caught.value.has_error_label(TRANSIENT)
        assert calls.calls == 1
        assert names(seen) == ["insert", "abortTransaction"]

    async def test_ends_the_attempts_where_the_body_goes_on(self, client: Any, form: Form) -> None:
        first = await Item().insert()
        calls = Conflicts(times=0)

        async def work() -> None:
            calls()
            with pytest.raises(DuplicateKeyError):
                await Item(id=first.id).insert()
            await Item().insert()

        with pytest.raises(TransactionAbortedError):
            await form(work)
        assert calls.calls == 1


@pytest.mark.parametrize("form", FORMS)
class TestACommitInTheBody:
    async def test_is_not_done_again(self, client: Any, database: Any, form: Form) -> None:
        """To run the whole body again would apply a second time what is stored already."""
        conflict = Conflicts()

        async def work() -> None:
            scope = current_scope()
            assert scope is not None
            await Item(name="committed").insert()
            await scope.commit()
            await Item().insert()
            conflict()

        with pytest.raises((PyMongoError, SessionScopeError)):
            await form(work)
        assert await database["item"].count_documents({"name": "committed"}) <= 1


@pytest.mark.parametrize("form", FORMS)
class TestAScopeThatIsRollbackOnly:
    async def test_is_not_retried(self, client: Any, database: Any, form: Form) -> None:
        calls = Conflicts(times=0)

        async def work() -> None:
            calls()
            await Item().insert()
            scope = current_scope()
            assert scope is not None
            scope.set_rollback_only("the test says so")

        with pytest.raises(UnexpectedRollbackError, match="the test says so"):
            await form(work)
        assert calls.calls == 1
        assert await database["item"].count_documents({}) == 0


class TestATransactionThatLivedTooLong:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("command", ["insert", "commitTransaction"])
    async def test_is_not_retried_where_the_server_says_so(
        self, client: Any, form: Form, fail_point: FailPoint, command: str
    ) -> None:
        calls = Conflicts(times=0)

        async def work() -> None:
            calls()
            await Item().insert()

        with fail_point(command, error_code=290, labels=[TRANSIENT], times=2):
            with pytest.raises(TransactionExpiredError) as caught:
                await form(work)
        assert calls.calls == 1
        assert caught.value.has_error_label(TRANSIENT)

    @pytest.mark.parametrize("form", FORMS)
    async def test_is_not_retried_where_the_body_wraps_the_error(
        self, client: Any, form: Form, fail_point: FailPoint
    ) -> None:
        calls = Conflicts(times=0)

        async def work() -> None:
            calls()
            try:
                await Item().insert()
            except TransactionExpiredError as error:
                raise labelled(TRANSIENT) from error

        with fail_point("insert", error_code=290, labels=[TRANSIENT], times=2):
            with pytest.raises(PyMongoError):
                await form(work)
        assert calls.calls == 1


@pytest.fixture(scope="module")
def short_uri() -> Iterator[str]:
    """A server that ends a transaction after one second."""
    with ReplicaSet(set_parameters={"transactionLifetimeLimitSeconds": 1}) as replica_set:
        with MongoClient[Any](replica_set.uri) as admin:
            admin[DATABASE].create_collection("item")
        yield replica_set.uri


@pytest.mark.starts_servers
@pytest.mark.timeout(60)
class TestAServerWithAShortLimit:
    """Its answer carries the label of a lost conflict."""

    @pytest.mark.parametrize(
        ("form", "at"), [(FORMS[0], "operation"), (FORMS[1], "commit"), (FORMS[2], "commit")]
    )
    async def test_warns_then_raises_and_is_not_asked_again(
        self, short_uri: str, caplog: pytest.LogCaptureFixture, form: Form, at: str
    ) -> None:
        calls = Conflicts(times=0)
        client = DRIVER.client_class(short_uri, appname=APP_NAME)
        await init_beanie(database=client[DATABASE], document_models=[Item])

        async def work() -> None:
            calls()
            await Item().insert()
            await self._ended(short_uri)
            warned.extend(self._warnings(caplog))
            if at == "operation":
                await Item().insert()

        warned: list[Any] = []
        with caplog.at_level(logging.DEBUG, "beanie_session_scope"):
            with pytest.raises(TransactionExpiredError, match="outlived") as caught:
                await form(work)
        assert calls.calls == 1
        assert isinstance(caught.value.__cause__, OperationFailure)
        assert caught.value.__cause__.code == 251
        assert caught.value.has_error_label(TRANSIENT)
        (warning,) = warned
        assert (warning.levelno, warning.limit) == (logging.WARNING, 1.0)
        assert warning.duration >= 0.75
        await close(client)

    async def _ended(self, uri: str) -> None:
        end = time.monotonic() + 20
        while await asyncio.to_thread(open_transactions, uri):
            assert time.monotonic() < end, "the server has not ended the transaction"
            await asyncio.sleep(0.1)

    def _warnings(self, caplog: pytest.LogCaptureFixture) -> list[Any]:
        records = caplog.records
        return [each for each in records if vars(each).get("event") == "transaction.expiring"]
