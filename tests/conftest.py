"""A real server for every test: the one of ``MONGODB_URI``, or an embedded replica set."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from beanie import init_beanie
from clients import close, empty, kill_sessions
from hook_calls import Calls
from models import COLLECTIONS, MODELS
from nesting_models import two_clients
from nesting_scopes import Pair
from plugin_runs import Runs, fresh_runs
from wire import APP_NAME, DATABASE, FailPoint, Wire, fail_point_of

from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.testing import ReplicaSet


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start no server where one is named: leave out the tests about starting servers."""
    if os.environ.get("MONGODB_URI"):
        left_out = [item for item in items if item.get_closest_marker("starts_servers")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Answer to ``-n auto``: more than two, for tests wait a lot; each worker has a server."""
    return 0 if os.environ.get("MONGODB_URI") else 3


@pytest.fixture(scope="session")
def server_uri() -> Iterator[str]:
    """The server that the tests use."""
    if uri := os.environ.get("MONGODB_URI"):
        yield uri
    else:
        with ReplicaSet() as replica_set:
            yield replica_set.uri


@pytest.fixture
def fail_point(server_uri: str) -> FailPoint:
    """Make commands of the test's client fail, or slow."""
    return fail_point_of(server_uri)


@pytest.fixture
def wire() -> Wire:
    """What the client of the test sends."""
    return Wire()


@pytest_asyncio.fixture
async def client(server_uri: str, wire: Wire) -> AsyncIterator[Any]:
    """A client of the installed driver, its classes initialised and their data gone."""
    client = DRIVER.client_class(server_uri, event_listeners=[wire], appname=APP_NAME)
    await init_beanie(database=client[DATABASE], document_models=MODELS)
    await empty(client[DATABASE], *COLLECTIONS)
    yield client
    await kill_sessions(client, wire)
    await close(client)


@pytest_asyncio.fixture
async def other_client(server_uri: str) -> AsyncIterator[Any]:
    """Another client of the same server, on which no class is initialised."""
    client = DRIVER.client_class(server_uri, appname=APP_NAME)
    yield client
    await close(client)


@pytest.fixture
def database(client: Any) -> Any:
    """The driver's own database: what it reads is what the server holds."""
    return client[DATABASE]


@pytest.fixture
def calls() -> Calls:
    """Hooks that note that they were called."""
    return Calls()


@pytest.fixture
def runs(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, server_uri: str
) -> Iterator[Runs]:
    """Test runs inside the test, with the plugin, that begin with an empty database."""
    with fresh_runs(pytester, monkeypatch, server_uri) as runs:
        yield runs


@pytest_asyncio.fixture
async def pair(server_uri: str) -> AsyncIterator[Pair]:
    """Two clients, and the scopes of the tests about nesting on each."""
    async with two_clients(server_uri) as clients:
        yield Pair(*clients)
