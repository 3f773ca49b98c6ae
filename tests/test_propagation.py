"""How a scope that is opened inside another relates to it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from models import Item, Linked, scope_of, stored
from pymongo import ReadPreference
from pymongo.read_concern import ReadConcern
from wire import Wire, names

from beanie_session_scope import (
    PropagationError,
    Rollback,
    UnexpectedRollbackError,
    bind_session,
    outside_session,
    with_session,
)
from beanie_session_scope.drivers import DRIVER


class TestRequired:
    async def test_joins_the_open_scope(self, client: Any, wire: Wire, database: Any) -> None:
        with wire.record() as seen:
            async with scope_of(client) as outer:
                await Item(name="a").insert()
                async with scope_of(client) as inner:
                    assert inner is outer
                    await Item(name="b").insert()
                assert Item.get_session() is outer
                await Item(name="c").insert()
        assert names(seen) == ["insert", "insert", "insert", "commitTransaction"]
        assert await stored(database) == ["a", "b", "c"]

    async def test_adds_its_classes_for_its_duration(self, client: Any) -> None:
        async with scope_of(client, Item) as session:
            assert Linked.get_session() is None
            async with scope_of(client, Linked):
                assert Linked.get_session() is session
            assert Linked.get_session() is None

    async def test_that_fails_makes_the_outer_one_rollback_only(
        self, client: Any, database: Any
    ) -> None:
        with pytest.raises(UnexpectedRollbackError, match="KeyError"):
            async with scope_of(client) as outer:
                await Item(name="a").insert()
                with pytest.raises(KeyError):
                    async with scope_of(client) as inner:
                        assert inner is outer
                        raise KeyError
        assert await stored(database) == []

    async def test_that_fails_lets_its_exception_through(self, client: Any, database: Any) -> None:
        with pytest.raises(KeyError):
            async with scope_of(client):
                async with scope_of(client):
                    raise KeyError
        assert await stored(database) == []

    async def test_rollback_leaves_the_block_of_the_owner(self, client: Any, database: Any) -> None:
        reached = []
        async with scope_of(client):
            async with scope_of(client):
                await Item().insert()
                raise Rollback
            reached.append("after the joined block")
        assert reached == []
        assert await stored(database) == []

    async def test_joins_from_a_child_task(self, client: Any, database: Any) -> None:
        async def child(name: str) -> None:
            async with scope_of(client):
                await Item(name=name).insert()

        async with scope_of(client):
            await asyncio.gather(*(child(name) for name in "abc"))
            raise Rollback
        assert await stored(database) == []

    async def test_a_child_goes_on_in_the_outer_scope_when_the_joined_block_is_over(
        self, client: Any, database: Any
    ) -> None:
        go_on = asyncio.Event()

        async def child() -> None:
            await go_on.wait()
            await Item(name="child").insert()

        async with scope_of(client):
            async with scope_of(client):
                task = asyncio.ensure_future(child())
                await asyncio.sleep(0)
            go_on.set()
            await task
        assert await stored(database) == ["child"]

    async def test_starts_one_of_its_own_on_another_client(
        self, client: Any, other_client: Any
    ) -> None:
        async with scope_of(client) as session:
            async with with_session(client=other_client, collections=[]) as second:
                assert second is not session
            assert Item.get_session() is session

    @pytest.mark.parametrize(
        "options",
        [
            {"read_concern": ReadConcern("snapshot")},
            {"max_commit_time_ms": 5},
            {"transaction": False},
            {"causal_consistency": False},
        ],
    )
    async def test_with_options_that_differ_from_the_owners_is_refused(
        self, client: Any, database: Any, options: dict[str, Any]
    ) -> None:
        (name,) = options
        async with scope_of(client):
            await Item(name="a").insert()
            with pytest.raises(PropagationError, match=name):
                async with scope_of(client, **options):
                    pytest.fail("the body ran")
        assert await stored(database) == ["a"]

    async def test_with_the_owners_options_is_fine(self, client: Any) -> None:
        options = {"read_concern": ReadConcern("snapshot"), "max_commit_time_ms": 5_000}
        async with scope_of(client, **options):
            async with scope_of(client, **options, timeout=3):
                pass
            async with scope_of(client):
                pass

    async def test_with_what_is_the_default_anyway_is_fine(self, client: Any) -> None:
        async with scope_of(client):
            async with scope_of(
                client, read_preference=ReadPreference.PRIMARY, causal_consistency=True
            ):
                pass

    async def test_never_takes_a_plain_session_for_a_transaction(self, client: Any) -> None:
        async with scope_of(client, transaction=False):
            with pytest.raises(PropagationError, match="transaction"):
                async with scope_of(client):
                    pytest.fail("the body ran")
        session = await DRIVER.start_session(client)
        with bind_session(session, collections=[Item]):
            with pytest.raises(PropagationError, match="transaction"):
                async with scope_of(client):
                    pytest.fail("the body ran")
        await session.end_session()


class TestRequiresNew:
    @pytest.mark.parametrize("inner", ["commit", "abort"])
    @pytest.mark.parametrize("outer", ["commit", "abort"])
    async def test_is_independent(self, client: Any, database: Any, outer: str, inner: str) -> None:
        async with scope_of(client) as first:
            await Item(name="outer").insert()
            async with scope_of(client, propagation="requires_new") as second:
                assert second is not first
                await Item(name="inner").insert()
                if inner == "abort":
                    raise Rollback
            assert Item.get_session() is first
            if outer == "abort":
                raise Rollback
        expected = [n for n, e in (("inner", inner), ("outer", outer)) if e == "commit"]
        assert await stored(database) == expected

    async def test_does_not_make_the_outer_one_rollback_only(
        self, client: Any, database: Any
    ) -> None:
        async with scope_of(client):
            await Item(name="outer").insert()
            with pytest.raises(KeyError):
                async with scope_of(client, propagation="requires_new"):
                    raise KeyError
        assert await stored(database) == ["outer"]


class TestMandatory:
    async def test_joins_an_open_scope(self, client: Any) -> None:
        async with scope_of(client) as outer:
            async with scope_of(client, propagation="mandatory") as inner:
                assert inner is outer

    async def test_raises_where_there_is_none(self, client: Any) -> None:
        with pytest.raises(PropagationError, match="mandatory"):
            async with scope_of(client, propagation="mandatory"):
                pytest.fail("the body ran")

    async def test_raises_where_all_are_outside(self, client: Any) -> None:
        async with scope_of(client):
            with outside_session(), pytest.raises(PropagationError, match="mandatory"):
                async with scope_of(client, propagation="mandatory"):
                    pytest.fail("the body ran")


class TestNever:
    async def test_starts_one_where_there_is_none(self, client: Any, database: Any) -> None:
        async with scope_of(client, propagation="never"):
            await Item(name="a").insert()
        assert await stored(database) == ["a"]

    async def test_raises_inside_a_scope(self, client: Any) -> None:
        async with scope_of(client) as outer:
            with pytest.raises(PropagationError, match="never"):
                async with scope_of(client, propagation="never"):
                    pytest.fail("the body ran")
            assert Item.get_session() is outer
