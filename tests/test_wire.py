"""G9: a scope puts nothing on the wire that the same code by hand would not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from models import Item
from wire import Wire, names

from beanie_session_scope import Rollback, with_session
from beanie_session_scope.drivers import DRIVER

Body = Callable[[dict[str, Any]], Awaitable[object]]


async def nothing(session: dict[str, Any]) -> None:
    pass


async def one_insert(session: dict[str, Any]) -> None:
    await Item().insert(**session)


async def reads_and_writes(session: dict[str, Any]) -> None:
    item = await Item(n=1).insert(**session)
    await item.set({Item.n: 2}, **session)
    await Item.find(Item.n == 2, **session).update({"$inc": {"n": 1}}, **session)
    assert len(await Item.find_all(**session).to_list()) == 1
    await item.delete(**session)


async def a_long_cursor(session: dict[str, Any]) -> None:
    await Item.insert_many([Item(n=n) for n in range(30)], **session)
    async for _ in Item.find({}, batch_size=10, **session):
        pass
    async for _ in Item.aggregate([{"$match": {}}], batchSize=10, **session):
        pass


async def a_cursor_left_early(session: dict[str, Any]) -> None:
    await Item.insert_many([Item(n=n) for n in range(30)], **session)
    assert await Item.find({}, **session).first_or_none() is not None
    assert len(await Item.find({}, batch_size=10, **session).to_list(5)) == 5


BODIES = [nothing, one_insert, reads_and_writes, a_long_cursor, a_cursor_left_early]


@asynccontextmanager
async def by_hand(client: Any, abort: bool) -> AsyncIterator[Any]:
    session = await DRIVER.start_session(client)
    await DRIVER.start_transaction(session)
    yield session
    await (session.abort_transaction() if abort else session.commit_transaction())
    await session.end_session()


@pytest.mark.parametrize("abort", [False, True], ids=["commit", "abort"])
@pytest.mark.parametrize("body", BODIES)
async def test_a_scope_sends_what_the_code_by_hand_sends(
    client: Any, wire: Wire, body: Body, abort: bool
) -> None:
    with wire.record() as hand:
        async with by_hand(client, abort) as session:
            await body({"session": session})
    await Item.delete_all()
    with wire.record() as scoped:
        async with with_session(client=client, collections=[Item]):
            await body({})
            if abort:
                raise Rollback

    assert names(scoped) == names(hand)
    changing = {"lsid", "txnNumber", "$clusterTime", "documents", "getMore", "readConcern"}
    for mine, theirs in zip(scoped, hand, strict=True):
        assert set(mine.command) - changing == set(theirs.command) - changing


async def test_an_empty_scope_sends_nothing(client: Any, wire: Wire) -> None:
    with wire.record() as seen:
        async with with_session(client=client):
            pass
    assert seen == []
