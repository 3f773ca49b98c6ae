"""Tasks that are cancelled inside a transaction: ``python -m benchmarks.cancellation``.

The time is that from the cancellation until the task has ended. What is left open are transactions
on the server, with their locks, after everything that was sent there has been worked off.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from beanie import UpdateResponse
from pymongo import MongoClient

from .measure import Block, Row, Sample, measure
from .suite import APP_NAME, Benchmark, Setting, main
from .ways import WAYS, Way

Rows = list[dict[str, Any]]

AGAIN = 5.0
"""After how many seconds a task that goes on is cancelled again."""

WARM = 5
"""After how many operations of each task there are connections for all of them."""


class Server:
    """What the server says of the benchmark's own operations.

    Args:
        admin: A client of its own.
    """

    def __init__(self, admin: MongoClient[Any]) -> None:
        self._admin = admin.admin

    async def reaches(self, state: Callable[[], bool]) -> None:
        """Wait until something is so."""
        while not state():
            await asyncio.sleep(0.005)

    def runs(self, command: str) -> bool:
        """Tell whether a command is under way."""
        return bool(self._operations({f"command.{command}": {"$exists": True}, "active": True}))

    def is_idle(self) -> bool:
        """Tell whether no transaction has an operation under way."""
        return not self._operations({"active": True, "lsid": {"$exists": True}})

    def end_transactions(self) -> int:
        """End all transactions that are open.

        Returns:
            How many there were.
        """
        left = self._operations({"transaction": {"$exists": True}})
        if left:
            self._admin.command("killSessions", [{"id": each["lsid"]["id"]} for each in left])
        return len(left)

    def _operations(self, match: dict[str, Any]) -> Rows:
        current = {"$currentOp": {"idleSessions": True, "localOps": True}}
        ours = {
            **match,
            # An idle session has lost the client's name at the top level in some versions.
            "$or": [{"appName": APP_NAME}, {"clientMetadata.application.name": APP_NAME}],
        }
        return list(self._admin.aggregate([current, {"$match": ours}]))


@contextmanager
def server_of(setting: Setting) -> Iterator[Server]:
    with MongoClient[Any](setting.uri) as admin:
        yield Server(admin)


async def cancelled(tasks: list[asyncio.Task[None]]) -> float:
    """Cancel tasks; return how many seconds passed until they had ended."""
    begin = time.perf_counter()
    running = set(tasks)
    while running:
        # Once, as a rule. Before Python 3.12 asyncio.wait_for, by which PyMongo waits for a new
        # connection, can lose a cancellation; the task then goes on until the next one.
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=AGAIN)
    return time.perf_counter() - begin


def during(setting: Setting, way: Way, command: str, milliseconds: int) -> Block:
    """Cancel a task while the server is slow with one of its commands."""

    async def work() -> None:
        async with way.open(setting.client) as session:
            arguments = way.arguments(session)
            if command == "findAndModify":
                await way.model(color="before").insert(**arguments)
                await way.model.find_one(way.model.color == "target").update(
                    {"$inc": {"size": 1}}, response_type=UpdateResponse.NEW_DOCUMENT, **arguments
                )
            else:
                await way.model(color="new").insert(**arguments)

    async def attempt(server: Server) -> Sample | None:
        with setting.slow(command, milliseconds):
            task = asyncio.ensure_future(work())
            await server.reaches(lambda: task.done() or server.runs(command))
            if task.done():
                task.result()
                return None  # the server was asked too late
            wall = await cancelled([task])
            await server.reaches(lambda: not server.runs(command) and server.is_idle())
            return {"wall": wall, "left_open": server.end_transactions()}

    async def block() -> Sample:
        with server_of(setting) as server:
            while (sample := await attempt(server)) is None:
                pass
        return sample

    return block


def at_once(setting: Setting, way: Way, count: int) -> Block:
    """Cancel many tasks at once, each in the middle of a transaction with many operations."""

    async def work(begun: asyncio.Event) -> None:
        async with way.open(setting.client) as session:
            for number in itertools.count(1):
                await way.model(color="new").insert(**way.arguments(session))
                if number == WARM:
                    begun.set()

    async def block() -> Sample:
        begun = [asyncio.Event() for _ in range(count)]
        tasks = [asyncio.ensure_future(work(event)) for event in begun]
        await asyncio.gather(*(event.wait() for event in begun))
        wall = await cancelled(tasks)
        with server_of(setting) as server:
            await server.reaches(server.is_idle)
            return {"wall": wall, "left_open": server.end_transactions()}

    return block


async def rows(setting: Setting) -> AsyncIterator[Row]:
    milliseconds = setting.pick(200, 200, 100)
    rounds = setting.pick(11, 3, 1)
    for name, command in (
        ("in the first operation", "insert"),
        ("in a later operation", "findAndModify"),
        ("in the commit", "commitTransaction"),
    ):
        blocks = {way.name: during(setting, way, command, milliseconds) for way in WAYS}
        yield await measure(f"{name}, which takes {milliseconds} ms", blocks, rounds, warm_up=False)
    count = setting.pick(30, 30, 3)
    blocks = {way.name: at_once(setting, way, count) for way in WAYS}
    yield await measure(f"{count} tasks at work", blocks, rounds, warm_up=False)


BENCHMARK = Benchmark("cancellation", "Cancellation", rows, plot="bars")

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
