"""What a scope can be told and asked: rollback-only, documents, which scope it is, its state."""

from __future__ import annotations

from typing import Any

import pytest
from beanie import Document
from models import Item, scope_of, stored
from wire import FailPoint, Wire, names, outside

from beanie_session_scope import (
    PropagationError,
    Rollback,
    ScopeClosedError,
    ScopeState,
    UnexpectedRollbackError,
    bind_session,
    current_scope,
    outside_session,
    with_session,
)
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.state import TRANSITIONS, check_move


class TestRollbackOnly:
    async def test_keeps_the_first_reason(self, client: Any, database: Any) -> None:
        with pytest.raises(UnexpectedRollbackError, match="the first"):
            async with (scope := scope_of(client)):
                await Item().insert()
                scope.set_rollback_only("the first")
                scope.set_rollback_only("the second")
        assert await stored(database) == []

    async def test_set_by_a_joined_block_holds_for_the_owner(
        self, client: Any, database: Any
    ) -> None:
        with pytest.raises(UnexpectedRollbackError, match="the joined one says so"):
            async with (scope := scope_of(client)):
                async with (joined := scope_of(client)):
                    await Item().insert()
                    joined.set_rollback_only("the joined one says so")
                assert scope.rollback_only
        assert await stored(database) == []

    async def test_does_not_stop_operations(self, client: Any) -> None:
        with pytest.raises(UnexpectedRollbackError):
            async with (scope := scope_of(client)):
                scope.set_rollback_only("I look around only")
                await Item(name="a").insert()
                assert await Item.find().count() == 1

    @pytest.mark.parametrize("error", [KeyError, Rollback])
    async def test_is_no_matter_to_an_error_that_leaves_the_block(
        self, client: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(KeyError):
            async with (scope := scope_of(client)):
                scope.set_rollback_only("no good")
                raise error
            raise KeyError  # only Rollback comes to here
        assert scope.state is ScopeState.ABORTED


class TestTrackAndRefresh:
    @pytest.mark.parametrize("bad", ["text", None, 5, Item, [Item]])
    async def test_take_documents_only(self, client: Any, bad: Any) -> None:
        async with (scope := scope_of(client)):
            with pytest.raises(TypeError, match="Document"):
                scope.track(bad)
            with pytest.raises(TypeError, match="Document"):
                await scope.refresh(bad)

    async def test_do_not_show_what_was_passed(self, client: Any) -> None:
        async with (scope := scope_of(client)):
            with pytest.raises(TypeError) as caught:
                scope.track([Item(name="secret")])  # type: ignore[arg-type]
        assert "secret" not in str(caught.value)

    async def test_tracking_needs_a_transaction_that_is_open(self, client: Any) -> None:
        async with (scope := scope_of(client, transaction=False)):
            with pytest.raises(PropagationError):
                scope.track(Item())
        scope = scope_of(client)
        with pytest.raises(ScopeClosedError):
            scope.track(Item())
        async with scope:
            pass
        with pytest.raises(ScopeClosedError):
            scope.track(Item())

    async def test_tracking_takes_any_document(self, client: Any) -> None:
        class Foreign(Document):
            n: int = 1

        foreign = Foreign.model_construct(n=1)
        async with (scope := scope_of(client)):
            scope.track(foreign)
            foreign.n = 5
            raise Rollback
        assert foreign.n == 1

    async def test_refreshing_reads_inside_the_transaction(self, client: Any, wire: Wire) -> None:
        document = await Item(n=1).insert()
        async with (scope := scope_of(client)) as session:
            await Item.find(Item.id == document.id).update({"$set": {"n": 5}})
            with wire.record() as seen:
                await scope.refresh(document)
            assert names(seen) == ["find"]
            assert outside(seen, session) == []
            assert document.n == 5
            raise Rollback
        assert document.n == 1, "what was read has been taken back"

    async def test_refreshing_all_means_what_was_written_or_is_tracked(
        self, client: Any, database: Any
    ) -> None:
        written, tracked, other = [await Item(n=1).insert() for _ in range(3)]
        async with (scope := scope_of(client)):
            scope.track(tracked)
            await written.set({"n": 2})
            await Item.find_all().update({"$set": {"n": 9}})
            await scope.refresh()
            assert (written.n, tracked.n, other.n) == (9, 9, 1)

    async def test_refreshing_works_when_the_scope_is_over(
        self, client: Any, database: Any
    ) -> None:
        document = await Item(n=1).insert()
        async with (scope := scope_of(client)):
            await document.set({"n": 2})
        await database["item"].update_one({}, {"$set": {"n": 9}})
        await scope.refresh()
        assert document.n == 9

    @pytest.mark.parametrize("when", ["before the block", "without a transaction", "joined"])
    async def test_refreshing_named_documents_is_never_left_out_quietly(
        self, client: Any, database: Any, when: str
    ) -> None:
        document = await Item(n=1).insert()
        await database["item"].update_one({}, {"$set": {"n": 9}})
        if when == "before the block":
            await scope_of(client).refresh(document)
        elif when == "without a transaction":
            async with (scope := scope_of(client, transaction=False)):
                await scope.refresh(document)
        else:
            session = await DRIVER.start_session(client)
            with bind_session(session, collections=[Item]):
                async with (scope := scope_of(client, transaction=False)):
                    await scope.refresh(document)
            await session.end_session()
        assert document.n == 9

    async def test_refreshing_leaves_a_document_alone_of_which_nothing_is_known(
        self, client: Any
    ) -> None:
        new, gone = Item(n=1), await Item(n=1).insert()
        await Item.find_all().delete()
        await scope_of(client).refresh(new, gone)
        assert (new.n, new.id, gone.n) == (1, None, 1)


class TestTheCurrentScope:
    async def test_is_the_innermost_open_one(self, client: Any) -> None:
        assert current_scope() is None
        async with (outer := scope_of(client)):
            assert current_scope() is outer
            async with (inner := scope_of(client, propagation="requires_new")):
                assert current_scope() is inner
            assert current_scope() is outer
        assert current_scope() is None

    async def test_of_a_joined_block_is_its_owner(self, client: Any) -> None:
        async with (outer := scope_of(client)):
            async with scope_of(client):
                assert current_scope() is outer

    async def test_of_a_class_is_the_one_that_binds_it(self, client: Any) -> None:
        async with (outer := scope_of(client)):
            async with with_session(client=client, collections=[], propagation="requires_new"):
                assert current_scope(Item) is outer
            with outside_session(Item):
                assert current_scope(Item) is None
                assert current_scope() is outer
            with outside_session():
                assert current_scope() is None

    async def test_of_a_session_that_was_bound_by_hand_is_none(self, client: Any) -> None:
        session = await DRIVER.start_session(client)
        with bind_session(session, collections=[Item]):
            assert current_scope() is None
            assert current_scope(Item) is None
        await session.end_session()

    async def test_of_a_class_without_the_mixin_is_refused(self) -> None:
        with pytest.raises(TypeError, match="SessionScopeMixin"):
            current_scope(Document)  # type: ignore[arg-type]


class TestTheStateMachine:
    @pytest.mark.parametrize("before", ScopeState)
    @pytest.mark.parametrize("after", ScopeState)
    def test_makes_its_moves_and_refuses_all_others(
        self, before: ScopeState, after: ScopeState
    ) -> None:
        if after in TRANSITIONS[before]:
            assert check_move(before, after) is after
        else:
            with pytest.raises(RuntimeError, match=f"from {before.value} to {after.value}"):
                check_move(before, after)

    def test_has_no_way_out_of_an_unknown_outcome_or_the_end(self) -> None:
        assert not TRANSITIONS[ScopeState.UNKNOWN] | TRANSITIONS[ScopeState.ENDED]
        assert set(TRANSITIONS) == set(ScopeState)

    async def test_is_followed_by_a_scope(self, client: Any, fail_point: FailPoint) -> None:
        seen = []
        scope = scope_of(client)
        seen.append(scope.state)
        async with scope:
            scope.before_commit(lambda: seen.append(scope.state))
            scope.on_commit(lambda: seen.append(scope.state))
            await Item().insert()
        assert seen == [ScopeState.NEW, ScopeState.OPEN, ScopeState.COMMITTED]

    async def test_is_seen_by_a_joined_block_as_its_owner_sees_it(self, client: Any) -> None:
        async with (scope := scope_of(client)):
            async with (joined := scope_of(client)):
                assert joined.state is scope.state is ScopeState.OPEN
            raise Rollback
        assert joined.state is scope.state is ScopeState.ABORTED
