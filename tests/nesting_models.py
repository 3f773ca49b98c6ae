"""The document classes of the tests about nesting: of two clients, with and without a revision."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from beanie import Document, init_beanie
from clients import close, empty
from wire import APP_NAME, DATABASE

from beanie_session_scope import SessionScopeMixin
from beanie_session_scope.drivers import DRIVER


class Here(SessionScopeMixin, Document):
    name: str = "new"
    n: int = 0

    class Settings:
        name = "nesting_here"
        use_revision = True
        use_state_management = True


class Beside(SessionScopeMixin, Document):
    """On the same client, in a collection of its own."""

    name: str = "new"
    n: int = 0

    class Settings:
        name = "nesting_beside"


class There(SessionScopeMixin, Document):
    """On another client."""

    name: str = "new"
    n: int = 0

    class Settings:
        name = "nesting_there"
        use_state_management = True


def database_of(client: Any) -> Any:
    """Return the database that holds the collections of these classes."""
    return client[DATABASE]


async def initialise(client: Any, *models: Any) -> None:
    """Initialise classes on a client, and empty their collections."""
    database = database_of(client)
    await init_beanie(database=database, document_models=list(models))
    await empty(database, *(model.Settings.name for model in models))


@asynccontextmanager
async def two_clients(uri: str) -> AsyncIterator[tuple[Any, Any]]:
    """Give the client of ``Here`` and ``Beside``, and that of ``There``."""
    clients = tuple(DRIVER.client_class(uri, appname=APP_NAME) for _ in range(2))
    try:
        await initialise(clients[0], Here, Beside)
        await initialise(clients[1], There)
        yield clients[0], clients[1]
    finally:
        for model in (Here, Beside, There):
            # A scope that names neither client nor classes binds what is initialised.
            model._document_settings = None
        for client in clients:
            await close(client)
