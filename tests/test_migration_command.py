"""Beanie's own migrations, through its ``beanie migrate`` command, forwards and backwards."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from beanie import Document, free_fall_migration
from clients import close
from pymongo import MongoClient

from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.migration import bind_migration

pytestmark = pytest.mark.timeout(60)

HERE = Path(__file__).parent
FREE_FALL = HERE / "migrations_free_fall"
ITERATIVE = HERE / "migrations_iterative"
NAMES = ["Ann", "Bob", "Cid", "Dot", "Eve"]


@pytest.fixture
def database(server_uri: str) -> Iterator[Any]:
    """A database of five accounts, for one test."""
    with MongoClient[Any](server_uri) as client:
        database = client[f"beanie_session_scope_migrate_{uuid4().hex[:8]}"]
        database["accounts"].insert_many([{"owner": name, "balance": 0} for name in NAMES])
        database.create_collection("entries")
        yield database
        client.drop_database(database.name)


@pytest.fixture
def migrate(server_uri: str, database: Any) -> Any:
    """Run Beanie's command; return what it ended with."""

    def run(path: Path, *options: str, **environment: str) -> Any:
        command = Path(sys.executable).with_name("beanie")
        return subprocess.run(
            [
                *(str(command), "migrate", *options),
                *("-uri", server_uri, "-db", database.name, "-p", str(path)),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
            capture_output=True,
            encoding="utf-8",
            timeout=50,
            check=False,
        )

    return run


def done(process: Any) -> None:
    assert process.returncode == 0, process.stderr


def broken(process: Any) -> None:
    assert process.returncode == 1
    assert "RuntimeError: the migration breaks" in process.stderr


def balances(database: Any) -> list[int]:
    return [each["balance"] for each in database["accounts"].find()]


def fields(database: Any) -> set[str]:
    return {name for each in database["accounts"].find() for name in each} - {"_id"}


def entries(database: Any) -> list[str]:
    return [each["text"] for each in database["entries"].find()]


class TestFreeFall:
    def test_it_goes_forwards_and_backwards(self, migrate: Any, database: Any) -> None:
        done(migrate(FREE_FALL))
        assert balances(database) == [1000] * 5
        assert entries(database) == [f"{name}: 1000" for name in NAMES]

        done(migrate(FREE_FALL, "--backward"))
        assert balances(database) == [0] * 5
        assert len(entries(database)) == 10

    def test_one_that_breaks_leaves_nothing(self, migrate: Any, database: Any) -> None:
        broken(migrate(FREE_FALL, MIGRATION_BREAKS="yes"))

        assert (balances(database), entries(database)) == ([0] * 5, [])

    def test_one_that_breaks_on_the_way_back_leaves_nothing(
        self, migrate: Any, database: Any
    ) -> None:
        done(migrate(FREE_FALL))

        broken(migrate(FREE_FALL, "--backward", "-d", "1", MIGRATION_BREAKS="yes"))

        assert (balances(database), len(entries(database))) == ([1000] * 5, 5)

    def test_without_the_binding_it_leaves_all(self, migrate: Any, database: Any) -> None:
        broken(migrate(FREE_FALL, MIGRATION_BREAKS="yes", MIGRATION_UNBOUND="yes"))

        assert (balances(database), len(entries(database))) == ([1000] * 5, 5)

    def test_without_a_transaction_it_runs_in_the_plain_session(
        self, migrate: Any, database: Any
    ) -> None:
        broken(migrate(FREE_FALL, "--no-use-transaction", MIGRATION_BREAKS="yes"))

        assert balances(database) == [1000] * 5


class TestIterative:
    def test_it_goes_forwards_and_backwards(self, migrate: Any, database: Any) -> None:
        done(migrate(ITERATIVE, "--forward"))
        assert fields(database) == {"holder", "balance"}
        assert entries(database) == NAMES

        done(migrate(ITERATIVE, "--backward"))
        assert fields(database) == {"owner", "balance"}
        assert entries(database) == NAMES * 2

    def test_one_that_breaks_leaves_nothing(self, migrate: Any, database: Any) -> None:
        broken(migrate(ITERATIVE, MIGRATION_BREAKS="Dot"))

        assert (fields(database), entries(database)) == ({"owner", "balance"}, [])

    def test_one_that_breaks_on_the_way_back_leaves_nothing(
        self, migrate: Any, database: Any
    ) -> None:
        done(migrate(ITERATIVE))

        broken(migrate(ITERATIVE, "--backward", MIGRATION_BREAKS="Dot"))

        assert (fields(database), entries(database)) == ({"holder", "balance"}, NAMES)

    def test_without_the_binding_it_leaves_what_its_function_wrote(
        self, migrate: Any, database: Any
    ) -> None:
        broken(migrate(ITERATIVE, MIGRATION_BREAKS="Dot", MIGRATION_UNBOUND="yes"))

        assert (fields(database), entries(database)) == ({"owner", "balance"}, NAMES[:4])


class TestBindMigration:
    def test_only_a_migration_can_be_bound(self) -> None:
        async def forward(session: Any) -> None:
            """Not decorated."""

        with pytest.raises(TypeError, match="put it above @iterative_migration"):
            bind_migration()(forward)  # type: ignore[type-var]

    def test_a_class_without_the_mixin_is_refused(self, server_uri: str) -> None:
        async def run() -> None:
            client = DRIVER.client_class(server_uri)
            session = await DRIVER.start_session(client)
            try:
                await migration.run(session=session)
            finally:
                await DRIVER.end_session(session)
                await close(client)

        class Plain(Document):
            """Without the mixin."""

        @bind_migration([Plain])  # type: ignore[list-item]
        @free_fall_migration(document_models=[])
        async def migration(session: Any) -> None:
            raise AssertionError

        with pytest.raises(TypeError, match="Plain has no SessionScopeMixin"):
            asyncio.run(run())
