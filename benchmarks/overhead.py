"""The overhead table: ``python -m benchmarks.overhead [--rounds N] [--only TEXT]``.

Uses the server at ``$MONGODB_URI``, or an embedded replica set of one node.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from statistics import median
from time import perf_counter
from typing import Any

from beanie import Document, init_beanie
from beanie.operators import Inc

from beanie_session_scope import SessionScopeMixin, with_session
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.testing import ReplicaSet

from .measure import HEADER, Comparison, Spent, Stopwatch, compare

GOALS = {
    "find_one": "1.03 / 1.05",
    "insert": "1.03 / 1.05",
    "update": "1.03 / 1.05",
    "cursor of 1,000 documents": "1.03 / 1.05",
    "aggregate": "1.03 / 1.05",
    "unbound find_one": "1.01",
    "unbound insert": "1.01",
    "creating an instance": "1.05",
    "creating an instance, bound": "1.05",
    "scope with one insert": "1.05",
    "empty scope": "+25 us",
    "1,000 concurrent scopes, two writes each": "1/0.95 = 1.053",
}


class Plain(Document):
    color: str
    size: int = 1
    tags: list[str] = []

    class Settings:
        indexes = ["color"]


class Scoped(SessionScopeMixin, Document):
    color: str
    size: int = 1
    tags: list[str] = []

    class Settings:
        indexes = ["color"]


Operation = Callable[[Any, dict[str, Any]], Awaitable[object]]


@asynccontextmanager
async def transaction_by_hand(client: Any) -> AsyncIterator[Any]:
    session = await DRIVER.start_session(client)
    try:
        await DRIVER.start_transaction(session)
        yield session
        await session.commit_transaction()
    finally:
        await session.end_session()


class Overhead:
    def __init__(self, client: Any, rounds: int) -> None:
        self.client = client
        self.rounds = rounds

    async def operation(self, name: str, run: Operation, per_round: int) -> Comparison:
        """Compare an operation with ``session=`` to the same operation of a bound class."""

        async def by_hand() -> Spent:
            async with transaction_by_hand(self.client) as session:
                await run(Plain, {"session": session})
                with Stopwatch(per_round) as watch:
                    for _ in range(per_round):
                        await run(Plain, {"session": session})
            return watch.spent

        async def scoped() -> Spent:
            async with with_session(client=self.client, collections=[Scoped]):
                await run(Scoped, {})
                with Stopwatch(per_round) as watch:
                    for _ in range(per_round):
                        await run(Scoped, {})
            return watch.spent

        return await compare(name, by_hand, scoped, self.rounds)

    async def unbound(self, name: str, run: Operation, per_round: int) -> Comparison:
        async def block(model: Any) -> Spent:
            with Stopwatch(per_round) as watch:
                for _ in range(per_round):
                    await run(model, {})
            return watch.spent

        return await compare(name, lambda: block(Plain), lambda: block(Scoped), self.rounds)

    async def instances(self, name: str, bound: bool) -> Comparison:
        async def block(model: Any) -> Spent:
            context = (
                with_session(client=self.client, collections=[Scoped]) if bound else nullcontext()
            )
            async with context:
                with Stopwatch(2_000) as watch:
                    for _ in range(2_000):
                        model(color="red", size=2)
            return watch.spent

        return await compare(name, lambda: block(Plain), lambda: block(Scoped), self.rounds * 3)

    async def scopes(self, name: str, insert: bool, per_round: int) -> Comparison:
        async def by_hand() -> Spent:
            with Stopwatch(per_round) as watch:
                for _ in range(per_round):
                    async with transaction_by_hand(self.client) as session:
                        if insert:
                            await Plain(color="red").insert(session=session)
            return watch.spent

        async def scoped() -> Spent:
            with Stopwatch(per_round) as watch:
                for _ in range(per_round):
                    async with with_session(client=self.client, collections=[Scoped]):
                        if insert:
                            await Scoped(color="red").insert()
            return watch.spent

        return await compare(name, by_hand, scoped, self.rounds)

    async def concurrent(self, name: str, scopes: int) -> Comparison:
        async def one_by_hand() -> None:
            async with transaction_by_hand(self.client) as session:
                await Plain(color="red").insert(session=session)
                await Plain(color="red").insert(session=session)

        async def one_scoped() -> None:
            async with with_session(client=self.client, collections=[Scoped]):
                await Scoped(color="red").insert()
                await Scoped(color="red").insert()

        async def block(one: Callable[[], Awaitable[None]]) -> Spent:
            with Stopwatch(scopes) as watch:
                await asyncio.gather(*(one() for _ in range(scopes)))
            return watch.spent

        return await compare(
            name, lambda: block(one_by_hand), lambda: block(one_scoped), max(5, self.rounds // 4)
        )

    async def memory_of_open_scopes(self, scopes: int) -> tuple[float, float]:
        """Return the bytes per open transaction, by hand and in a scope."""

        async def held(open_one: Callable[[], Any]) -> float:
            async with AsyncExitStack() as stack:
                tracemalloc.start()
                before = tracemalloc.get_traced_memory()[0]
                for _ in range(scopes):
                    await stack.enter_async_context(open_one())
                after = tracemalloc.get_traced_memory()[0]
                tracemalloc.stop()
            return (after - before) / scopes

        by_hand = await held(lambda: transaction_by_hand(self.client))
        scoped = await held(
            lambda: with_session(
                client=self.client, collections=[Scoped], propagation="requires_new"
            )
        )
        return by_hand, scoped


def import_times(rounds: int) -> tuple[float, float]:
    """Return the median seconds of a process that imports Beanie, and of one that adds us."""

    def once(modules: str) -> float:
        start = perf_counter()
        subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
        return perf_counter() - start

    pairs = [(once("beanie"), once("beanie, beanie_session_scope")) for _ in range(rounds)]
    return median(a for a, _ in pairs), median(b for _, b in pairs)


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
    assert count == 1_000
    return count


async def aggregate(model: Any, session: dict[str, Any]) -> object:
    pipeline = [{"$match": {"color": "target"}}, {"$group": {"_id": "$color"}}]
    return await model.aggregate(pipeline, **session).to_list()


async def prepare(client: Any) -> None:
    await client.drop_database("overhead")
    await init_beanie(database=client["overhead"], document_models=[Plain, Scoped])
    for model in (Plain, Scoped):
        await model(color="target").insert()
        await model.insert_many([model(color="many") for _ in range(1_000)])


async def run(uri: str, rounds: int, only: str) -> None:
    client = DRIVER.client_class(uri)
    await prepare(client)
    bench = Overhead(client, rounds)
    rows: list[tuple[str, Callable[[str], Awaitable[Comparison]]]] = [
        ("find_one", lambda n: bench.operation(n, find_one, 60)),
        ("insert", lambda n: bench.operation(n, insert, 60)),
        ("update", lambda n: bench.operation(n, update, 60)),
        ("cursor of 1,000 documents", lambda n: bench.operation(n, iterate, 3)),
        ("aggregate", lambda n: bench.operation(n, aggregate, 60)),
        ("unbound find_one", lambda n: bench.unbound(n, find_one, 100)),
        ("unbound insert", lambda n: bench.unbound(n, insert, 100)),
        ("creating an instance", lambda n: bench.instances(n, bound=False)),
        ("creating an instance, bound", lambda n: bench.instances(n, bound=True)),
        ("scope with one insert", lambda n: bench.scopes(n, insert=True, per_round=30)),
        ("empty scope", lambda n: bench.scopes(n, insert=False, per_round=100)),
        ("1,000 concurrent scopes, two writes each", lambda n: bench.concurrent(n, 1_000)),
    ]
    print(f"\n{DRIVER.name}, Python {sys.version.split()[0]}, {rounds} rounds")
    print(HEADER + "   goal")
    for name, measure in rows:
        if only in name:
            print((await measure(name)).row() + f"   {GOALS[name]}", flush=True)
    if not only:
        by_hand, scoped = await bench.memory_of_open_scopes(500)
        print(f"memory per open transaction: {by_hand:,.0f} bytes by hand, {scoped:,.0f} scoped")
        beanie, ours = import_times(max(5, rounds // 4))
        print(f"import: {beanie * 1e3:.0f} ms for Beanie, {ours * 1e3:.0f} ms with this package")
    await client.drop_database("overhead")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", default="", help="only the rows whose name holds this text")
    arguments = parser.parse_args()
    if uri := os.environ.get("MONGODB_URI"):
        asyncio.run(run(uri, arguments.rounds, arguments.only))
    else:
        with ReplicaSet() as replica_set:
            asyncio.run(run(replica_set.uri, arguments.rounds, arguments.only))


if __name__ == "__main__":
    main()
