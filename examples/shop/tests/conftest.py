"""One shop for all tests; each of them finds it as on the first day."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from pymongo import MongoClient

from beanie_session_scope.testing import ReplicaSet

from ..app import create_app
from ..models import MODELS
from .serving import Customer, FailPoint, OpenShop, fail_point_of, serving

COLLECTIONS = [model.Settings.name for model in MODELS]


@pytest.fixture(scope="session")
def server_uri() -> Iterator[str]:
    if uri := os.environ.get("MONGODB_URI"):
        yield uri
    else:
        with ReplicaSet() as replica_set:
            yield replica_set.uri


@pytest.fixture
def fail_point(server_uri: str) -> FailPoint:
    return fail_point_of(server_uri)


@pytest.fixture(scope="session")
def stored(server_uri: str) -> Iterator[Any]:
    """The shop's database, by a client that is not the shop's."""
    with MongoClient[Any](server_uri) as client:
        database = client[f"beanie_session_scope_shop_{secrets.token_hex(4)}"]
        yield database
        client.drop_database(database.name)


@pytest.fixture(scope="session")
def opened(server_uri: str, stored: Any) -> Iterator[OpenShop]:
    """The shop as it is on its first day, open for as long as there are tests."""
    app = create_app(server_uri, stored.name)
    with serving(app) as url:
        httpx.get(f"{url}/products", timeout=30).raise_for_status()
        yield OpenShop(app, url, {model: list(stored[model].find()) for model in COLLECTIONS})


@pytest.fixture
def database(opened: OpenShop, stored: Any) -> Any:
    """What the server holds: for each test what it was on the first day."""
    for name, documents in opened.first_day.items():
        stored[name].delete_many({})
        if documents:
            stored[name].insert_many(documents)
    opened.sent.clear()
    return stored


@pytest.fixture
def shop(opened: OpenShop, database: Any) -> OpenShop:
    """The shop, as if it had just opened."""
    return opened


@pytest_asyncio.fixture
async def http(shop: OpenShop) -> AsyncIterator[httpx.AsyncClient]:
    """Somebody's HTTP client, which opens as many connections as it likes."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=shop.url, limits=limits, timeout=30) as client:
        yield client


@pytest_asyncio.fixture
async def ann(http: httpx.AsyncClient) -> Customer:
    """Somebody who can spend 200.00."""
    return Customer(http, "ann")


@pytest_asyncio.fixture
async def bob(http: httpx.AsyncClient) -> Customer:
    """Somebody who can spend 10.00, less than a teapot costs."""
    return Customer(http, "bob")
