"""Transactions that compete for a document: ``python -m benchmarks.contention``.

Each task increments one counter and inserts a document, several times. Where MongoDB fails one
because of the conflict, it is run again. By hand that is a loop as MongoDB's manual shows it, which
begins again at once. The time is that of all transactions, divided by their number.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from pymongo.errors import PyMongoError

from beanie_session_scope import run_in_transaction
from beanie_session_scope.drivers import DRIVER

from .measure import Block, Row, Sample, Stopwatch, measure
from .models import PlainCounter, PlainEntry, ScopedCounter, ScopedEntry
from .suite import Benchmark, Setting, main
from .ways import transaction_by_hand

Body = Callable[..., Awaitable[None]]
Run = Callable[[Any, Body], Awaitable[None]]

TRANSIENT = "TransientTransactionError"
UNKNOWN_COMMIT = "UnknownTransactionCommitResult"


async def loop_by_hand(client: Any, body: Body) -> None:
    """Run a transaction, and again after each error that MongoDB calls transient."""
    while True:
        try:
            async with transaction_by_hand(client) as session:
                await body(session=session)
            return
        except PyMongoError as error:
            # A commit of unknown outcome can't be run again: it may have been applied.
            if not error.has_error_label(TRANSIENT):
                raise


async def drivers_way(client: Any, body: Body) -> None:
    """Let the driver do it."""

    async def callback(session: Any) -> None:
        await body(session=session)

    session = await DRIVER.start_session(client)
    try:
        await session.with_transaction(callback)
    finally:
        await session.end_session()


async def packages_way(client: Any, body: Body) -> None:
    """Let the package do it."""
    await run_in_transaction(body, client=client, collections=[ScopedCounter, ScopedEntry])


LOOP, DRIVERS, PACKAGES = "by hand", "with_transaction", "run_in_transaction"
RUNS: dict[str, tuple[Run, Any, Any]] = {
    LOOP: (loop_by_hand, PlainCounter, PlainEntry),
    DRIVERS: (drivers_way, PlainCounter, PlainEntry),
    PACKAGES: (packages_way, ScopedCounter, ScopedEntry),
}


def competing(setting: Setting, way: str, tasks: int, transactions: int) -> Block:
    """Let tasks compete for one document."""
    run, counter, entry = RUNS[way]

    async def block() -> Sample:
        hot = await counter().insert()
        attempts = failed = 0

        async def body(**session: Any) -> None:
            nonlocal attempts
            attempts += 1
            await counter.find_one(counter.id == hot.id).inc({counter.value: 1}, **session)
            await entry(number=0).insert(**session)

        async def task() -> None:
            nonlocal failed
            for _ in range(transactions // tasks):
                try:
                    await run(setting.client, body)
                except PyMongoError:
                    failed += 1

        total = transactions // tasks * tasks
        with Stopwatch(total) as watch:
            await asyncio.gather(*(task() for _ in range(tasks)))
        stored = await counter.get(hot.id)
        return {
            **watch.spent,
            "attempts": attempts / total,
            "failed": failed,
            "lost": total - failed - stored.value,
        }

    return block


async def rows(setting: Setting) -> AsyncIterator[Row]:
    for tasks in setting.pick((1, 2, 4, 8, 16, 32), (1, 4, 16), (1, 3)):
        transactions = setting.pick(64, 32, 6)
        blocks = {way: competing(setting, way, tasks, transactions) for way in RUNS}
        yield await measure("one counter", blocks, setting.pick(9, 3, 1), x=tasks)


BENCHMARK = Benchmark("contention", "Retries under contention", rows, x_name="tasks", plot="lines")

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
