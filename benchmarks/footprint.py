"""What there is to pay once: ``python -m benchmarks.footprint``.

The time to open a transaction and to leave it, without an operation, which sends nothing to the
server; the memory of one that is open; and the time of a Python process that imports Beanie alone,
and this package as well.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

from beanie_session_scope import with_session

from .measure import Block, Goal, Row, Sample, Stopwatch, measure
from .models import Scoped
from .overhead import transactions
from .suite import Benchmark, Setting, main
from .ways import BY_HAND, SCOPE, WAYS, Way

INDEPENDENT = replace(
    SCOPE, open=lambda client: with_session(client, [Scoped], propagation="requires_new")
)


def memory(setting: Setting, way: Way, count: int) -> Block:
    """Hold many transactions open at once, before their first operation."""

    async def block() -> Sample:
        async with AsyncExitStack() as stack:
            tracemalloc.start()
            try:
                before, _ = tracemalloc.get_traced_memory()
                for _ in range(count):
                    await stack.enter_async_context(way.open(setting.client))
                after, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        return {"memory": (after - before) / count}

    return block


def imports(modules: str) -> Block:
    """Start a Python process that imports something."""

    async def block() -> Sample:
        with Stopwatch() as watch:
            await asyncio.to_thread(
                subprocess.run, [sys.executable, "-c", f"import {modules}"], check=True
            )
        return {"wall": watch.spent["wall"]}

    return block


async def rows(setting: Setting) -> AsyncIterator[Row]:
    count = setting.pick(100, 50, 3)
    blocks = {way.name: transactions(setting, way, False, count) for way in WAYS}
    goals = [Goal("wall", 25e-6, "difference")]
    yield await measure("empty transaction", blocks, setting.pick(30, 10, 2), goals=goals)
    count = setting.pick(500, 100, 10)
    blocks = {way.name: memory(setting, way, count) for way in (BY_HAND, INDEPENDENT)}
    yield await measure("memory of an open transaction", blocks, setting.pick(5, 3, 1))
    blocks = {
        BY_HAND.name: imports("beanie"),
        SCOPE.name: imports("beanie, beanie_session_scope"),
    }
    rounds = setting.pick(11, 3, 1)
    yield await measure("import", blocks, rounds, warm_up=setting.size != "tiny")


BENCHMARK = Benchmark("footprint", "Footprint", rows, plot="bars")

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
