"""A server and a client for the examples, whichever Beanie is installed."""

from __future__ import annotations

import inspect
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import beanie

from beanie_session_scope.testing import ReplicaSet

if hasattr(beanie.Document, "get_pymongo_collection"):
    from pymongo import AsyncMongoClient as Client  # Beanie 2
else:
    from motor.motor_asyncio import AsyncIOMotorClient as Client  # Beanie 1


@asynccontextmanager
async def open_database(*models: type[Any]) -> AsyncIterator[Any]:
    """Initialise some classes on a database of their own, which is dropped afterwards.

    The server is that of the environment variable ``MONGODB_URI``; where it is not set, a
    replica set of one node is started for as long as the example runs.
    """
    async with _server() as uri:
        client: Any = Client(uri)
        database = client[f"beanie_session_scope_example_{secrets.token_hex(4)}"]
        try:
            await beanie.init_beanie(database=database, document_models=[*models])
            yield database
        finally:
            try:
                await client.drop_database(database.name)
            finally:
                closing = client.close()
                if inspect.isawaitable(closing):  # PyMongo's is awaited, Motor's is not
                    await closing


@asynccontextmanager
async def _server() -> AsyncIterator[str]:
    beanie_version = f"Beanie {beanie.__version__}"
    if uri := os.environ.get("MONGODB_URI"):
        print(f"{beanie_version}, on the server of MONGODB_URI")
        yield uri
    else:
        async with ReplicaSet() as replica_set:
            print(f"{beanie_version}, on a MongoDB replica set started for this example")
            yield replica_set.uri
