"""Hooks: before the commit inside the transaction, and after the outcome outside of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hook_calls import Calls
from labels import UNKNOWN
from models import Item, scope_of, stored
from pymongo.errors import OperationFailure
from wire import FailPoint, Wire, names, open_transactions

from beanie_session_scope import (
    CommitUnknownError,
    PropagationError,
    Rollback,
    ScopeClosedError,
    ScopeState,
    UnexpectedRollbackError,
    current_scope,
    on_abort,
    on_commit,
    run_in_transaction,
    transaction_attempts,
)


class TestBeforeCommit:
    async def test_runs_in_order_inside_the_transaction(
        self, client: Any, wire: Wire, database: Any, calls: Calls
    ) -> None:
        async def write() -> None:
            calls.append("second")
            await Item(name="by the hook").insert()
            assert await Item.find().count() == 2
            assert current_scope() is scope

        with wire.record() as seen:
            async with (scope := scope_of(client)) as session:
                scope.before_commit(calls.hook("first"))
                scope.before_commit(write)
                scope.before_commit(calls.async_hook("third"))
                await Item(name="by the block").insert()
                assert calls == []
                lsid = session.session_id
        assert calls == ["first", "second", "third"]
        assert names(seen) == ["insert", "insert", "aggregate", "commitTransaction"]
        assert all(event.command["lsid"] == lsid for event in seen)
        assert await stored(database) == ["by the block", "by the hook"]

    async def test_may_register_another_one(self, client: Any, database: Any, calls: Calls) -> None:
        def first() -> None:
            calls.append("first")
            scope.before_commit(calls.hook("third"))
            scope.on_commit(calls.hook("after"))

        async with (scope := scope_of(client)):
            scope.before_commit(first)
            scope.before_commit(calls.hook("second"))
            await Item().insert()
        assert calls == ["first", "second", "third", "after"]

    @pytest.mark.parametrize("error", [KeyError, SystemExit, asyncio.CancelledError])
    async def test_vetoes_by_raising(
        self, client: Any, wire: Wire, database: Any, calls: Calls, error: type[BaseException]
    ) -> None:
        veto = error("no")
        with wire.record() as seen, pytest.raises(error) as caught:
            async with (scope := scope_of(client)):
                scope.before_commit(calls.async_hook("first", veto))
                scope.before_commit(calls.hook("not reached"))
                scope.on_commit(calls.hook("on_commit"))
                scope.on_abort(calls.hook("on_abort"))
                await Item().insert()
        assert caught.value is veto
        assert names(seen) == ["insert", "abortTransaction"]
        assert scope.state is ScopeState.ABORTED
        assert calls == ["first", "on_abort"]
        assert await stored(database) == []

    async def test_may_roll_back_quietly(self, client: Any, database: Any, calls: Calls) -> None:
        async with (scope := scope_of(client)):
            scope.before_commit(calls.hook("first", Rollback()))
            scope.on_abort(calls.hook("on_abort"))
            await Item().insert()
        assert scope.state is ScopeState.ABORTED
        assert calls == ["first", "on_abort"]
        assert await stored(database) == []

    async def test_may_make_the_scope_rollback_only(
        self, client: Any, database: Any, calls: Calls
    ) -> None:
        with pytest.raises(UnexpectedRollbackError, match="the hook says so"):
            async with (scope := scope_of(client)):
                scope.before_commit(lambda: scope.set_rollback_only("the hook says so"))
                scope.before_commit(calls.hook("still runs"))
                await Item().insert()
        assert calls == ["still runs"]
        assert await stored(database) == []

    async def test_takes_the_documents_back_that_it_wrote_itself(
        self, client: Any, database: Any
    ) -> None:
        document = Item()

        async def write() -> None:
            await document.insert()
            raise KeyError

        with pytest.raises(KeyError):
            async with (scope := scope_of(client)):
                scope.before_commit(write)
        assert document.id is None

    async def test_does_not_run_where_nothing_is_committed(self, client: Any, calls: Calls) -> None:
        with pytest.raises(KeyError):
            async with (scope := scope_of(client)):
                scope.before_commit(calls.hook("of an error"))
                raise KeyError
        with pytest.raises(UnexpectedRollbackError):
            async with (scope := scope_of(client)):
                scope.before_commit(calls.hook("of a rollback-only scope"))
                scope.set_rollback_only("no good")
        async with (scope := scope_of(client)) as session:
            scope.before_commit(calls.hook("of an end by hand"))
            await Item().insert()
            await session.commit_transaction()
        assert calls == []

    async def test_of_a_joined_block_runs_when_the_owner_commits(
        self, client: Any, calls: Calls
    ) -> None:
        async with scope_of(client):
            async with (joined := scope_of(client)):
                joined.before_commit(calls.hook("of the joined block"))
            assert calls == []
        assert calls == ["of the joined block"]

    async def test_runs_for_a_commit_in_the_block_and_only_once(
        self, client: Any, database: Any, calls: Calls
    ) -> None:
        async with (scope := scope_of(client)):
            scope.before_commit(calls.hook("first"))
            await Item(name="a").insert()
            await scope.commit()
            assert calls == ["first"]
            scope.before_commit(calls.hook("second"))
        assert calls == ["first", "second"]

    async def test_vetoes_a_commit_in_the_block(
        self, client: Any, database: Any, calls: Calls
    ) -> None:
        async with (scope := scope_of(client)):
            scope.before_commit(calls.hook("first", KeyError()))
            await Item(name="a").insert()
            with pytest.raises(KeyError):
                await scope.commit()
            assert scope.rollback_only
            await scope.abort()
            await Item(name="b").insert()
        assert await stored(database) == ["b"]

    async def test_that_vetoed_a_commit_in_the_block_can_not_be_passed_over(
        self, client: Any, database: Any
    ) -> None:
        def veto() -> None:
            raise KeyError("no")

        with pytest.raises(UnexpectedRollbackError, match="before_commit hook raised KeyError"):
            async with (scope := scope_of(client)):
                scope.before_commit(veto)
                await Item().insert()
                with pytest.raises(KeyError):
                    await scope.commit()
        assert await stored(database) == []

    async def test_runs_again_with_each_attempt_that_registers_it(
        self, client: Any, fail_point: FailPoint, calls: Calls
    ) -> None:
        async def work() -> None:
            scope = current_scope()
            assert scope is not None
            scope.before_commit(calls.hook("before"))
            await Item().insert()

        with fail_point("commitTransaction", error_code=251, times=2):
            await run_in_transaction(work, client=client, collections=[Item], jitter=lambda: 0.0)
        assert calls == ["before"] * 3

    async def test_needs_a_transaction_that_is_open(self, client: Any, calls: Calls) -> None:
        scope = scope_of(client)
        with pytest.raises(ScopeClosedError):
            scope.before_commit(calls.hook("too early"))
        async with scope:
            pass
        with pytest.raises(ScopeClosedError):
            scope.before_commit(calls.hook("too late"))
        async with (scope := scope_of(client, transaction=False)):
            with pytest.raises(PropagationError):
                scope.before_commit(calls.hook("no transaction"))


class TestAfterTheOutcome:
    @pytest.mark.parametrize("outcome", ["commit", "abort"])
    async def test_run_in_order_and_only_those_of_the_outcome(
        self, client: Any, calls: Calls, outcome: str
    ) -> None:
        async with (scope := scope_of(client)):
            for name in ("commit", "abort"):
                register = getattr(scope, f"on_{name}")
                register(calls.hook(f"{name} 1"))
                register(calls.async_hook(f"{name} 2"))
                register(calls.hook(f"{name} 3"))
            await Item().insert()
            if outcome == "abort":
                raise Rollback
        assert calls == [f"{outcome} 1", f"{outcome} 2", f"{outcome} 3"]

    async def test_run_when_all_is_settled_and_unbound(
        self, client: Any, database: Any, wire: Wire, server_uri: str
    ) -> None:
        seen_by_hook: list[Any] = []

        async def hook() -> None:
            seen_by_hook.extend(
                [scope.state, current_scope(), Item.get_session(), scope.session.has_ended]
            )
            seen_by_hook.append(await stored(database))
            seen_by_hook.append(open_transactions(server_uri))
            with wire.record() as seen:
                await Item(name="by the hook").insert()
            assert "txnNumber" not in seen[0].command or "autocommit" not in seen[0].command

        async with (scope := scope_of(client)):
            scope.on_commit(hook)
            await Item(name="a").insert()
        assert seen_by_hook == [ScopeState.COMMITTED, None, None, True, ["a"], 0]
        assert await stored(database) == ["a", "by the hook"]

    async def test_may_open_a_scope_of_their_own(self, client: Any, database: Any) -> None:
        async def hook() -> None:
            async with scope_of(client, propagation="never") as session:
                await Item(name="by the hook").insert()
                assert current_scope() is not scope
                assert session is not scope.session

        async with (scope := scope_of(client)):
            scope.on_abort(hook)
            await Item(name="a").insert()
            raise Rollback
        assert await stored(database) == ["by the hook"]

    async def test_run_before_the_block_is_left(self, client: Any, calls: Calls) -> None:
        async with (scope := scope_of(client)):
            scope.on_commit(calls.async_hook("hook"))
        calls.append("after the block")
        assert calls == ["hook", "after the block"]

    async def test_of_an_independent_scope_are_in_the_outer_one_again(
        self, client: Any, database: Any
    ) -> None:
        async def hook() -> None:
            assert current_scope() is outer
            await Item(name="by the hook").insert()

        async with (outer := scope_of(client)):
            async with (inner := scope_of(client, propagation="requires_new")):
                inner.on_commit(hook)
                await Item(name="inner").insert()
            raise Rollback
        assert await stored(database) == ["inner"]

    async def test_of_a_joined_block_run_with_those_of_the_owner(
        self, client: Any, calls: Calls
    ) -> None:
        async with (scope := scope_of(client)):
            scope.on_commit(calls.hook("outer 1"))
            async with (joined := scope_of(client)):
                joined.on_commit(calls.hook("joined"))
                on_commit(calls.hook("module"))
            assert calls == []
            scope.on_commit(calls.hook("outer 2"))
        assert calls == ["outer 1", "joined", "module", "outer 2"]

    async def test_of_a_joined_block_that_failed_are_those_of_the_owners_abort(
        self, client: Any, calls: Calls
    ) -> None:
        with pytest.raises(UnexpectedRollbackError):
            async with scope_of(client):
                with pytest.raises(KeyError):
                    async with (joined := scope_of(client)):
                        joined.on_commit(calls.hook("commit"))
                        joined.on_abort(calls.hook("abort"))
                        raise KeyError
                assert calls == []
        assert calls == ["abort"]

    async def test_run_for_each_end_in_the_block_and_only_once(
        self, client: Any, calls: Calls
    ) -> None:
        async with (scope := scope_of(client)):
            scope.on_commit(calls.hook("commit 1"))
            scope.on_abort(calls.hook("abort 1"))
            await scope.commit()
            scope.on_commit(calls.hook("commit 2"))
            scope.on_abort(calls.hook("abort 2"))
            await scope.abort()
            scope.on_commit(calls.hook("commit 3"))
            scope.on_abort(calls.hook("abort 3"))
        assert calls == ["commit 1", "abort 2", "commit 3"]

    async def test_of_an_end_in_the_block_are_outside_the_scope_that_goes_on(
        self, client: Any, database: Any
    ) -> None:
        async def hook() -> None:
            assert current_scope() is None
            await Item(name="by the hook").insert()

        async with (scope := scope_of(client)):
            scope.on_commit(hook)
            await Item(name="a").insert()
            await scope.commit()
            assert current_scope() is scope
            await Item(name="b").insert()
            raise Rollback
        assert await stored(database) == ["a", "by the hook"]

    async def test_run_after_a_commit_that_the_server_refused(
        self, client: Any, fail_point: FailPoint, calls: Calls
    ) -> None:
        with fail_point("commitTransaction", error_code=251, times=1):
            with pytest.raises(OperationFailure):
                async with (scope := scope_of(client)):
                    scope.on_commit(calls.hook("commit"))
                    scope.on_abort(calls.hook("abort"))
                    await Item().insert()
        assert calls == ["abort"]

    async def test_do_not_run_where_the_outcome_is_unknown_or_none_of_the_scopes(
        self, client: Any, fail_point: FailPoint, calls: Calls
    ) -> None:
        with fail_point("commitTransaction", error_code=64, labels=[UNKNOWN]):
            with pytest.raises(CommitUnknownError):
                async with (scope := scope_of(client, timeout=0.05)):
                    scope.on_commit(calls.hook("commit"))
                    scope.on_abort(calls.hook("abort"))
                    await Item().insert()
        for end in ("commit_transaction", "abort_transaction"):
            async with (scope := scope_of(client)) as session:
                scope.on_commit(calls.hook("commit"))
                scope.on_abort(calls.hook("abort"))
                await Item().insert()
                await getattr(session, end)()
        assert calls == []

    async def test_of_an_attempt_that_is_retried_are_dropped(
        self, client: Any, fail_point: FailPoint, calls: Calls
    ) -> None:
        number = 0
        with fail_point("commitTransaction", error_code=251, times=2):
            async for attempt in transaction_attempts(
                client, collections=[Item], jitter=lambda: 0.0
            ):
                async with attempt:
                    number += 1
                    on_commit(calls.hook(f"commit {number}"))
                    on_abort(calls.hook(f"abort {number}"))
                    await Item().insert()
        assert calls == ["commit 3"]

    async def test_of_an_attempt_that_is_not_retried_run(self, client: Any, calls: Calls) -> None:
        async def fail() -> None:
            on_abort(calls.hook("abort"))
            raise KeyError

        with pytest.raises(KeyError):
            await run_in_transaction(fail, client=client, collections=[Item])
        assert calls == ["abort"]

    async def test_of_an_attempt_that_aborts_in_its_block_and_goes_on_run(
        self, client: Any, fail_point: FailPoint, calls: Calls
    ) -> None:
        """A commit in the block has failed and was made good there: nothing runs again."""
        with fail_point("commitTransaction", error_code=251, times=1):
            async for attempt in transaction_attempts(client, collections=[Item]):
                async with attempt:
                    attempt.on_abort(calls.hook("abort"))
                    await Item().insert()
                    with pytest.raises(OperationFailure):
                        await attempt.commit()
                    await attempt.abort()
        assert calls == ["abort"]

    async def test_finish_although_the_task_is_cancelled(self, client: Any, calls: Calls) -> None:
        async def slow() -> None:
            running.set()
            await go_on.wait()
            calls.append("slow")

        async def work() -> None:
            async with (scope := scope_of(client)):
                scope.on_commit(slow)
                scope.on_commit(calls.hook("next"))
                await Item().insert()

        running, go_on = asyncio.Event(), asyncio.Event()
        task = asyncio.ensure_future(work())
        await running.wait()
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert calls == ["slow", "next"]
