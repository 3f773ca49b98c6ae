"""The document classes of the tests about web requests."""

from __future__ import annotations

from typing import Any

from beanie import Document, init_beanie
from clients import empty
from wire import DATABASE

from beanie_session_scope import SessionScopeMixin

COLLECTION = "asgi_order"


class Order(SessionScopeMixin, Document):
    name: str = "new"
    n: int = 0

    class Settings:
        name = COLLECTION


class Elsewhere(SessionScopeMixin, Document):
    """Stored with another client than the orders."""


async def prepare(client: Any) -> Any:
    """Initialise the classes on a client, their collection empty; return that collection."""
    database = client[DATABASE]
    await init_beanie(database=database, document_models=[Order])
    await empty(database, COLLECTION)
    return database[COLLECTION]
