"""beanie-batteries-queue, with the mixin in its tasks: they are stored with what asks for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio
from application_queue import (
    COLLECTIONS,
    MODELS,
    Order,
    Payment,
    Shipment,
    create_app,
    ship_next,
    ship_next_or_fail,
    take_and_ship,
)
from beanie import init_beanie
from beanie_batteries_queue import State, Task
from wire import DATABASE, Wire, outside

from beanie_session_scope import Rollback, outside_session, with_session


@pytest_asyncio.fixture(autouse=True)
async def collections(client: Any) -> AsyncIterator[None]:
    """The application's collections, empty."""
    await init_beanie(database=client[DATABASE], document_models=MODELS)
    for name in COLLECTIONS:
        await client[DATABASE][name].delete_many({})
    yield
    # Beanie leaves the expressions of its fields in every class that it initialises, parents too.
    # Subclasses that are defined later (the documentation does) would have them as defaults.
    for name in Task.model_fields:
        delattr(Task, name)


@asynccontextmanager
async def serve(client: Any = None) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=create_app(client), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://tests") as http:
        yield http


async def order(http: httpx.AsyncClient, card: str = "valid") -> int:
    response = await http.post("/orders", params={"title": "Emma", "card": card})
    return response.status_code


async def states(database: Any) -> list[str]:
    tasks = database["application_shipment"].find().sort("_id", 1)
    return [task["state"] async for task in tasks]


async def shipped(database: Any) -> int:
    stored = await database["application_order"].find_one()
    return int(stored["shipped"])


def escaped(events: list[Any], session: Any) -> list[str]:
    """Return the commands outside the session's transaction.

    One that takes half a second asks for the server's limit, which is none of the package's.
    """
    return [name for name in outside(events, session) if name != "getParameter"]


class TestNoEscape:
    @pytest.mark.parametrize(
        "operation",
        [
            lambda: Shipment().push(),
            lambda: Shipment.pop(),
            lambda: Shipment.is_empty(),
            lambda: take_and_ship(),
            lambda: anext(Shipment.queue()),
        ],
        ids=["push", "pop", "is_empty", "run and finish", "queue"],
    )
    async def test_every_command_is_in_the_transaction(
        self, operation: Callable[[], Awaitable[Any]], wire: Wire
    ) -> None:
        placed = await Order(title="Emma").insert()
        await Shipment(order_id=placed.id).push()

        async with with_session(collections=MODELS) as session:
            with wire.record() as events:
                await operation()
            assert events
            assert escaped(events, session) == []

    async def test_tasks_that_depend_on_others_too(self, wire: Wire) -> None:
        async with with_session(collections=MODELS) as session:
            with wire.record() as events:
                payment = Payment()
                await payment.push()
                await Shipment(after=[payment]).push()
                assert await Shipment.pop() is None
                await payment.finish()
                assert await Shipment.pop() is not None
            assert escaped(events, session) == []


class TestOrder:
    async def test_a_task_is_stored_with_its_order(self, client: Any, database: Any) -> None:
        async with serve(client) as http:
            assert await order(http) == 201

        assert await states(database) == ["CREATED"]

    async def test_a_request_that_fails_leaves_no_task(self, client: Any, database: Any) -> None:
        async with serve(client) as http:
            assert await order(http, card="expired") == 500

        assert await states(database) == []
        assert await ship_next() is None

    async def test_without_a_scope_the_task_of_a_failed_request_is_run(self, database: Any) -> None:
        async with serve() as http:
            assert await order(http, card="expired") == 500

        await ship_next()

        assert await shipped(database) == 1

    async def test_no_worker_sees_a_task_before_it_is_committed(self) -> None:
        async with with_session(collections=MODELS):
            await Shipment().push()
            with outside_session():
                assert await Shipment.pop() is None

        assert await Shipment.pop() is not None


class TestWorker:
    @pytest_asyncio.fixture
    async def placed(self, client: Any) -> None:
        """An order that is to be shipped."""
        async with serve(client) as http:
            assert await order(http) == 201

    @pytest.mark.usefixtures("placed")
    async def test_work_and_state_are_committed_together(self, database: Any) -> None:
        await ship_next()

        assert await states(database) == ["FINISHED"]
        assert await shipped(database) == 1

    @pytest.mark.usefixtures("placed")
    async def test_a_worker_that_is_stopped_leaves_the_task_to_the_next_one(
        self, database: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.stop_before_finish(monkeypatch)
        with pytest.raises(asyncio.CancelledError):
            await ship_next()
        monkeypatch.undo()

        assert await states(database) == ["CREATED"]
        await ship_next()
        assert await shipped(database) == 1

    @pytest.mark.usefixtures("placed")
    async def test_without_a_scope_the_work_is_done_and_the_task_runs_for_ever(
        self, database: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.stop_before_finish(monkeypatch)
        with pytest.raises(asyncio.CancelledError):
            await take_and_ship()

        assert await states(database) == ["RUNNING"]
        assert await shipped(database) == 1

    def stop_before_finish(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def stopped(task: Any) -> None:
            raise asyncio.CancelledError

        monkeypatch.setattr(Shipment, "finish", stopped)

    @pytest.mark.usefixtures("placed")
    async def test_a_task_that_fails_half_way_has_changed_nothing_but_its_state(
        self, database: Any
    ) -> None:
        await Shipment.find_one().update({"$set": {"address": ""}})

        await ship_next_or_fail()

        assert await states(database) == ["FAILED"]
        assert await shipped(database) == 0

    async def test_workers_at_the_same_time_do_each_task_once(
        self, client: Any, database: Any
    ) -> None:
        async with serve(client) as http:
            for _ in range(5):
                await order(http)

        done = await asyncio.gather(*(ship_next() for _ in range(5)))

        assert len({shipment.id for shipment in done if shipment is not None}) == 5
        assert await states(database) == ["FINISHED"] * 5
        assert await Order.find({"shipped": 1}).count() == 5

    async def test_a_queue_that_is_polled_inside_a_scope_sees_no_later_task(self) -> None:
        async with with_session(collections=MODELS):
            assert await Shipment.pop() is None
            with outside_session():
                await Shipment().push()
            assert await Shipment.pop() is None
            raise Rollback

        task = await Shipment.pop()
        assert task is not None and task.state is State.RUNNING

    async def test_the_queue_of_the_package_works_where_its_tasks_open_their_own_scope(
        self, client: Any, database: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        queue = Shipment.queue()
        run = Shipment.run

        async def run_in_scope(shipment: Shipment) -> None:
            async with with_session(collections=MODELS):
                await run(shipment)
            queue.stop()

        monkeypatch.setattr(Shipment, "run", run_in_scope)
        async with serve(client) as http:
            await order(http)

        await asyncio.wait_for(queue.start(), 10)

        assert await states(database) == ["FINISHED"]
        assert await shipped(database) == 1
