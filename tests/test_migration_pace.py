"""How large a batch is, and who hears how far a migration has come."""

from __future__ import annotations

import asyncio
import importlib
import io
import logging
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from beanie import init_beanie
from clients import close
from migration_models import Bike
from pymongo.errors import OperationFailure
from wire import APP_NAME, DATABASE, FailPoint, open_transactions

from beanie_session_scope import TransactionExpiredError
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.migration import CHECKPOINTS, migrate_in_batches
from beanie_session_scope.migration._pace import MOST_BYTES, Pace, lifetime_limit
from beanie_session_scope.migration._progress import INTERVAL, Lines, progress_of
from beanie_session_scope.testing import ReplicaSet

pytestmark = pytest.mark.timeout(60)

NAME = "count the bikes"


@pytest_asyncio.fixture
async def bikes(client: Any, database: Any) -> Any:
    """The collection of the bikes, empty."""
    await init_beanie(database=database, document_models=[Bike])
    await database["migration_bikes"].delete_many({})
    await database[CHECKPOINTS].delete_many({})
    return database["migration_bikes"]


async def store(bikes: Any, number: int, **fields: Any) -> None:
    await bikes.insert_many([{"_id": i, "color": "red", "n": 0, **fields} for i in range(number)])


async def counts(bikes: Any) -> list[int]:
    return [each["n"] async for each in bikes.find().sort("_id", 1)]


def add_one(bike: Bike) -> None:
    bike.n += 1


class TestPace:
    def test_it_aims_at_a_tenth_of_the_limit_of_the_server(self) -> None:
        assert (Pace(100, 60).target, Pace(100, 20).target, Pace(100, 3600).target) == (5, 2, 5)

    def test_a_slow_batch_is_followed_by_one_that_takes_as_long_as_it_should(self) -> None:
        pace = Pace(1000, 60)

        pace.took(20, documents=1000)

        assert pace.size == 250

    def test_quick_ones_are_followed_by_larger_ones_up_to_the_first_size(self) -> None:
        pace, sizes = Pace(1000, 60), []
        pace.took(50, documents=1000)
        for _ in range(12):
            pace.took(0.1, documents=pace.size)
            sizes.append(pace.size)

        assert sizes[:3] == [126, 158, 198]
        assert sizes == sorted(sizes)
        assert sizes[-1] == 1000

    def test_one_that_is_neither_changes_nothing(self) -> None:
        pace = Pace(1000, 60)
        pace.took(10, documents=1000)

        pace.took(4, documents=500)

        assert pace.size == 500

    def test_what_was_too_much_at_once_is_not_tried_again(self) -> None:
        pace = Pace(100, 60)
        pace.shrink_after(TransactionExpiredError())

        pace.took(0.1, documents=50)

        assert pace.size == 50

    def test_one_document_is_the_least(self) -> None:
        pace = Pace(2, 60)

        for _ in range(3):
            pace.took(50, documents=1)

        assert pace.size == 1
        assert not pace.shrink_after(TransactionExpiredError())

    @pytest.mark.parametrize(
        ("error", "size"),
        [
            (TransactionExpiredError(), 50),
            (OperationFailure("", 257, {"codeName": "TransactionTooLarge"}), 50),
            (OperationFailure("", 0, {"codeName": "TransactionTooLargeForCache"}), 50),
            (OperationFailure("", 13, {"codeName": "Unauthorized"}), 100),
            (OperationFailure("", 13), 100),
            (KeyError(), 100),
        ],
    )
    def test_only_what_is_too_much_at_once_is_halved(self, error: Exception, size: int) -> None:
        pace = Pace(100, 60)

        assert pace.shrink_after(error) is (size == 50)
        assert pace.size == size

    async def test_the_limit_is_that_of_the_server(
        self, client: Any, fail_point: FailPoint
    ) -> None:
        assert await lifetime_limit(client) == 60
        with fail_point("getParameter", error_code=13, times=1):
            assert await lifetime_limit(client) == 60


class TestBatch:
    async def test_it_ends_when_it_has_read_enough(self, bikes: Any) -> None:
        await store(bikes, 5, color="x" * (MOST_BYTES // 2))

        summary = await migrate_in_batches(Bike, add_one, name=NAME)

        assert summary.batches == 3
        assert await counts(bikes) == [1] * 5

    @pytest.mark.starts_servers
    async def test_too_slow_a_change_ends_it_in_time(self) -> None:
        async def slow(bike: Bike) -> None:
            add_one(bike)
            await asyncio.sleep(0.1)

        with ReplicaSet(set_parameters={"transactionLifetimeLimitSeconds": 2}) as replica_set:
            async for bikes in bikes_on(replica_set):
                await store(bikes, 25)  # longer than the server allows, taken together

                summary = await migrate_in_batches(Bike, slow, name=NAME)

                assert await counts(bikes) == [1] * 25
                assert summary.batches >= 8

    @pytest.mark.starts_servers
    async def test_one_that_the_server_has_ended_is_tried_again_smaller(self) -> None:
        seen: list[int] = []

        async def slow(bike: Bike) -> None:
            seen.append(bike.id)
            add_one(bike)
            if seen.count(0) == 1 and bike.id == 0:
                # As long as it takes until the server has ended this transaction.
                while await asyncio.to_thread(open_transactions, replica_set.uri):
                    await asyncio.sleep(0.05)

        with ReplicaSet(set_parameters={"transactionLifetimeLimitSeconds": 1}) as replica_set:
            async for bikes in bikes_on(replica_set):
                await store(bikes, 4)

                await migrate_in_batches(Bike, slow, name=NAME, batch_size=4)

                assert await counts(bikes) == [1] * 4
                assert seen[:3] == [0, 0, 1]


async def bikes_on(replica_set: ReplicaSet) -> AsyncIterator[Any]:
    client = DRIVER.client_class(replica_set.uri, appname=APP_NAME)
    await init_beanie(database=client[DATABASE], document_models=[Bike])
    yield client[DATABASE]["migration_bikes"]
    await close(client)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestProgress:
    @pytest.mark.parametrize("query", [lambda: Bike, lambda: Bike.find(Bike.n < 10)])
    async def test_a_terminal_shows_a_bar(
        self, bikes: Any, monkeypatch: pytest.MonkeyPatch, query: Any
    ) -> None:
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        await store(bikes, 20)

        await migrate_in_batches(query(), add_one, name=NAME, batch_size=5)

        assert f"{NAME}: 100%" in terminal.getvalue()
        assert "20/20" in terminal.getvalue()

    async def test_a_bar_begins_with_what_is_left(
        self, bikes: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def change(bike: Bike) -> None:
            if bike.id == 15:
                raise KeyError

        await store(bikes, 20)
        with pytest.raises(KeyError):
            await migrate_in_batches(Bike, change, name=NAME, batch_size=5)
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())

        await migrate_in_batches(Bike, add_one, name=NAME, batch_size=5, progress="bar")

        assert "5/5" in terminal.getvalue()

    async def test_elsewhere_only_the_log_tells(
        self, bikes: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "beanie_session_scope.migration")
        await store(bikes, 3)

        summary = await migrate_in_batches(Bike, add_one, name=NAME)

        (record,) = [each for each in caplog.records if "is complete" in each.getMessage()]
        assert record.getMessage() == str(summary)
        assert (record.event, record.changed) == ("migration.complete", 3)  # type: ignore[attr-defined]
        assert str(summary).startswith(f"Migration {NAME!r} is complete: 3 changed, 0 unchanged")
        assert capsys.readouterr() == ("", "")

    async def test_one_that_stops_says_so(
        self, bikes: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        def change(bike: Bike) -> None:
            raise KeyError

        await store(bikes, 3)

        with pytest.raises(KeyError):
            await migrate_in_batches(Bike, change, name=NAME)

        (record,) = [each for each in caplog.records if each.name.endswith(".migration")]
        assert (record.levelname, "has stopped: 0 changed" in record.getMessage()) == (
            "WARNING",
            True,
        )

    def test_the_log_has_a_line_now_and_then(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "beanie_session_scope.migration")
        clock = iter([0, 1, INTERVAL, INTERVAL + 1, 2 * INTERVAL])
        lines = Lines(clock=lambda: next(clock))

        lines.start(NAME, None)
        for _ in range(4):
            lines.advance(100)

        assert [each.getMessage() for each in caplog.records] == [
            f"Migration {NAME!r}: 200 documents so far, 40 per second",
            f"Migration {NAME!r}: 400 documents so far, 40 per second",
        ]

    @pytest.mark.parametrize(
        ("kind", "terminal", "shown"),
        [
            ("auto", True, "Bar"),
            ("auto", False, "Lines"),
            ("bar", False, "Bar"),
            ("log", True, "Lines"),
            ("off", True, "Silence"),
        ],
    )
    def test_the_kind_may_be_chosen(
        self, monkeypatch: pytest.MonkeyPatch, kind: Any, terminal: bool, shown: str
    ) -> None:
        monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())

        assert type(progress_of(kind)).__name__ == shown

    def test_without_tqdm_there_is_no_bar(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module("beanie_session_scope.migration._progress")
        monkeypatch.setattr(module, "find_spec", lambda name: None)
        monkeypatch.setitem(sys.modules, "tqdm", None)
        monkeypatch.setattr(sys, "stderr", Terminal())

        assert type(progress_of("auto")).__name__ == "Lines"
        with pytest.raises(ImportError, match="beanie_session_scope\\[migration\\]"):
            progress_of("bar")

    def test_without_a_standard_error_there_is_no_bar(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stderr", None)

        assert type(progress_of("auto")).__name__ == "Lines"
