"""Test runs inside a test, with the plugin, on the server of the test that starts them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from plugin_models import DATABASE
from pymongo import MongoClient

# Those that the runs need, and no others: what is installed would be imported for each of them.
PLUGINS = ("pytest_asyncio.plugin", "anyio.pytest_plugin", "beanie_session_scope.testing.plugin")
ARGUMENTS = ("--assert=plain", *(word for name in PLUGINS for word in ("-p", name)))

# How an async fixture is declared, how an async test is marked, and what goes into the settings.
FLAVOURS = {
    "asyncio-auto": ("pytest.fixture", "", "asyncio_mode = auto"),
    "asyncio-strict": ("pytest_asyncio.fixture", "@pytest.mark.asyncio", ""),
    "anyio": ("pytest.fixture", "@pytest.mark.anyio", ""),
}
every_flavour = pytest.mark.parametrize("flavour", FLAVOURS)

SETTINGS = f"""
[pytest]
pythonpath = {Path(__file__).parent}
asyncio_default_fixture_loop_scope = function
filterwarnings = error
    ignore::pydantic.warnings.PydanticDeprecationWarning
    ignore:unclosed:ResourceWarning
"""

CONFTEST = """
import pytest
import pytest_asyncio
from beanie import init_beanie
from clients import close
from plugin_models import DATABASE, MODELS, Bike
from beanie_session_scope.drivers import DRIVER


@pytest.fixture
def anyio_backend():
    return "asyncio"


@FIXTURE
async def client(mongo_replica_set):
    client = DRIVER.client_class(mongo_replica_set.uri)
    await init_beanie(database=client[DATABASE], document_models=MODELS)
    yield client
    await close(client)


@pytest.fixture
def session_scope_client(client):
    return client


@pytest.fixture
def database(client):
    return client[DATABASE]
"""

HEAD = """
import asyncio
import pytest
import pytest_asyncio
from beanie_session_scope import *
from plugin_models import Bike, PlainBike, Rider

"""


class Runs:
    """Runs pytest, in this process where that will do.

    Args:
        pytester: pytest's own fixture.
        monkeypatch: Likewise.
        uri: The server, which every run is given.
    """

    def __init__(
        self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, uri: str
    ) -> None:
        self.pytester = pytester
        self.uri = uri
        monkeypatch.setenv("MONGODB_URI", uri)
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        for name in ("CI", "BUILD_NUMBER"):  # pytest's reports are longer where one is set
            monkeypatch.delenv(name, raising=False)

    def write(self, tests: str, flavour: str = "asyncio-strict") -> None:
        """Write a directory of tests; ``FIXTURE`` and ``TEST`` in them stand for decorators."""
        fixture, mark, settings = FLAVOURS[flavour]

        def spelled(source: str) -> str:
            return source.replace("@FIXTURE", f"@{fixture}").replace("@TEST", mark)

        self.pytester.makeini(SETTINGS + settings)
        self.pytester.makeconftest(spelled(CONFTEST))
        self.pytester.makepyfile(test_it=HEAD + spelled(dedent(tests)))

    def __call__(
        self, tests: str, *arguments: str, flavour: str = "asyncio-strict"
    ) -> pytest.RunResult:
        """Write tests, and run them.

        Args:
            tests: The tests.
            arguments: The command line.
            flavour: The plugin that runs async tests.
        """
        self.write(tests, flavour)
        return self.pytester.runpytest_inprocess(*ARGUMENTS, *arguments)

    def in_a_process(self, *arguments: str) -> pytest.RunResult:
        """Run the tests that were written, in a process of its own."""
        return self.pytester.runpytest_subprocess(*ARGUMENTS, *arguments)

    @contextmanager
    def collection(self, name: str) -> Iterator[Any]:
        """Open a collection with a client of its own: what it shows is what is stored."""
        with MongoClient[Any](self.uri) as client:
            yield client[DATABASE][name]

    def stored(self, name: str = "bikes") -> int:
        """Return how many documents a collection has."""
        with self.collection(name) as collection:
            return int(collection.count_documents({}))


def line_of(tests: str, text: str) -> int:
    """Return the number that a line of the tests has in the file that is written."""
    lines = (HEAD + dedent(tests)).strip().splitlines()
    (number,) = (number for number, line in enumerate(lines, 1) if text in line)
    return number


@contextmanager
def fresh_runs(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, uri: str
) -> Iterator[Runs]:
    """Give runs that begin with an empty database; for a fixture."""
    with MongoClient[Any](uri) as client:
        client.drop_database(DATABASE)
        yield Runs(pytester, monkeypatch, uri)
        client.drop_database(DATABASE)
