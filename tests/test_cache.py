"""G7: with ``use_cache``, nothing uncommitted is stored and nothing stale is served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from models import Cached

from beanie_session_scope import Rollback, with_session

Read = Callable[[], Awaitable[Any]]


async def names_in_list() -> Any:
    return [each.name for each in await Cached.find(Cached.n == 1).to_list()]


async def name_of_first() -> Any:
    found = await Cached.find(Cached.n == 1).first_or_none()
    return [found.name] if found else []


async def name_of_one() -> Any:
    found = await Cached.find_one(Cached.n == 1)
    return [found.name] if found else []


async def names_in_aggregate() -> Any:
    pipeline = [{"$match": {"n": 1}}, {"$project": {"name": 1}}]
    return [each["name"] for each in await Cached.aggregate(pipeline).to_list()]


READS: list[Read] = [names_in_list, name_of_first, name_of_one, names_in_aggregate]


@pytest.fixture(autouse=True)
async def one_document(client: Any) -> None:
    await Cached(name="committed", n=1).insert()


@pytest.mark.parametrize("read", READS)
class TestAScope:
    async def test_stores_nothing_uncommitted(self, client: Any, read: Read) -> None:
        async with with_session(client=client, collections=[Cached]):
            await Cached.find_one(Cached.n == 1).set({Cached.name: "uncommitted"})
            assert await read() == ["uncommitted"]
            raise Rollback
        assert await read() == ["committed"]

    async def test_is_served_nothing_stale(self, client: Any, read: Read) -> None:
        assert await read() == ["committed"]
        async with with_session(client=client, collections=[Cached]):
            await Cached.find_one(Cached.n == 1).set({Cached.name: "changed"})
            assert await read() == ["changed"]
            raise Rollback

    async def test_is_not_seen_by_other_tasks(self, client: Any, read: Read) -> None:
        changed, looked = asyncio.Event(), asyncio.Event()

        async def look() -> Any:
            await changed.wait()
            found = await read()
            looked.set()
            return found

        other = asyncio.ensure_future(look())
        async with with_session(client=client, collections=[Cached]):
            await Cached.find_one(Cached.n == 1).set({Cached.name: "uncommitted"})
            await read()
            changed.set()
            await looked.wait()
        assert await other == ["committed"]

    async def test_leaves_the_cache_working_outside(
        self, client: Any, database: Any, read: Read
    ) -> None:
        async with with_session(client=client, collections=[Cached]):
            await read()
        assert await read() == ["committed"]
        await database["cached"].update_one({"n": 1}, {"$set": {"name": "behind its back"}})
        assert await read() == ["committed"], "this answer is the cache's"
        assert Cached.get_settings().use_cache is True
