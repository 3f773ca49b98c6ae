"""Scopes in scopes: what becomes of hooks, of documents, of attempts, and of tasks that go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from labels import TRANSIENT, labelled
from nesting_models import Beside, Here, There, database_of
from nesting_scopes import ENDS, Boom, Pair, fail_by
from pymongo.errors import DuplicateKeyError, OperationFailure, PyMongoError

from beanie_session_scope import (
    HookError,
    Rollback,
    ScopeClosedError,
    TransactionAbortedError,
    TransactionTimeoutError,
    UnexpectedRollbackError,
    current_scope,
    on_abort,
    on_commit,
    outside_session,
    run_in_transaction,
)
from beanie_session_scope.drivers import DRIVER

pytestmark = pytest.mark.timeout(30)


@asynccontextmanager
async def taken(client: Any, document: Any) -> AsyncIterator[None]:
    """Let another transaction hold a document, so that writing it in one is a conflict."""
    session = await DRIVER.start_session(client)
    await DRIVER.start_transaction(session)
    collection = database_of(client)[type(document).Settings.name]
    await collection.update_one({"_id": document.id}, {"$inc": {"n": 1}}, session=session)
    try:
        yield
    finally:
        await session.abort_transaction()
        await session.end_session()


class TestHooksOfJoinedScopes:
    async def test_run_when_the_owner_has_committed_in_the_order_of_their_coming(
        self, pair: Pair
    ) -> None:
        ran: list[str] = []
        async with (owner := pair.scope()):
            on_commit(lambda: ran.append("first"))
            async with (inner := pair.joined()):
                inner.on_commit(lambda: ran.append(f"second, {owner.state.value}"))
                async with pair.joined():
                    on_commit(lambda: ran.append("third"))
            owner.on_commit(lambda: ran.append("fourth"))
            assert ran == []
        assert ran == ["first", "second, committed", "third", "fourth"]

    async def test_run_when_the_owner_has_aborted(self, pair: Pair) -> None:
        ran: list[str] = []
        with pytest.raises(UnexpectedRollbackError):
            async with pair.scope():
                with pytest.raises(Boom):
                    async with (inner := pair.joined()):
                        on_commit(lambda: ran.append("committed"))
                        on_abort(lambda: ran.append("first"))
                        inner.on_abort(lambda: ran.append("second"))
                        raise Boom
                assert ran == []
                on_abort(lambda: ran.append("third"))
        assert ran == ["first", "second", "third"]

    async def test_before_the_commit_are_part_of_it(self, pair: Pair) -> None:
        async def write() -> None:
            await Here(name="by the hook").insert()
            ran.append(current_scope())

        ran: list[Any] = []
        async with (owner := pair.scope()):
            async with (inner := pair.joined()):
                inner.before_commit(write)
            assert ran == []
        assert ran == [owner]
        assert await pair.stored() == ["by the hook"]

    async def test_that_veto_abort_the_owner_and_leave_its_block(self, pair: Pair) -> None:
        async def veto() -> None:
            raise Boom

        with pytest.raises(Boom):
            async with pair.scope():
                async with (inner := pair.joined()):
                    inner.before_commit(veto)
                await Here().insert()
        assert await pair.stored() == []

    async def test_do_not_run_before_a_commit_that_is_not_to_be(self, pair: Pair) -> None:
        ran: list[str] = []
        with pytest.raises(UnexpectedRollbackError):
            async with pair.scope():
                with pytest.raises(Boom):
                    async with (inner := pair.joined()):
                        inner.before_commit(lambda: ran.append("before"))
                        raise Boom
        assert ran == []

    async def test_that_fail_do_so_at_the_owner(self, pair: Pair) -> None:
        def fail() -> None:
            raise Boom

        with pytest.raises(HookError, match="committed") as caught:
            async with pair.scope():
                async with pair.joined():
                    on_commit(fail)
                await Here(name="stays").insert()
        assert isinstance(caught.value.__cause__, Boom)
        assert await pair.stored() == ["stays"]


class TestHooksOfIndependentScopes:
    @pytest.mark.parametrize("ending", ENDS)
    async def test_run_when_these_are_over_where_the_outer_one_is_bound(
        self, pair: Pair, ending: str
    ) -> None:
        async def write() -> None:
            sessions.append(Here.get_session())
            await Here(name="by the hook").insert()

        sessions: list[Any] = []
        async with pair.scope() as outer:
            async with pair.new():
                (on_commit if ending == "commit" else on_abort)(write)
                await fail_by(ending, current_scope())
            assert sessions == [outer]
            raise Rollback
        assert await pair.stored() == [], "what the hook wrote belongs to the outer one"

    async def test_leave_those_of_the_outer_one_alone(self, pair: Pair) -> None:
        ran: list[str] = []
        async with pair.scope():
            on_abort(lambda: ran.append("outer aborted"))
            async with pair.new():
                on_commit(lambda: ran.append("inner committed"))
            assert ran == ["inner committed"]
            raise Rollback
        assert ran == ["inner committed", "outer aborted"]

    async def test_are_not_lost_where_a_commit_on_the_way_was_refused(self, pair: Pair) -> None:
        ran: list[str] = []
        first = await Here().insert()
        with pytest.raises(TransactionAbortedError):
            async with (scope := pair.scope()):
                on_abort(lambda: ran.append("aborted"))
                with pytest.raises(DuplicateKeyError):
                    await Here(id=first.id).insert()
                with pytest.raises(TransactionAbortedError):
                    await scope.commit()
        assert ran == ["aborted"]


class TestInsideARetriedScope:
    @staticmethod
    def _forms(pair: Pair) -> dict[str, Callable[[Any], Any]]:
        async def block(body: Any) -> None:
            async with pair.new():
                await body()

        async def outside(body: Any) -> None:
            with outside_session():
                async with pair.scope():
                    await body()

        async def attempts(body: Any) -> None:
            async for attempt in pair.attempts(propagation="requires_new", timeout=0.02):
                async with attempt:
                    await body()

        async def function(body: Any) -> None:
            await run_in_transaction(
                body,
                client=pair.here,
                collections=[Here],
                propagation="requires_new",
                timeout=0.02,
            )

        async def other(body: Any) -> None:
            async with pair.other():
                await body()

        return locals()

    @pytest.mark.parametrize("form", ["block", "outside", "attempts", "function", "other"])
    async def test_the_transient_label_of_an_independent_one_is_not_a_reason_to_run_it_again(
        self, pair: Pair, form: str
    ) -> None:
        """That one has been run again where this may help; here it would fail again."""

        async def fail() -> None:
            raise labelled(TRANSIENT)

        runs = 0
        expected = TransactionTimeoutError if form in ("attempts", "function") else PyMongoError
        with pytest.raises(expected):
            async for attempt in pair.attempts(timeout=2):
                async with attempt:
                    runs += 1
                    await self._forms(pair)[form](fail)
        assert runs == 1

    async def test_an_independent_one_runs_again_alone(self, pair: Pair) -> None:
        outer = inner = 0
        async for attempt in pair.attempts():
            async with attempt:
                outer += 1
                async for nested in pair.attempts(propagation="requires_new"):
                    async with nested:
                        inner += 1
                        await Here(name="inner").insert()
                        if inner < 3:
                            raise labelled(TRANSIENT)
                await Here(name="outer").insert()
        assert (outer, inner) == (1, 3)
        assert await pair.stored() == ["inner", "outer"]

    async def test_a_joined_one_leaves_it_to_the_owner(self, pair: Pair) -> None:
        ran: list[str] = []
        outer = inner = 0
        async for attempt in pair.attempts():
            async with attempt:
                outer += 1
                async for nested in pair.attempts():
                    async with nested:
                        inner += 1
                        on_commit(lambda: ran.append("committed"))
                        on_abort(lambda: ran.append("aborted"))
                        await Here(name="inner").insert()
                        if inner < 3:
                            raise labelled(TRANSIENT)
        assert (outer, inner) == (3, 3)
        assert ran == ["committed"], "those of the attempts before were dropped"
        assert await pair.stored() == ["inner"]

    async def test_a_joined_failure_that_was_caught_is_not_run_again(self, pair: Pair) -> None:
        """The label went with the error; what is left is a rollback that nobody expected."""
        runs = 0
        with pytest.raises(UnexpectedRollbackError):
            async for attempt in pair.attempts(timeout=2):
                async with attempt:
                    runs += 1
                    with pytest.raises(PyMongoError):
                        async with pair.joined():
                            raise labelled(TRANSIENT)
        assert runs == 1

    async def test_what_an_independent_one_committed_stays(self, pair: Pair) -> None:
        runs = 0
        async for attempt in pair.attempts():
            async with attempt:
                runs += 1
                async with pair.new():
                    await Here(name=f"inner {runs}").insert()
                await Here(name="outer").insert()
                if runs < 2:
                    raise labelled(TRANSIENT)
        assert await pair.stored() == ["inner 1", "inner 2", "outer"]

    async def test_its_own_conflict_is_a_reason_wherever_it_was_met(self, pair: Pair) -> None:
        """In the block of a scope on another client the class is still this one's."""
        document = await Here().insert()
        runs = 0
        async with taken(pair.here, document):
            async for attempt in pair.attempts(timeout=2):
                async with attempt:
                    runs += 1
                    if runs == 1:
                        async with pair.other():
                            await Here.find_one(Here.id == document.id).inc({Here.n: 1})
        assert runs == 2

    async def test_its_conflict_does_not_make_an_inner_one_loop(self, pair: Pair) -> None:
        document = await Here().insert()
        inner = 0
        async with taken(pair.here, document):
            with pytest.raises(OperationFailure):
                async with pair.scope():
                    async for attempt in pair.other_attempts(timeout=0.3):
                        async with attempt:
                            inner += 1
                            await Here.find_one(Here.id == document.id).inc({Here.n: 1})
        assert inner == 1


class TestDocuments:
    async def test_keep_what_an_independent_scope_committed(self, pair: Pair) -> None:
        document = Here(name="kept")
        async with pair.scope():
            current_scope().track(document)
            async with pair.new():
                await document.insert()
                await document.inc({Here.n: 1})
            raise Rollback
        assert (document.id is not None, document.n) == (True, 1)
        document.n += 1
        await document.save_changes()
        assert (await Here.get(document.id)).n == 2

    async def test_keep_what_was_committed_three_deep(self, pair: Pair) -> None:
        document = await Here().insert()
        async with pair.scope():
            current_scope().track(document)
            async with pair.new():
                current_scope().track(document)
                async with pair.new():
                    await document.inc({Here.n: 1})
                raise Rollback
            raise Rollback
        assert document.n == 1
        await document.inc({Here.n: 1})
        assert document.n == 2

    async def test_keep_what_was_committed_under_outside_session(self, pair: Pair) -> None:
        document = await Here().insert()
        async with pair.scope():
            current_scope().track(document)
            with outside_session():
                async with pair.scope():
                    await document.inc({Here.n: 1})
            raise Rollback
        assert document.n == 1
        await document.inc({Here.n: 1})
        assert document.n == 2

    async def test_keep_what_was_written_at_once_under_outside_session(self, pair: Pair) -> None:
        document = Here(name="kept")
        async with pair.scope():
            current_scope().track(document)
            with outside_session(Here):
                await document.insert()
                await document.inc({Here.n: 1})
            raise Rollback
        assert (document.id is not None, document.n) == (True, 1)
        await document.inc({Here.n: 1})
        assert await pair.stored() == ["kept"]

    async def test_go_back_to_what_they_were_for_the_outer_one_not_just_for_the_inner(
        self, pair: Pair
    ) -> None:
        """An inner scope that only tracked a document has stored nothing of it."""
        document = await Here(n=1).insert()
        async with pair.scope():
            current_scope().track(document)
            document.n = 2
            async with pair.new():
                current_scope().track(document)
            raise Rollback
        assert document.n == 1

    async def test_go_back_when_a_joined_scope_wrote_them(self, pair: Pair) -> None:
        document = Here()
        with pytest.raises(UnexpectedRollbackError):
            async with pair.scope():
                with pytest.raises(Boom):
                    async with pair.joined():
                        await document.insert()
                        raise Boom
                assert document.id is not None, "the owner has not aborted yet"
        assert document.id is None

    async def test_go_back_to_what_they_were_when_the_inner_one_wrote_them_first(
        self, pair: Pair
    ) -> None:
        document = await Here().insert()
        async with pair.scope():
            document.n = 10
            async with pair.new():
                document.n += 1
                await document.save()
                raise Rollback
            assert document.n == 11, "changed before the first write, and not tracked"
            await document.save()
        assert (await Here.get(document.id)).n == 11

    async def test_are_rewound_before_each_attempt_but_not_below_what_was_committed(
        self, pair: Pair
    ) -> None:
        document = await Here().insert()
        seen: list[int] = []

        async def work(document: Here) -> None:
            seen.append(document.n)
            async with pair.new():
                await document.inc({Here.n: 1})
            document.n += 100
            if len(seen) < 3:
                raise labelled(TRANSIENT)

        await run_in_transaction(
            work, document, client=pair.here, collections=[Here], jitter=lambda: 0.0
        )
        assert seen == [0, 1, 2]

    async def test_keep_what_was_written_in_a_plain_session(self, pair: Pair) -> None:
        document = await Here().insert()
        async with pair.scope():
            current_scope().track(document)
            async with pair.new(transaction=False):
                await document.inc({Here.n: 1})
            raise Rollback
        assert document.n == 1

    async def test_keep_what_the_outer_scope_wrote_in_the_block_of_an_inner_one(
        self, pair: Pair
    ) -> None:
        """The inner one tracks it, and takes back its own block, not the outer one's write."""

        async def work(document: Here) -> None:
            document.n = 10
            await document.insert()
            document.n = 11
            raise Rollback

        document = Here()
        async with pair.scope():
            await run_in_transaction(work, document, client=pair.there, collections=[There])
            assert (document.id is not None, document.n) == (True, 10)
        assert await pair.stored() == ["new"]

    async def test_go_back_when_the_outer_scope_aborts_what_it_wrote_in_an_inner_one(
        self, pair: Pair
    ) -> None:
        document = Here()
        async with pair.scope():
            async with pair.other() as _, pair.joined():
                current_scope().track(document)
                await document.insert()
            assert document.id is not None
            raise Rollback
        assert document.id is None

    async def test_of_the_other_client_follow_their_own_transaction(self, pair: Pair) -> None:
        here, there = Here(), There()
        async with pair.scope():
            await here.insert()
            async with pair.other():
                await there.insert()
            raise Rollback
        assert (here.id is None, there.id is None) == (True, False)
        async with pair.other():
            async with pair.scope():
                await here.insert()
            await there.inc({There.n: 1})
            raise Rollback
        assert (here.id is None, there.n) == (False, 0)


class TestATaskThatGoesOn:
    """Started in nested scopes, it is told of the one that it was started in."""

    async def test_finds_its_independent_scope_closed_though_the_outer_one_is_open(
        self, pair: Pair
    ) -> None:
        go_on = asyncio.Event()

        async def late() -> None:
            await go_on.wait()
            with pytest.raises(ScopeClosedError):
                await Here(name="late").insert()

        async with pair.scope():
            async with pair.new():
                task = asyncio.ensure_future(late())
                await asyncio.sleep(0)
            go_on.set()
            await task
        assert await pair.stored() == []

    async def test_goes_on_in_the_independent_scope_when_a_joined_one_is_over(
        self, pair: Pair
    ) -> None:
        go_on = asyncio.Event()

        async def late() -> None:
            await go_on.wait()
            await Here(name="late").insert()

        async with pair.scope():
            async with pair.new():
                async with pair.joined(), pair.joined():
                    task = asyncio.ensure_future(late())
                    await asyncio.sleep(0)
                go_on.set()
                await task
            raise Rollback
        assert await pair.stored() == ["late"]

    async def test_finds_a_class_unbound_that_only_the_joined_scope_had_added(
        self, pair: Pair
    ) -> None:
        go_on = asyncio.Event()

        async def late() -> None:
            await go_on.wait()
            with pytest.raises(ScopeClosedError):
                await Beside().insert()

        async with pair.scope():
            async with pair.scope(Beside):
                task = asyncio.ensure_future(late())
                await asyncio.sleep(0)
            go_on.set()
            await task

    async def test_finds_it_unbound_also_where_an_error_has_ended_the_transaction(
        self, pair: Pair
    ) -> None:
        go_on = asyncio.Event()

        async def late() -> None:
            await go_on.wait()
            with pytest.raises(ScopeClosedError, match="block is over"):
                Beside.get_session()

        async with pair.scope():
            async with pair.scope(Beside):
                task = asyncio.ensure_future(late())
                await asyncio.sleep(0)
            stored = await Here().insert()
            with pytest.raises(DuplicateKeyError):
                await Here(id=stored.id).insert()
            go_on.set()
            await task
            raise Rollback
