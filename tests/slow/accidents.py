"""What goes wrong with the primary of a replica set, and at which moment of a transfer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

from bank import Bank, Order
from pymongo import MongoClient
from pymongo.errors import ConnectionFailure
from pymongo.write_concern import WriteConcern
from wire import APP_NAME, DATABASE

from beanie_session_scope import current_scope
from beanie_session_scope.testing import Member, ReplicaSet

FAULTS = ("kill", "step down", "pause")
MOMENTS = ("in the body", "before the commit", "during the commit", "before its answer")
COMMIT_HELD = {
    # The server holds the command before it runs it ...
    "during the commit": (
        "failCommand",
        {
            "failCommands": ["commitTransaction"],
            "appName": APP_NAME,
            "blockConnection": True,
            "blockTimeMS": 1500,
        },
    ),
    # ... or when a majority has the transaction, and only the answer is still to come.
    "before its answer": ("waitAfterCommandFinishesExecution", {"commands": ["commitTransaction"]}),
}
PATIENCE = 30.0


def strike(cluster: ReplicaSet, fault: str) -> Member:
    """Let something happen to the primary.

    Returns:
        The member that was the primary.
    """
    if fault == "step down":
        return cluster.step_down(1)
    primary = cluster.wait_for_primary()
    act = {"kill": cluster.kill, "pause": cluster.pause}[fault]
    act(primary)
    return primary


def mend(cluster: ReplicaSet, *broken: Member) -> None:
    """Let members come back, and wait until every member has all the data."""
    for member in broken:
        if member.paused:
            cluster.resume(member)
        elif not member.alive:
            cluster.restart(member)
        release(member)
    cluster.wait_for_primary(PATIENCE)
    everybody = WriteConcern(w=len(cluster.members), wtimeout=int(PATIENCE * 1000))
    with MongoClient[Any](cluster.uri) as client:
        client[DATABASE].get_collection("health", write_concern=everybody).insert_one({})


async def break_and_mend(cluster: ReplicaSet, fault: str) -> None:
    """Break the primary, wait for the next one, then let the broken one come back."""
    broken = await asyncio.to_thread(strike, cluster, fault)
    await asyncio.to_thread(cluster.wait_for_primary, PATIENCE)
    await asyncio.to_thread(mend, cluster, broken)


class Accident:
    """Breaks the primary at one moment of the first attempt at one transfer.

    Args:
        cluster: The replica set.
        fault: What happens to the primary.
        moment: When.
        order: The transfer.

    Attributes:
        attempts_after: How often the transfer was begun again after that moment.
    """

    def __init__(self, cluster: ReplicaSet, fault: str, moment: str, order: Order) -> None:
        self._cluster = cluster
        self._fault = fault
        self._moment = moment
        self._order = order
        self._mending: asyncio.Future[None] | None = None
        self._due = True
        self.attempts_after = 0

    def arrange(self, bank: Bank) -> None:
        """Wait for the transfer."""
        bank.in_body = self._in_body
        bank.before_commit = self._before_commit

    async def is_over(self) -> None:
        """Wait until the replica set is whole again."""
        assert self._mending is not None
        await self._mending

    async def _in_body(self, order: Order) -> None:
        if order is self._order:
            self.attempts_after += not self._due
            if self._moment == "in the body":
                await self._happen()

    async def _before_commit(self, order: Order) -> None:
        if order is not self._order:
            return
        if self._moment == "before the commit":
            await self._happen()
        elif self._moment in COMMIT_HELD and self._due:
            self._due = False
            scope = current_scope()
            assert scope is not None and scope.session is not None
            session_id = bytes(scope.session.session_id["id"])
            primary = await asyncio.to_thread(self._cluster.wait_for_primary)
            await asyncio.to_thread(hold, primary, *COMMIT_HELD[self._moment])
            self._mending = asyncio.ensure_future(self._follow_commit(primary, session_id))

    async def _happen(self) -> None:
        if self._due:
            self._due = False
            broken = await asyncio.to_thread(strike, self._cluster, self._fault)
            self._mending = asyncio.ensure_future(self._mend(broken))

    async def _follow_commit(self, primary: Member, session_id: bytes) -> None:
        held_by = COMMIT_HELD[self._moment][0]
        await asyncio.to_thread(wait_for_held_commit, primary, session_id, held_by)
        await self._mend(await asyncio.to_thread(strike, self._cluster, self._fault))

    async def _mend(self, broken: Member) -> None:
        await asyncio.to_thread(self._cluster.wait_for_primary, PATIENCE)
        await asyncio.to_thread(mend, self._cluster, broken)


def hold(member: Member, name: str, data: dict[str, Any]) -> None:
    """Turn a fail point on that holds commits."""
    with MongoClient[Any](member.uri) as admin:
        admin.admin.command("configureFailPoint", name, mode="alwaysOn", data=data)


def release(member: Member) -> None:
    """Turn the fail points off."""

    def are_off() -> bool:
        try:
            with MongoClient[Any](member.uri) as admin:
                for name, _ in COMMIT_HELD.values():
                    admin.admin.command("configureFailPoint", name, mode="off")
        except ConnectionFailure:
            return False  # a primary that was resumed steps down, and closes all connections
        return True

    wait_until(are_off)


def wait_for_held_commit(member: Member, session_id: bytes, held_by: str) -> None:
    """Wait until a fail point holds the commit of a session."""
    # Not every fail point names itself there: failCommand comes before anything else.
    named = {} if held_by == "failCommand" else {"failpointMsg": held_by}
    pipeline: list[dict[str, Any]] = [
        {"$currentOp": {"localOps": True, "allUsers": True}},
        {"$match": {"command.commitTransaction": {"$exists": True}, **named}},
    ]
    with MongoClient[Any](member.uri) as admin:

        def is_held() -> bool:
            running: Iterable[dict[str, Any]] = admin.admin.aggregate(pipeline)
            return any(bytes(operation["lsid"]["id"]) == session_id for operation in running)

        wait_until(is_held)


def wait_until(condition: Callable[[], bool]) -> None:
    """Ask again and again until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it has not come to that"
        time.sleep(0.01)
