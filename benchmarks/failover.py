"""Transactions while the primary of three nodes is killed: ``python -m benchmarks.failover``.

All ways run at the same time, and live through the same failovers. The time is the longest one in
which no transaction of a way was acknowledged. Afterwards the data is compared with what the
callers were told.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from itertools import count, pairwise
from typing import Any

from pymongo import MongoClient
from pymongo.errors import PyMongoError
from pymongo.write_concern import WriteConcern

from beanie_session_scope import SessionScopeError
from beanie_session_scope.testing import Member, ReplicaSet

from .contention import DRIVERS, PACKAGES, RUNS
from .measure import Row, Sample, row_of
from .suite import DATABASE, Benchmark, Setting, main

WORKERS = 3
ENOUGH = 10
"""How many transactions of each way shall succeed after the failover."""


class Teller:
    """Runs transactions in one way, and keeps what its callers were told.

    Args:
        client: A client of the replica set.
        way: The way.
    """

    def __init__(self, client: Any, way: str) -> None:
        self._client = client
        self._run, self._counter, self._entry = RUNS[way]
        self._counters: list[Any] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False
        self.acknowledged: dict[int, float] = {}
        self.failed: set[int] = set()

    async def start(self) -> None:
        """Begin: each task has a counter of its own, so that they don't compete."""
        await self._entry.delete_all()
        self._counters = [await self._counter().insert() for _ in range(WORKERS)]
        numbers = count()
        self._tasks = [
            asyncio.ensure_future(self._work(counter, numbers)) for counter in self._counters
        ]

    async def stop(self) -> None:
        """Let what is under way come to its end."""
        self._stopped = True
        await asyncio.gather(*self._tasks)

    async def reaches(self, number: int, since: float) -> None:
        """Wait until so many transactions were acknowledged after a moment."""
        while sum(moment > since for moment in self.acknowledged.values()) < number:
            await asyncio.sleep(0.01)

    async def sample(self, since: float) -> Sample:
        """Compare the data with what was told.

        Args:
            since: When the primary was killed.
        """
        moments = [since, *(m for m in sorted(self.acknowledged.values()) if m > since)]
        stored = Counter([entry.number async for entry in self._entry.find_all()])
        counted = [await self._counter.get(counter.id) for counter in self._counters]
        return {
            "wall": max(after - before for before, after in pairwise(moments)),
            "failed": len(self.failed),
            "lost": len(set(self.acknowledged) - set(stored)),
            "twice": sum(times > 1 for times in stored.values()),
            "halves": abs(sum(each.value for each in counted) - sum(stored.values())),
        }

    async def _work(self, counter: Any, numbers: Any) -> None:
        while not self._stopped:
            number = next(numbers)
            try:
                await self._run(self._client, self._transaction(counter.id, number))
            except (PyMongoError, SessionScopeError):
                self.failed.add(number)
            else:
                self.acknowledged[number] = time.monotonic()

    def _transaction(self, counter: Any, number: int) -> Any:
        async def body(**session: Any) -> None:
            found = self._counter.find_one(self._counter.id == counter)
            await found.inc({self._counter.value: 1}, **session)
            await self._entry(number=number).insert(**session)

        return body


async def failover(client: Any, replica_set: ReplicaSet) -> dict[str, Sample]:
    """Kill the primary under load, and wait until all goes on."""
    tellers = {way: Teller(client, way) for way in (DRIVERS, PACKAGES)}
    for teller in tellers.values():
        await teller.start()
    await asyncio.gather(*(teller.reaches(ENOUGH, 0) for teller in tellers.values()))
    primary = replica_set.primary
    killed = time.monotonic()
    await asyncio.to_thread(replica_set.kill, primary)
    await asyncio.to_thread(replica_set.wait_for_primary)
    since = time.monotonic()
    await asyncio.gather(*(teller.reaches(ENOUGH, since) for teller in tellers.values()))
    await asyncio.gather(*(teller.stop() for teller in tellers.values()))
    await asyncio.to_thread(mend, replica_set, primary)
    return {way: await teller.sample(killed) for way, teller in tellers.items()}


def mend(replica_set: ReplicaSet, member: Member) -> None:
    """Start a member again, and wait until every member has all the data."""
    replica_set.restart(member)
    everybody = WriteConcern(w=len(replica_set.members))
    with MongoClient[Any](replica_set.uri) as client:
        client[DATABASE].get_collection("health", write_concern=everybody).insert_one({})


async def rows(setting: Setting) -> AsyncIterator[Row]:
    assert setting.replica_set is not None
    samples: dict[str, list[Sample]] = {DRIVERS: [], PACKAGES: []}
    for _ in range(setting.pick(9, 3, 1)):
        for way, sample in (await failover(setting.client, setting.replica_set)).items():
            samples[way].append(sample)
    yield row_of("primary killed", samples)


BENCHMARK = Benchmark("failover", "Failover", rows, plot="bars", nodes=3)

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
