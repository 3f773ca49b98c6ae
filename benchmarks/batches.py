"""A change to every document of a collection: ``python -m benchmarks.batches``.

Both ways run a transaction for each batch, write with Beanie's ``BulkWriter``, and store in the
same transaction how far they have come. The time is that of one document.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from beanie import BulkWriter

from beanie_session_scope.migration import migrate_in_batches

from .contention import drivers_way
from .measure import Block, Row, Sample, Stopwatch, measure
from .models import PlainEntry, ScopedEntry
from .suite import Benchmark, Setting, main


async def by_hand(setting: Setting, batch_size: int) -> None:
    """Change all documents, from one id to the next."""
    checkpoints = setting.database["checkpoints"]
    name = uuid4().hex
    position: Any = None

    async def batch(session: Any) -> None:
        nonlocal position
        after = {} if position is None else {"_id": {"$gt": position}}
        found = PlainEntry.find(after, sort="+_id", limit=batch_size, session=session)
        writer = BulkWriter(session=session)
        last = None
        async for document in found:
            change(document)
            await document.save(bulk_writer=writer)
            last = document.id
        if last is not None:
            await writer.commit()
            step = {"$set": {"position": last}}
            await checkpoints.update_one({"_id": name}, step, upsert=True, session=session)
        reached[0] = last

    reached: list[Any] = [None]
    while True:
        await drivers_way(setting.client, batch)
        if reached[0] is None:
            break
        position = reached[0]


async def with_package(setting: Setting, batch_size: int) -> None:
    """Change all documents with the package."""
    await migrate_in_batches(
        ScopedEntry, change, name=uuid4().hex, batch_size=batch_size, progress="off"
    )


def change(document: Any) -> None:
    document.number += 1


def migration(setting: Setting, model: Any, migrate: Any, count: int, batch_size: int) -> Block:
    """Change all documents, and look whether each was changed once."""

    async def block() -> Sample:
        await model.delete_all()
        await model.insert_many([model(number=0) for _ in range(count)])
        with Stopwatch(count) as watch:
            await migrate(setting, batch_size)
        assert await model.find(model.number == 1).count() == count
        return watch.spent

    return block


async def rows(setting: Setting) -> AsyncIterator[Row]:
    count = setting.pick(5_000, 1_000, 20)
    for batch_size in setting.pick((10, 100, 1_000), (100, 1_000), (10,)):
        blocks = {
            "by hand": migration(setting, PlainEntry, by_hand, count, batch_size),
            "migrate_in_batches": migration(setting, ScopedEntry, with_package, count, batch_size),
        }
        rounds = setting.pick(7, 3, 1)
        yield await measure(f"{count:,} documents", blocks, rounds, x=batch_size)


BENCHMARK = Benchmark("batches", "Batches", rows, x_name="a batch", plot="lines")

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
