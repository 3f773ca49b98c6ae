"""G3: operations on one session never overlap. G2: nothing uses a scope that is over."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from beanie import WriteRules
from models import Holder, Item, Linked
from pymongo.errors import PyMongoError
from wire import FailPoint, Wire, names

from beanie_session_scope import (
    ScopeClosedError,
    current_scope,
    outside_session,
    with_session,
)
from beanie_session_scope.channel import SessionChannel
from beanie_session_scope.drivers import DRIVER

TRANSACTIONS = 100


class NoLock:
    """Stands where the lock of a session was, to show what the lock is for."""

    async def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass

    def locked(self) -> bool:
        return False


async def ten_inserts() -> None:
    await asyncio.gather(*(Item(n=n).insert() for n in range(10)))


async def ten_reads_then_ten_inserts() -> None:
    await asyncio.gather(*(Item.find_one(Item.n == n) for n in range(10)))
    await ten_inserts()


async def insert_cascade() -> None:
    await Holder(many=[Linked(n=n) for n in range(10)]).insert(link_rule=WriteRules.WRITE)


async def save_cascade() -> None:
    await Holder(many=[Linked(n=n) for n in range(10)]).save(link_rule=WriteRules.WRITE)


async def insert_then_fetch_all_links() -> None:
    linked = [Linked(n=n) for n in range(10)]
    await Holder(one=linked[0], many=linked).insert(link_rule=WriteRules.WRITE)
    holder = await Holder.find_one()
    assert holder is not None
    await holder.fetch_all_links()
    assert [each.n for each in holder.many] == list(range(10))
    assert holder.one is not None and holder.one.n == 0


async def many_cursors() -> None:
    await Item.insert_many([Item(n=n) for n in range(30)])
    found = await asyncio.gather(
        *(Item.find(batch_size=20).to_list() for _ in range(2)),
        *(Item.aggregate([{"$sort": {"n": 1}}], batchSize=20).to_list() for _ in range(2)),
    )
    assert [len(each) for each in found] == [30] * 4
    await Item.delete_all()
    await ten_inserts()


async def task_group() -> None:
    if sys.version_info < (3, 11):
        await asyncio.gather(*(asyncio.ensure_future(Item(n=n).insert()) for n in range(10)))
        return
    async with asyncio.TaskGroup() as group:
        for n in range(10):
            group.create_task(Item(n=n).insert())


KINDS: dict[str, tuple[Callable[[], Awaitable[None]], str]] = {
    "ten concurrent first inserts": (ten_inserts, "item"),
    "ten concurrent first reads": (ten_reads_then_ten_inserts, "item"),
    "insert with WriteRules.WRITE over ten links": (insert_cascade, "linked"),
    "save with WriteRules.WRITE over ten links": (save_cascade, "linked"),
    "fetch_all_links": (insert_then_fetch_all_links, "linked"),
    "a TaskGroup": (task_group, "item"),
    "four cursors that read in turns": (many_cursors, "item"),
}


class TestConcurrentOperationsInOneTransaction:
    @pytest.mark.parametrize("kind", KINDS)
    async def test_all_commit_whole(self, client: Any, database: Any, kind: str) -> None:
        work, collection = KINDS[kind]
        whole = 0
        for _ in range(TRANSACTIONS):
            await database[collection].delete_many({})
            async with with_session(client=client, collections=[Item, Holder]):
                await work()
                await Holder.delete_all()
            whole += await database[collection].count_documents({}) == 10
        assert whole == TRANSACTIONS

    @pytest.mark.parametrize("kind", ["ten concurrent first inserts", "a TaskGroup"])
    async def test_commit_whole_beside_a_slow_first_read(
        self, client: Any, database: Any, wire: Wire, fail_point: FailPoint, kind: str
    ) -> None:
        with fail_point("find", block_ms=100, times=1):
            async with with_session(client=client, collections=[Item]):
                await beside_a_first_read(wire, KINDS[kind][0])
        assert await database["item"].count_documents({}) == 10

    @pytest.mark.parametrize("kind", ["ten concurrent first inserts", "a TaskGroup"])
    async def test_fail_without_the_lock(
        self, client: Any, database: Any, wire: Wire, fail_point: FailPoint, kind: str
    ) -> None:
        """The same again, and the lock is what makes the difference."""
        with fail_point("find", block_ms=1000, times=1):
            with pytest.raises(Exception) as caught:  # or the group of a TaskGroup
                async with with_session(client=client, collections=[Item]):
                    without_lock()
                    await beside_a_first_read(wire, KINDS[kind][0])
        assert any(isinstance(each, PyMongoError) for each in flat(caught.value))
        await database["item"].delete_many({})

    async def test_on_a_session_bound_twice_share_its_lock(self, client: Any) -> None:
        async with with_session(client=client, collections=[Item]) as session:
            token = Linked.set_session(session)
            await asyncio.gather(
                *(Item(n=n).insert() for n in range(10)),
                *(Linked(n=n).insert() for n in range(10)),
                *(Item(n=n).insert(session=session) for n in range(10)),
            )
            Linked.clear_session(token)
        assert (await Item.count(), await Linked.count()) == (20, 10)


async def beside_a_first_read(wire: Wire, work: Callable[[], Awaitable[None]]) -> None:
    """Begin the work when the read that starts the transaction is under way."""
    loop, under_way = asyncio.get_running_loop(), asyncio.Event()
    wire.on_start = lambda: loop.call_soon_threadsafe(under_way.set)
    reading = asyncio.ensure_future(Item.find_one())
    await under_way.wait()
    outcomes = await asyncio.gather(reading, work(), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


def without_lock() -> None:
    scope = current_scope()
    assert scope is not None
    assert scope._channel is not None
    scope._channel.lock = NoLock()  # type: ignore[assignment]


def flat(error: BaseException) -> list[BaseException]:
    return [error, *(inner for each in getattr(error, "exceptions", ()) for inner in flat(each))]


class TestAfterTheScope:
    @pytest.mark.parametrize("ending", ["commit", "abort"])
    @pytest.mark.parametrize("batch_size", [2, 100], ids=["more to fetch", "all in the buffer"])
    @pytest.mark.parametrize("kind", ["find", "aggregate"])
    async def test_a_cursor_that_was_opened_in_it_raises(
        self, client: Any, ending: str, batch_size: int, kind: str
    ) -> None:
        await Item.insert_many([Item(n=n) for n in range(10)])
        query: Any = (
            Item.find(batch_size=batch_size)
            if kind == "find"
            else Item.aggregate([{"$match": {}}], batchSize=batch_size)
        )
        try:
            async with with_session(client=client, collections=[Item]):
                cursor = query.__aiter__()
                await cursor.__anext__()
                if ending == "abort":
                    raise KeyError
        except KeyError:
            pass

        with pytest.raises(ScopeClosedError, match="after its session scope"):
            await cursor.__anext__()

    @pytest.mark.parametrize("ending", ["commit", "abort"])
    async def test_a_task_that_was_started_in_it_raises(
        self, client: Any, database: Any, ending: str
    ) -> None:
        go_on = asyncio.Event()

        async def late() -> None:
            await go_on.wait()
            await Item(name="late").insert()

        async def late_child() -> None:
            await go_on.wait()
            await asyncio.ensure_future(Item(name="late").insert())

        try:
            async with with_session(client=client, collections=[Item]):
                tasks = [asyncio.ensure_future(late()), asyncio.ensure_future(late_child())]
                await asyncio.sleep(0)
                if ending == "abort":
                    raise KeyError
        except KeyError:
            pass
        go_on.set()

        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ScopeClosedError] * 2
        assert await database["item"].count_documents({}) == 0

    async def test_a_task_that_was_started_outside_on_purpose_goes_on(
        self, client: Any, database: Any
    ) -> None:
        go_on = asyncio.Event()

        async def late() -> None:
            await go_on.wait()
            await Item(name="late").insert()

        async with with_session(client=client, collections=[Item]):
            with outside_session():
                task = asyncio.ensure_future(late())
        go_on.set()
        await task
        assert await database["item"].count_documents({}) == 1

    async def test_its_own_session_raises_also_when_passed_by_hand(self, client: Any) -> None:
        async with with_session(client=client, collections=[Item]) as session:
            pass
        with pytest.raises(ScopeClosedError):
            await Item.find_one(session=session)

    async def test_a_query_built_in_it_runs_where_it_is_awaited(
        self, client: Any, database: Any
    ) -> None:
        async with with_session(client=client, collections=[Item]):
            query = Item.find(Item.n >= 0).inc({Item.n: 1})
        await database["item"].insert_one({"name": "x", "n": 1})
        await query
        assert (await database["item"].find_one({}))["n"] == 2

    async def test_closing_a_cursor_that_was_opened_in_it_is_harmless(self, client: Any) -> None:
        await Item.insert_many([Item(n=n) for n in range(10)])
        async with with_session(client=client, collections=[Item]):
            cursor = collection().find({}, batch_size=2)
            await cursor.next()
        await cursor.close()

    @pytest.mark.parametrize("cancelled", [False, True], ids=["go on", "are cancelled"])
    @pytest.mark.timeout(180)
    async def test_siblings_that_write_while_it_aborts_leave_nothing(
        self, client: Any, database: Any, cancelled: bool
    ) -> None:
        for trial in range(200):
            assert await abort_under_writers(client, cancelled, trial) == []
        assert await database["item"].count_documents({}) == 0

    async def test_the_closed_mark_is_what_stops_them(
        self, client: Any, database: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without it the siblings meet the ended session, or write outside."""

        monkeypatch.setattr(SessionChannel, "close", lambda self, because: None)
        unexpected: list[BaseException] = []
        for trial in range(20):
            unexpected += await abort_under_writers(client, cancelled=False, trial=trial)
        assert unexpected or await database["item"].count_documents({}) > 0


async def abort_under_writers(client: Any, cancelled: bool, trial: int) -> list[BaseException]:
    """Abort a scope in which five tasks write; return what they met but should not have."""

    async def write() -> None:
        while True:
            await Item(name="lost").insert()

    try:
        async with with_session(client=client, collections=[Item]):
            tasks = [asyncio.ensure_future(write()) for _ in range(5)]
            for _ in range(trial % 5):
                await Item.find_one()
            await asyncio.sleep(0)
            if cancelled:
                for task in tasks[:3]:
                    task.cancel()
            raise KeyError
    except KeyError:
        pass
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    expected = (ScopeClosedError, asyncio.CancelledError)
    return [
        each for each in outcomes if isinstance(each, BaseException) and type(each) not in expected
    ]


def collection() -> Any:
    from beanie_session_scope.mixin import GETTER

    return getattr(Item, GETTER)()


class TestCursors:
    @pytest.fixture
    async def items(self, client: Any) -> None:
        await Item.insert_many([Item(n=n) for n in range(10)])

    @pytest.mark.parametrize("batch_size", [3, 100])
    async def test_read_by_iteration(self, client: Any, items: None, batch_size: int) -> None:
        async with with_session(client=client, collections=[Item]):
            cursor = collection().find({}, batch_size=batch_size).sort("n", -1)
            assert [each["n"] async for each in cursor] == list(range(9, -1, -1))

    async def test_read_by_next_and_to_list(self, client: Any, items: None) -> None:
        async with with_session(client=client, collections=[Item]):
            cursor = collection().find({}).sort("n", 1).skip(2).limit(5)
            assert (await cursor.next())["n"] == 2
            assert [each["n"] for each in await cursor.to_list(None)] == [3, 4, 5, 6]

    async def test_count_what_they_fetched_also_when_read_at_the_same_time(
        self, client: Any, items: None
    ) -> None:
        async with with_session(client=client, collections=[Item]):
            cursor = collection().find({}, batch_size=3).sort("n", 1)
            first, some = await asyncio.gather(cursor.next(), cursor.to_list(2))
            assert [first["n"], *(each["n"] for each in some)] == [0, 1, 2]
            assert cursor._fetched == 0, "the next one needs a command, so it needs the lock"
            assert (await cursor.next())["n"] == 3

    async def test_end_with_stop_async_iteration(self, client: Any) -> None:
        async with with_session(client=client, collections=[Item]):
            with pytest.raises(StopAsyncIteration):
                await collection().find({}).next()

    async def test_are_context_managers(self, client: Any, wire: Wire, items: None) -> None:
        async with with_session(client=client, collections=[Item]):
            with wire.record() as seen:
                async with collection().find({}, batch_size=2) as cursor:
                    assert (await cursor.next())["name"] == "new"
            assert names(seen) == ["find", "killCursors"]

    async def test_can_be_cloned(self, client: Any, items: None) -> None:
        async with with_session(client=client, collections=[Item]):
            cursor = collection().find({"n": 3})
            await cursor.next()
            assert (await cursor.clone().next())["n"] == 3

    @pytest.mark.parametrize("name", ["explain", "rewind", "add_option"])
    async def test_refuse_what_a_transaction_can_not_do(
        self, client: Any, items: None, name: str
    ) -> None:
        from beanie_session_scope import UnsupportedInTransactionError

        async with with_session(client=client, collections=[Item]):
            with pytest.raises(UnsupportedInTransactionError, match=name):
                getattr(collection().find({}), name)

    async def test_know_no_other_names_than_the_drivers(self, client: Any) -> None:
        async with with_session(client=client, collections=[Item]):
            with pytest.raises(AttributeError):
                _ = collection().find({}).no_such_thing

    async def test_give_the_drivers_properties(self, client: Any) -> None:
        async with with_session(client=client, collections=[Item]) as session:
            cursor = collection().find({})
            assert cursor.session is not None
            assert cursor.alive
            assert getattr(cursor.session, "session_id", None) == session.session_id


def test_the_driver_layer_knows_which_driver_beanie_uses() -> None:
    import beanie

    assert DRIVER.name == ("PyMongo Async" if beanie.__version__.startswith("2.") else "Motor")
