"""The client of the application, and what the shop has on its first day."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import beanie

from beanie_session_scope import transactional

from .models import MODELS, Account, Product

if hasattr(beanie.Document, "get_pymongo_collection"):
    from pymongo import AsyncMongoClient as Client  # Beanie 2
else:
    from motor.motor_asyncio import AsyncIOMotorClient as Client  # Beanie 1

APP_NAME = "shop"


@asynccontextmanager
async def connected(uri: str, database: str) -> AsyncIterator[None]:
    """Initialise the documents on a client of this event loop, which is closed afterwards."""
    client: Any = Client(uri, appname=APP_NAME)
    try:
        await beanie.init_beanie(database=client[database], document_models=MODELS)
        await _create_collections(client[database])
        yield
    finally:
        closing = client.close()
        if inspect.isawaitable(closing):  # PyMongo's is awaited, Motor's is not
            await closing


async def _create_collections(database: Any) -> None:
    """Create what is missing: transactions that create one collection at once conflict."""
    existing = await database.list_collection_names()
    for model in MODELS:
        if (name := model.get_collection_name()) not in existing:
            await database.create_collection(name)


@transactional(collections=[Product, Account])
async def fill_shelves() -> None:
    """Add some products and customers to a shop without any."""
    if await Product.count() > 0:
        return
    await Product.insert_many(
        [
            Product(id="teapot", name="Teapot, stoneware", price=3900, stock=3),
            Product(id="cup", name="Cup, stoneware", price=1250, stock=40),
            Product(id="tea", name="Darjeeling, 100 g", price=890, stock=25),
        ]
    )
    await Account.insert_many([Account(id="ann", balance=20_000), Account(id="bob", balance=1_000)])
