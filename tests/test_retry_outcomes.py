"""What comes after an attempt: another one, or the end of them all, and the hooks that then run."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from beanie import init_beanie
from clients import close
from conflicts import Conflicts, Late
from forms import FORMS, Form
from labels import TRANSIENT, labelled
from models import Item, stored_n
from pymongo import MongoClient
from pymongo.errors import DuplicateKeyError, OperationFailure, PyMongoError
from wire import APP_NAME, DATABASE, FailPoint, Wire, names, open_transactions

from beanie_session_scope import (
    HookError,
    ScopeState,
    SessionScopeError,
    TransactionAbortedError,
    TransactionExpiredError,
    TransactionTimeoutError,
    UnexpectedRollbackError,
    current_scope,
    on_abort,
    on_commit,
    transaction_attempts,
    with_session,
)
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.testing import ReplicaSet


async def raise_together(*errors: Exception) -> None:
    """Raise errors in tasks, as a group."""

    async def child(error: Exception) -> None:
        raise error

    async with asyncio.TaskGroup() as group:
        for error in errors:
            group.create_task(child(error))


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
        self, client: Any, other_client: Any, form: Form
    ) -> None:
        outer = Conflicts(times=0)

        async def owner() -> None:
            outer()
            async with with_session(client=other_client, collections=[]):
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
        assert await stored_n(database, document) == 20
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
        assert await stored_n(database, document) == 2


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
