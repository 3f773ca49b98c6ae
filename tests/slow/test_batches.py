"""A migration that is killed again and again changes every document exactly once.

``MIGRATION_DOCUMENTS`` and ``MIGRATION_KILLS`` say how many of them there are.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import pytest_asyncio
from batches_script import DOT, NAME, Counted
from beanie import BulkWriter, init_beanie
from clients import close

from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.migration import CHECKPOINTS, migrate_in_batches
from beanie_session_scope.testing import ReplicaSet

pytestmark = [pytest.mark.slow, pytest.mark.starts_servers, pytest.mark.timeout(900)]

DOCUMENTS = int(os.environ.get("MIGRATION_DOCUMENTS", "20000"))
KILLS = int(os.environ.get("MIGRATION_KILLS", "20" if DOCUMENTS >= 200_000 else "8"))
FEW = 300
ROUNDS = 9
BATCH_SIZE = 1000
DATABASE = "beanie_session_scope_batches"
SCRIPT = Path(__file__).with_name("batches_script.py")
SIGKILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def replica_set() -> Iterator[ReplicaSet]:
    """A server that soon ends the transactions of those that are dead."""
    with ReplicaSet(set_parameters={"transactionLifetimeLimitSeconds": 2}) as replica_set:
        yield replica_set


@pytest_asyncio.fixture
async def database(replica_set: ReplicaSet) -> AsyncIterator[Any]:
    """An empty database, with the class initialised on it."""
    client = DRIVER.client_class(replica_set.uri)
    await client.drop_database(DATABASE)
    await init_beanie(database=client[DATABASE], document_models=[Counted])
    yield client[DATABASE]
    await close(client)


async def store(database: Any, number: int) -> None:
    for first in range(0, number, 10_000):
        ids = range(first, min(number, first + 10_000))
        await database["counted"].insert_many(
            [{"_id": i, "n": 0, "text": "some text " * 20} for i in ids]
        )


async def counts(database: Any) -> dict[int, int]:
    """Return how many documents were changed how often."""
    pipeline = [{"$group": {"_id": "$n", "documents": {"$sum": 1}}}]
    cursor = database["counted"].aggregate(pipeline)
    if DRIVER.aggregate_is_awaited:
        cursor = await cursor
    return {each["_id"]: each["documents"] async for each in cursor}


async def dealt_with(database: Any) -> int:
    """Return how many documents the checkpoint says were changed."""
    found = await database[CHECKPOINTS].find_one({"_id": NAME})
    return 0 if found is None else int(found["changed"])


@contextmanager
def script(replica_set: ReplicaSet, batch_size: int, moment: str = "") -> Iterator[Any]:
    """Run the migration in a process of its own."""
    arguments = [replica_set.uri, DATABASE, str(batch_size), moment]
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: Any, sign: bytes, times: int) -> None:
    """Wait until the script has written something so many times."""
    while times > 0:
        written = process.stdout.read(1)
        assert written, process.stderr.read().decode()
        times -= written == sign


def finish(process: Any) -> int:
    """Wait for the end of the script."""
    process.communicate()
    return int(process.returncode)


class TestKilled:
    async def test_at_random_moments_it_changes_each_document_once(
        self, replica_set: ReplicaSet, database: Any
    ) -> None:
        chance = random.Random(4)
        await store(database, DOCUMENTS)
        points = sorted(chance.sample(range(int(DOCUMENTS * 0.9)), KILLS))
        began = time.monotonic()
        reached = []
        for point in points:
            with script(replica_set, BATCH_SIZE) as process:
                read_until(process, b".", (point - await dealt_with(database)) // DOT)
                # Anywhere in a batch: reading, writing, committing, looking for the next one.
                await asyncio.sleep(chance.uniform(0, 0.2))
                process.kill()
                assert finish(process) == SIGKILLED
            reached.append(await dealt_with(database))
            assert (await counts(database)).get(1, 0) == reached[-1]

        with script(replica_set, BATCH_SIZE) as process:
            assert finish(process) == 0

        print(
            f"\n{DOCUMENTS} documents, {KILLS} times SIGKILL in {time.monotonic() - began:.0f} s "
            f"on {DRIVER.name}; killed after {reached}"
        )
        assert await counts(database) == {1: DOCUMENTS}
        assert await dealt_with(database) == DOCUMENTS

    @pytest.mark.parametrize(
        ("moment", "stored"),
        [("started:commitTransaction", 100), ("succeeded:commitTransaction", 200)],
        ids=["before the commit is sent", "when the commit was applied"],
    )
    async def test_at_the_commit_it_changes_each_document_once(
        self, replica_set: ReplicaSet, database: Any, moment: str, stored: int
    ) -> None:
        await store(database, FEW)

        with script(replica_set, 100, moment) as process:
            assert finish(process) == SIGKILLED
        assert await dealt_with(database) == stored
        with script(replica_set, 100) as process:
            assert finish(process) == 0

        assert await counts(database) == {1: FEW}

    @pytest.mark.parametrize("refused", [False, True], ids=["goes on", "fails"])
    async def test_while_the_server_is_at_the_commit_it_changes_each_document_once(
        self, replica_set: ReplicaSet, database: Any, refused: bool
    ) -> None:
        await store(database, FEW)
        error: dict[str, Any] = {"error_code": 251} if refused else {}

        with replica_set.fail_point(
            "commitTransaction", block_ms=300, app_name="batches_script", **error
        ):
            with script(replica_set, 100) as process:
                read_until(process, b"c", 1)
                process.kill()
                assert finish(process) == SIGKILLED
        with script(replica_set, 100) as process:
            assert finish(process) == 0

        assert await counts(database) == {1: FEW}


class TestSpeed:
    async def test_it_is_compared_with_a_loop_by_hand(self, server_uri: str) -> None:
        client = DRIVER.client_class(server_uri)
        database = client[DATABASE]
        await client.drop_database(DATABASE)
        await init_beanie(database=database, document_models=[Counted])
        await store(database, DOCUMENTS)
        hand, batches = [], []

        for number in range(ROUNDS):  # in turns, as other programs come and go
            first, end = DOCUMENTS * number // ROUNDS, DOCUMENTS * (number + 1) // ROUNDS
            began = time.monotonic()
            await by_hand(database, first, end)
            middle = time.monotonic()
            await migrate_in_batches(
                Counted.find({"_id": {"$gte": first, "$lt": end}}),
                add_one,
                name=f"speed {number}",
                batch_size=BATCH_SIZE,
                progress="off",
            )
            hand.append((end - first) / (middle - began))
            batches.append((end - first) / (time.monotonic() - middle))

        assert await counts(database) == {2: DOCUMENTS}
        ratio = median(b / h for b, h in zip(batches, hand, strict=True))
        print(
            f"\n{DOCUMENTS} documents on {DRIVER.name}, per second: {median(hand):.0f} by hand, "
            f"{median(batches):.0f} with migrate_in_batches; medians of {ROUNDS}, ratio {ratio:.2f}"
        )
        await client.drop_database(DATABASE)
        await close(client)


def add_one(counted: Counted) -> None:
    """Done twice, it leaves a trace."""
    counted.n += 1


async def by_hand(database: Any, first: int, end: int) -> None:
    """Do the same for some documents: a transaction per batch, and a checkpoint in it."""
    client, last = database.client, first - 1
    checkpoints = database["checkpoints_by_hand"]
    while True:
        session = await DRIVER.start_session(client)
        await DRIVER.start_transaction(session)
        query = Counted.find({"_id": {"$gt": last, "$lt": end}}, session=session)
        documents = await query.sort("_id").limit(BATCH_SIZE).to_list()
        if documents:
            writer = BulkWriter(session=session)
            for document in documents:
                add_one(document)
                await document.save(session=session, bulk_writer=writer)
            await writer.commit()
            last = documents[-1].id
            await checkpoints.update_one(
                {"_id": first}, {"$set": {"last": last}}, upsert=True, session=session
            )
        await session.commit_transaction()
        await DRIVER.end_session(session)
        if not documents:
            return
