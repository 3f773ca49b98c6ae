"""Hooks that fail, and where and when hooks can be registered."""

from __future__ import annotations

import asyncio
import logging
import pickle
from typing import Any

import pytest
from hook_calls import Calls
from labels import TRANSIENT
from models import Item, scope_of, stored
from pymongo.errors import OperationFailure

from beanie_session_scope import (
    HookError,
    PropagationError,
    Rollback,
    ScopeClosedError,
    ScopeState,
    SessionScope,
    UnexpectedRollbackError,
    bind_session,
    on_abort,
    on_commit,
    outside_session,
    run_in_transaction,
)
from beanie_session_scope.drivers import DRIVER


class TestAHookThatFails:
    async def test_after_the_commit_says_that_it_was_committed(
        self, client: Any, database: Any, calls: Calls
    ) -> None:
        first, second = KeyError("secret"), ValueError("secret")
        with pytest.raises(HookError, match="was committed") as caught:
            async with (scope := scope_of(client)):
                scope.on_commit(calls.hook("1", first))
                scope.on_commit(calls.async_hook("2", second))
                scope.on_commit(calls.hook("3"))
                await Item(name="a").insert()
        error = caught.value
        assert calls == ["1", "2", "3"]
        assert (error.committed, error.errors) == (True, [first, second])
        assert error.__cause__ is first
        assert "2 of its 3 on_commit hooks failed: KeyError, ValueError" in str(error)
        assert "secret" not in str(error)
        assert scope.state is ScopeState.COMMITTED
        assert await stored(database) == ["a"]

    async def test_after_a_quiet_abort_says_that_it_was_aborted(
        self, client: Any, database: Any, calls: Calls
    ) -> None:
        with pytest.raises(HookError, match="was aborted") as caught:
            async with (scope := scope_of(client)):
                scope.on_abort(calls.hook("1", KeyError()))
                scope.on_abort(calls.hook("2"))
                await Item().insert()
                raise Rollback
        assert calls == ["1", "2"]
        assert caught.value.committed is False
        assert await stored(database) == []

    async def test_does_not_hide_the_exception_that_left_the_block(
        self, client: Any, calls: Calls, caplog: pytest.LogCaptureFixture
    ) -> None:
        mine = ValueError("mine")
        with pytest.raises(ValueError, match="mine") as caught:
            async with (scope := scope_of(client)):
                scope.on_abort(calls.hook("1", KeyError("secret")))
                scope.on_abort(calls.hook("2"))
                raise mine
        assert caught.value is mine
        assert calls == ["1", "2"]
        (record,) = (each for each in caplog.records if each.levelno == logging.ERROR)
        assert (record.event, record.errors) == ("hooks.failed", 1)  # type: ignore[attr-defined]
        assert "KeyError" in caplog.text
        assert "secret" not in caplog.text

    async def test_does_not_hide_what_leaving_normally_raises(
        self, client: Any, calls: Calls
    ) -> None:
        with pytest.raises(UnexpectedRollbackError):
            async with (scope := scope_of(client)):
                scope.on_abort(calls.hook("1", KeyError()))
                scope.set_rollback_only("no good")
        assert calls == ["1"]

    async def test_with_a_label_of_the_driver_does_not_make_it_run_again(
        self, client: Any, database: Any, calls: Calls
    ) -> None:
        transient = OperationFailure("conflict", 112)
        transient._add_error_label(TRANSIENT)

        async def work() -> None:
            on_commit(calls.hook("commit", transient))
            await Item(name="a").insert()

        with pytest.raises(HookError) as caught:
            await run_in_transaction(work, client=client, collections=[Item])
        assert not caught.value.has_error_label(TRANSIENT)
        assert calls == ["commit"]
        assert await stored(database) == ["a"]

    async def test_with_a_label_inside_an_outer_attempt_does_not_make_that_run_again(
        self, client: Any, database: Any, calls: Calls
    ) -> None:
        transient = OperationFailure("conflict", 112)
        transient._add_error_label(TRANSIENT)

        async def work() -> None:
            calls.append("attempt")
            async with (inner := scope_of(client, propagation="requires_new")):
                inner.on_commit(calls.hook("commit", transient))

        with pytest.raises(HookError):
            await run_in_transaction(work, client=client, collections=[Item])
        assert calls == ["attempt", "commit"]

    async def test_after_a_commit_in_the_block_leaves_the_scope_open(
        self, client: Any, database: Any, calls: Calls
    ) -> None:
        async with (scope := scope_of(client)):
            scope.on_commit(calls.hook("1", KeyError()))
            await Item(name="a").insert()
            with pytest.raises(HookError) as caught:
                await scope.commit()
            assert caught.value.committed
            assert scope.state is ScopeState.OPEN
            await Item(name="b").insert()
        assert await stored(database) == ["a", "b"]

    async def test_by_a_cancellation_of_its_own_does_not_stop_the_others(
        self, client: Any, calls: Calls
    ) -> None:
        with pytest.raises(HookError) as caught:
            async with (scope := scope_of(client)):
                scope.on_commit(calls.async_hook("1", asyncio.CancelledError()))
                scope.on_commit(calls.hook("2"))
        assert calls == ["1", "2"]
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)


class TestRegisteringOnAScope:
    @pytest.mark.parametrize("name", ["before_commit", "on_commit", "on_abort"])
    @pytest.mark.parametrize("bad", [None, "text", 5])
    async def test_takes_functions_only(self, client: Any, name: str, bad: Any) -> None:
        async with (scope := scope_of(client)):
            with pytest.raises(TypeError, match="function"):
                getattr(scope, name)(bad)

    async def test_takes_no_coroutine(self, client: Any, calls: Calls) -> None:
        coroutine = calls.async_hook("never")()
        async with (scope := scope_of(client)):
            with pytest.raises(TypeError, match="pass the function itself"):
                scope.on_commit(coroutine)
        coroutine.close()

    @pytest.mark.parametrize("name", ["on_commit", "on_abort"])
    async def test_is_refused_before_the_block_and_after_it(
        self, client: Any, calls: Calls, name: str
    ) -> None:
        scope: SessionScope = scope_of(client)
        with pytest.raises(ScopeClosedError):
            getattr(scope, name)(calls.hook("too early"))
        async with scope:
            pass
        with pytest.raises(ScopeClosedError):
            getattr(scope, name)(calls.hook("too late"))
        assert calls == []

    async def test_without_a_transaction_runs_on_commit_at_once(
        self, client: Any, calls: Calls
    ) -> None:
        async with (scope := scope_of(client, transaction=False)):
            scope.on_commit(calls.hook("sync"))
            assert calls == ["sync"]
            await scope.on_commit(calls.async_hook("async"))
            scope.on_abort(calls.hook("never"))
            with pytest.raises(TypeError):
                scope.on_abort(None)  # type: ignore[arg-type]
        assert calls == ["sync", "async"]

    async def test_may_be_awaited_where_it_only_registers(self, client: Any, calls: Calls) -> None:
        async with (scope := scope_of(client)):
            await scope.on_commit(calls.async_hook("hook"))
            assert calls == []
        assert calls == ["hook"]


class TestTheFunctionsOfTheModule:
    async def test_without_a_scope_run_on_commit_at_once(self, calls: Calls) -> None:
        on_commit(calls.hook("sync"))
        assert calls == ["sync"]
        running = on_commit(calls.async_hook("async"))
        await running
        assert calls == ["sync", "async"]

    async def test_without_a_scope_run_an_async_on_commit_though_nobody_awaits_it(
        self, calls: Calls
    ) -> None:
        on_commit(calls.async_hook("async"))
        while not calls:
            await asyncio.sleep(0)

    async def test_without_a_scope_may_be_awaited_for_a_plain_function(self, calls: Calls) -> None:
        await on_commit(calls.hook("sync"))
        assert calls == ["sync"]

    async def test_without_a_scope_raise_what_the_hook_raises(
        self, calls: Calls, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(KeyError):
            on_commit(calls.hook("sync", KeyError()))
        with pytest.raises(ValueError, match="secret"):
            await on_commit(calls.async_hook("async", ValueError("secret")))
        assert "secret" not in caplog.text

    async def test_without_a_scope_do_not_run_on_abort(self, calls: Calls) -> None:
        on_abort(calls.hook("never"))
        await asyncio.sleep(0)
        assert calls == []

    async def test_outside_any_scope_on_purpose_run_at_once(
        self, client: Any, calls: Calls
    ) -> None:
        async with scope_of(client):
            with outside_session():
                on_commit(calls.hook("outside"))
            assert calls == ["outside"]

    async def test_without_a_transaction_run_on_commit_at_once(
        self, client: Any, calls: Calls
    ) -> None:
        async with scope_of(client, transaction=False):
            on_commit(calls.hook("commit"))
            on_abort(calls.hook("never"))
            assert calls == ["commit"]
        assert calls == ["commit"]

    async def test_register_with_the_innermost_scope(self, client: Any, calls: Calls) -> None:
        async with scope_of(client):
            on_commit(calls.hook("outer"))
            async with scope_of(client, propagation="requires_new"):
                on_commit(calls.hook("inner"))
                on_abort(calls.hook("never"))
            assert calls == ["inner"]
        assert calls == ["inner", "outer"]

    async def test_in_a_hook_run_at_once(self, client: Any, calls: Calls) -> None:
        async with (scope := scope_of(client)):
            scope.on_commit(lambda: on_commit(calls.hook("nested")) and None)
            scope.on_commit(calls.hook("next"))
        assert calls == ["nested", "next"]

    async def test_register_from_a_child_task(self, client: Any, calls: Calls) -> None:
        async def child() -> None:
            on_commit(calls.hook("child"))

        async with scope_of(client):
            await asyncio.ensure_future(child())
            assert calls == []
        assert calls == ["child"]

    async def test_in_a_transaction_of_somebody_else_are_refused(
        self, client: Any, calls: Calls
    ) -> None:
        session = await DRIVER.start_session(client)
        with bind_session(session, collections=[Item]):
            on_commit(calls.hook("plain session"))
            assert calls == ["plain session"]
            await DRIVER.start_transaction(session)
            for register in (on_commit, on_abort):
                with pytest.raises(PropagationError, match="somebody else"):
                    register(calls.hook("never"))
            await session.abort_transaction()
        await session.end_session()
        assert calls == ["plain session"]

    @pytest.mark.parametrize("register", [on_commit, on_abort])
    @pytest.mark.parametrize("inside", [True, False])
    async def test_take_functions_only(self, client: Any, register: Any, inside: bool) -> None:
        if inside:
            async with scope_of(client):
                with pytest.raises(TypeError, match="function"):
                    register("text")
        else:
            with pytest.raises(TypeError, match="function"):
                register("text")

    async def test_in_a_task_that_outlives_its_scope_do_not_take_an_abort_for_a_commit(
        self, client: Any, calls: Calls
    ) -> None:
        """The task's own operations are refused, too: its scope is over."""

        async def late() -> None:
            await over.wait()
            on_commit(calls.hook("never"))

        over = asyncio.Event()
        async with scope_of(client):
            task = asyncio.ensure_future(late())
            await asyncio.sleep(0)
            raise Rollback
        over.set()
        with pytest.raises(ScopeClosedError):
            await task
        assert calls == []


def test_a_hook_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(HookError("A hook failed.", True, [KeyError("mail")])))

    assert error.committed
    assert str(error).startswith("A hook failed.\n")
    assert isinstance(error.errors[0], KeyError)
