"""The cost of operations, and of a transaction: ``python -m benchmarks.overhead``.

The operations of bound classes are those of one transaction, after its first one. In the rows about
unbound classes and instances, "by hand" is a class without the mixin.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from typing import Any

from beanie.operators import Inc

from beanie_session_scope import with_session

from .measure import Block, Goal, Row, Sample, Stopwatch, measure
from .models import Plain, Scoped
from .suite import Benchmark, Setting, main
from .ways import BY_HAND, SCOPE, WAYS, Way

Operation = Callable[[Any, dict[str, Any]], Awaitable[object]]

BOUND = (Goal("wall", 1.03), Goal("cpu", 1.05))
MANY = 1_000


async def find_one(model: Any, session: dict[str, Any]) -> object:
    return await model.find_one(model.color == "target", **session)


async def insert(model: Any, session: dict[str, Any]) -> object:
    return await model(color="new").insert(**session)


async def update(model: Any, session: dict[str, Any]) -> object:
    return await model.find_one(model.color == "target").update(Inc({model.size: 1}), **session)


async def iterate(model: Any, session: dict[str, Any]) -> object:
    count = 0
    async for _ in model.find(model.color == "many", **session):
        count += 1
    assert count == MANY
    return count


async def aggregate(model: Any, session: dict[str, Any]) -> object:
    pipeline = [{"$match": {"color": "target"}}, {"$group": {"_id": "$color"}}]
    return await model.aggregate(pipeline, **session).to_list()


def in_transaction(setting: Setting, way: Way, run: Operation, count: int) -> Block:
    """Run an operation again and again in one transaction, after a first time."""

    async def block() -> Sample:
        async with way.open(setting.client) as session:
            arguments = way.arguments(session)
            await run(way.model, arguments)
            with Stopwatch(count) as watch:
                for _ in range(count):
                    await run(way.model, arguments)
        return watch.spent

    return block


def unbound(model: Any, run: Operation, count: int) -> Block:
    """Run an operation again and again outside any transaction."""

    async def block() -> Sample:
        with Stopwatch(count) as watch:
            for _ in range(count):
                await run(model, {})
        return watch.spent

    return block


def instances(setting: Setting, model: Any, bound: bool, count: int) -> Block:
    """Create documents in memory."""

    async def block() -> Sample:
        async with with_session(setting.client, [Scoped]) if bound else nullcontext():
            with Stopwatch(count) as watch:
                for _ in range(count):
                    model(color="red", size=2)
        return watch.spent

    return block


def transactions(setting: Setting, way: Way, with_insert: bool, count: int) -> Block:
    """Open transactions one after the other."""

    async def block() -> Sample:
        with Stopwatch(count) as watch:
            for _ in range(count):
                async with way.open(setting.client) as session:
                    if with_insert:
                        await insert(way.model, way.arguments(session))
        return watch.spent

    return block


async def prepare() -> None:
    for model in (Plain, Scoped):
        await model(color="target").insert()
        await model.insert_many([model(color="many") for _ in range(MANY)])


async def rows(setting: Setting) -> AsyncIterator[Row]:
    await prepare()
    rounds = setting.pick(30, 10, 2)
    count = setting.pick(60, 30, 3)
    operations: list[tuple[str, Operation, int]] = [
        ("find_one", find_one, count),
        ("insert", insert, count),
        ("update", update, count),
        (f"cursor of {MANY:,} documents", iterate, setting.pick(3, 1, 1)),
        ("aggregate", aggregate, count),
    ]
    for name, run, times in operations:
        blocks = {way.name: in_transaction(setting, way, run, times) for way in WAYS}
        yield await measure(name, blocks, rounds, goals=BOUND)
    for name, run, _ in operations[:2]:
        blocks = {way.name: unbound(way.model, run, count) for way in (BY_HAND, SCOPE)}
        yield await measure(f"unbound {name}", blocks, rounds, goals=[Goal("wall", 1.01)])
    for name, bound in (("new instance", False), ("new instance, bound", True)):
        made = setting.pick(2_000, 1_000, 10)
        blocks = {
            BY_HAND.name: instances(setting, Plain, bound, made),
            SCOPE.name: instances(setting, Scoped, bound, made),
        }
        yield await measure(name, blocks, 3 * rounds, goals=[Goal("wall", 1.05)])
    blocks = {way.name: transactions(setting, way, True, count // 2) for way in WAYS}
    name = "transaction with one insert"
    yield await measure(name, blocks, rounds, goals=[Goal("wall", 1.05)])


BENCHMARK = Benchmark("overhead", "Overhead", rows)

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
