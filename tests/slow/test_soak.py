"""Ten thousand scopes, a third of them cancelled and a third failing: everything stays flat.

``SOAK_SCOPES`` says how many they are.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import resource
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from beanie import init_beanie
from clients import close
from models import Item
from pymongo.errors import DuplicateKeyError
from stepping import Stepping, run
from wire import APP_NAME, DATABASE, open_transactions

from beanie_session_scope import (
    Rollback,
    current_scope,
    on_abort,
    on_commit,
    run_in_transaction,
    with_session,
)
from beanie_session_scope.binding import SCOPE
from beanie_session_scope.channel import _channels
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.hooks import _running
from beanie_session_scope.waiting import _background

pytestmark = pytest.mark.slow

SCOPES = int(os.environ.get("SOAK_SCOPES", "10000"))
WARM_UP = SCOPES // 5
AT_ONCE = 50
SPARE = 10
MOST_GROWTH = 256
"""How much more memory may be in use at the end than after the first fifth, in KiB."""
MOST_NEW_OBJECTS = 1000
"""How many more objects there may be: less than one for eight scopes."""


@pytest_asyncio.fixture
async def client(server_uri: str) -> AsyncIterator[Any]:
    """A client without a listener: that would keep every command."""
    client = DRIVER.client_class(server_uri, appname=APP_NAME)
    await init_beanie(database=client[DATABASE], document_models=[Item])
    await Item.delete_all()
    yield client
    await close(client)


@pytest.fixture
def traced() -> Iterator[None]:
    """Let Python keep account of the memory in use."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


async def nothing() -> None:
    """Runs as a hook."""
    await asyncio.sleep(0)


def refuse() -> None:
    """Veto a commit."""
    raise KeyError


async def write_twice(item: Item) -> None:
    await Item(id=item.id).insert()


async def write_and_raise(item: Item) -> None:
    raise KeyError


async def write_and_roll_back(item: Item) -> None:
    raise Rollback


async def write_and_be_refused(item: Item) -> None:
    scope = current_scope()
    assert scope is not None
    scope.before_commit(refuse)


FAILURES = (write_twice, write_and_raise, write_and_roll_back, write_and_be_refused)
EXPECTED = (DuplicateKeyError, KeyError)


class Soak:
    """Opens scopes, many at once.

    Attributes:
        outcomes: How many ended how.
        committed: Which of them said that they were committed.
    """

    def __init__(self) -> None:
        self._chance = random.Random(1)
        self._suspensions = 0
        self.outcomes: Counter[str] = Counter()
        self.committed = bytearray(SCOPES)  # of a size that does not grow

    async def run(self, numbers: Iterable[int]) -> None:
        """Open a scope for each number."""
        waiting = iter(numbers)
        if not self._suspensions:
            first = next(waiting)
            await self._one(first, counting := Stepping(self._scope(first), 0, 0))
            self._suspensions = counting.suspensions

        async def work() -> None:
            for number in waiting:
                await self._one(number, self._stepping(number))

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))

    def _stepping(self, number: int) -> Stepping:
        if number % 3 != 2:
            return Stepping(self._scope(number), 0, 0)
        at, times = self._chance.randint(1, self._suspensions), self._chance.choice((1, 2, 4))
        return Stepping(self._scope(number), at, times)

    async def _one(self, number: int, stepping: Stepping) -> None:
        try:
            await asyncio.ensure_future(run(stepping))
        except asyncio.CancelledError:
            outcome = "cancelled"
        except EXPECTED:
            outcome = "failed"
        else:
            outcome = "committed" if self.committed[number] else "rolled back quietly"
        self.outcomes[outcome] += 1

    async def _scope(self, number: int) -> None:
        if number % 2:
            await run_in_transaction(self._body, number, collections=[Item])
        else:
            async with with_session(collections=[Item]):
                await self._body(number)
        await on_commit(nothing)  # outside any scope: at once, in a task of its own

    async def _body(self, number: int) -> None:
        scope = current_scope()
        assert scope is not None
        scope.before_commit(nothing)
        on_commit(lambda: self._note(number))
        on_abort(nothing)
        item = await Item(name="soak", n=number).insert()
        item.name = "changed"
        await item.save_changes()
        assert await Item.find({"_id": item.id}).to_list() == [item]
        if number % 3 == 1:
            await FAILURES[number // 6 % 4](item)

    def _note(self, number: int) -> None:
        self.committed[number] = True


@dataclass
class Figures:
    """What is in use when nothing runs."""

    memory: int
    objects: int
    resident: int
    driver_sessions: int
    server_sessions: int
    connections: int
    tasks: int

    def __str__(self) -> str:
        """Write them in one line."""
        return (
            f"{self.memory} KiB in {self.objects} objects, {self.resident} KiB resident at most; "
            f"sessions: {self.driver_sessions} in the driver's pool, {self.server_sessions} known "
            f"to the server; {self.connections} connections, {self.tasks} tasks"
        )


async def measure(client: Any) -> Figures:
    topology = (client.delegate if DRIVER.name == "Motor" else client)._topology
    status = await client.admin.command("serverStatus")
    sessions = status["logicalSessionRecordCache"]["activeSessionsCount"]
    connections = status["connections"]["current"]
    del status  # not to be measured itself
    gc.collect()
    return Figures(
        memory=tracemalloc.get_traced_memory()[0] // 1024,
        objects=len(gc.get_objects()),
        resident=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        driver_sessions=len(topology._session_pool),
        server_sessions=sessions,
        connections=connections,
        tasks=len(asyncio.all_tasks()),
    )


@pytest.mark.timeout(600)
# PyMongo Async leaves a socket to the garbage collector when it is cancelled while connecting.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.usefixtures("traced")
async def test_nothing_grows_with_the_number_of_scopes(server_uri: str, client: Any) -> None:
    before = await measure(client)
    soak, began = Soak(), time.monotonic()
    await soak.run(range(WARM_UP))
    warm = await measure(client)
    await soak.run(range(WARM_UP, SCOPES))
    seconds = time.monotonic() - began
    after = await measure(client)
    print(f"\n{SCOPES} scopes, {AT_ONCE} at once, in {seconds:.0f} s on {DRIVER.name}:")
    print(f"{dict(soak.outcomes)}")
    for name, figures in (("before", before), ("after a fifth", warm), ("at the end", after)):
        print(f"{name:>14}: {figures}")

    assert soak.outcomes.total() == SCOPES
    assert min(soak.outcomes["cancelled"], soak.outcomes["committed"]) > SCOPES // 4
    stored = [row["n"] for row in await client[DATABASE]["item"].find({}).to_list(None)]
    assert sorted(stored) == [number for number in range(SCOPES) if soak.committed[number]]
    assert open_transactions(server_uri) == 0
    assert after.tasks == before.tasks
    assert after.memory - warm.memory < MOST_GROWTH
    assert after.objects - warm.objects < MOST_NEW_OBJECTS
    # Those of a scope and of what is done beside it, such as ending what was cancelled.
    assert after.driver_sessions <= AT_ONCE + SPARE
    assert after.server_sessions - before.server_sessions <= AT_ONCE + SPARE
    assert after.connections - before.connections <= AT_ONCE + SPARE
    assert not _background
    assert not _running
    assert SCOPE.get() is None
    assert Item._scope_variable.get() is None
    # A connection that was opened in a scope keeps the context of that moment, as all of asyncio
    # does, and with it the channel.
    await close(client)
    gc.collect()
    assert not _channels
