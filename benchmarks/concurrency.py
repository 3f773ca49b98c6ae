"""Many transactions at once, each in a task: ``python -m benchmarks.concurrency``.

Each task opens a transaction and inserts two documents. The time is that of all of them, divided
by their number.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from .measure import Block, Goal, Row, Sample, Stopwatch, measure
from .suite import Benchmark, Setting, main
from .ways import WAYS, Way


def at_once(setting: Setting, way: Way, tasks: int, least: int) -> Block:
    """Run so many transactions at once; again, until there were as many as asked for."""

    async def one() -> None:
        async with way.open(setting.client) as session:
            arguments = way.arguments(session)
            await way.model(color="first").insert(**arguments)
            await way.model(color="second").insert(**arguments)

    times = max(1, least // tasks)

    async def block() -> Sample:
        with Stopwatch(times * tasks) as watch:
            for _ in range(times):
                await asyncio.gather(*(one() for _ in range(tasks)))
        return watch.spent

    return block


async def rows(setting: Setting) -> AsyncIterator[Row]:
    for tasks in setting.pick((1, 3, 10, 30, 100, 300, 1_000), (1, 10, 100, 1_000), (1, 3)):
        # Of throughput, 0.95 of what it is by hand.
        goals = [Goal("wall", 1 / 0.95)] if tasks == 1_000 else []
        least = setting.pick(60, 20, 1)
        blocks = {way.name: at_once(setting, way, tasks, least) for way in WAYS}
        rounds = setting.pick(15 if tasks < 300 else 9, 3, 1)
        yield await measure("two inserts", blocks, rounds, x=tasks, goals=goals)


BENCHMARK = Benchmark("concurrency", "Transactions at once", rows, x_name="at once", plot="lines")

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
