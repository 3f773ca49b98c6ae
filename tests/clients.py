"""What tests do with a client of either driver, and with the database that it reaches."""

from __future__ import annotations

import inspect
from typing import Any

from wire import Wire


async def close(client: Any) -> None:
    """Close a client: PyMongo's has to be awaited, Motor's can't be."""
    closing = client.close()
    if inspect.isawaitable(closing):
        await closing


async def kill_sessions(client: Any, wire: Wire) -> None:
    """End the transactions that a fail point, which answered a commit, has left on the server."""
    if sessions := wire.sessions():
        await client.admin.command("killSessions", sessions)


async def empty(database: Any, *names: str) -> None:
    """Empty collections, and create those that are not there."""
    existing = await database.list_collection_names()
    for name in names:
        if name in existing:
            await database[name].delete_many({})
        else:
            # Two transactions that both create the collection would conflict.
            await database.create_collection(name)
