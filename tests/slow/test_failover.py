"""The primary of three nodes fails under load, and nobody's money is lost.

``BANK_TRANSFERS`` says how many transfers the full load is made of.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from accidents import FAULTS, MOMENTS, Accident, break_and_mend, mend
from bank import (
    ACCOUNTS,
    DEPOSIT,
    Account,
    Audit,
    Bank,
    BaselineBank,
    Book,
    Order,
    Outcome,
    Samples,
    ScopedBank,
    orders,
    serve,
)
from clients import close
from wire import APP_NAME, DATABASE, open_transactions

from beanie_session_scope import current_scope, waiting
from beanie_session_scope.binding import SCOPE
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.testing import ReplicaSet

pytestmark = [pytest.mark.slow, pytest.mark.starts_servers]

TRANSFERS = int(os.environ.get("BANK_TRANSFERS", "1000"))
TASKS = 50
OPTIONS: dict[str, Any] = {
    "w": "majority",
    "appname": APP_NAME,
    "heartbeatFrequencyMS": 500,
    "connectTimeoutMS": 1000,
    # A paused server takes what it is sent, and never answers.
    "socketTimeoutMS": 4000,
    "serverSelectionTimeoutMS": 20000,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[ReplicaSet]:
    """Three nodes, all of them well whenever a test begins."""
    with ReplicaSet(nodes=3) as cluster:
        yield cluster


def other_tasks() -> set[asyncio.Task[Any]]:
    """Return the tasks that run beside this one, without those of the driver's clients."""
    return {
        task
        for task in asyncio.all_tasks() - {asyncio.current_task()}
        if "pymongo" not in task.get_coro().cr_code.co_filename  # type: ignore[union-attr]
    }


@asynccontextmanager
async def client_of(cluster: ReplicaSet, **options: Any) -> AsyncIterator[Any]:
    """Yield a client, and find that nothing is left behind it."""
    client = DRIVER.client_class(cluster.uri, **{**OPTIONS, **options})
    try:
        yield client
        # What the paused server never answered may still be cleaned up in the background.
        end = time.monotonic() + 30
        while (other_tasks() or waiting._background) and time.monotonic() < end:
            await asyncio.sleep(0.01)
        assert other_tasks() == set()
        assert not waiting._background
        assert [open_transactions(member.uri) for member in cluster.members] == [0, 0, 0]
        assert current_scope() is None
        assert SCOPE.get() is None
        assert Account._scope_variable.get() is None
    finally:
        await close(client)


@pytest_asyncio.fixture
async def client(cluster: ReplicaSet) -> AsyncIterator[Any]:
    """A client that goes on when the primary does not."""
    async with client_of(cluster) as client:
        yield client


@pytest.fixture
def events() -> Iterator[Counter[str]]:
    """What the package has logged so far: its events, and how often."""
    counts: Counter[str] = Counter()

    def count(record: logging.LogRecord) -> bool:
        counts[record.event] += 1  # type: ignore[attr-defined]
        return record.levelno > logging.INFO  # pytest would keep thousands of the others

    logger = logging.getLogger("beanie_session_scope")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(count)
    yield counts
    logger.removeFilter(count)
    logger.setLevel(level)


async def check(bank: Bank, book: Book, count: int) -> Audit:
    """Find the data to be what everybody was told."""
    audit = await bank.audit(book)
    assert len(book.outcomes) == count
    assert audit.lost == set()
    assert audit.duplicated == set()
    assert audit.failed_but_stored == set()
    assert audit.invented == set()
    assert audit.sum == ACCOUNTS * DEPOSIT
    # Of unknown ones, too, the balances hold just those that the ledger holds.
    assert audit.wrong_accounts == set()
    return audit


class TestOneTransferWhosePrimaryFails:
    @pytest.mark.timeout(90)
    @pytest.mark.parametrize("moment", MOMENTS)
    @pytest.mark.parametrize("fault", FAULTS)
    async def test_is_carried_out_once_and_so_are_those_around_it(
        self, cluster: ReplicaSet, client: Any, fault: str, moment: str
    ) -> None:
        bank, book = ScopedBank(client, DATABASE, timeout=60.0, cleanup_timeout=2.0), Book()
        await bank.open()
        todo = orders(48)
        accident = Accident(cluster, fault, moment, todo[16])
        accident.arrange(bank)
        await serve(bank, todo, 8, book)
        await accident.is_over()
        await check(bank, book, len(todo))
        assert book.outcomes[todo[16].number] is Outcome.ACKNOWLEDGED
        # A majority had the transaction before its answer was lost: it was only asked again.
        assert (accident.attempts_after == 0) is (moment == "before its answer")
        gap = book.longest_gap(book.began, book.ended)
        print(
            f"\n{fault} {moment}: {len(todo)} transfers, {bank.attempts} attempts, "
            f"{len(book.numbers(Outcome.UNKNOWN))} unknown, recovered in {gap:.1f} s",
            end="",
        )


class TestTransfersWithoutAMajority:
    @pytest.mark.timeout(90)
    async def test_are_unknown_or_failed_where_it_stays_away_and_the_data_agrees(
        self, cluster: ReplicaSet
    ) -> None:
        async with client_of(cluster, serverSelectionTimeoutMS=1000) as client:
            bank, book = ScopedBank(client, DATABASE, timeout=2.0, cleanup_timeout=2.0), Book()
            await self._serve(cluster, bank, book, lambda: bool(book.numbers(Outcome.UNKNOWN)))
            audit = await check(bank, book, 200)
        unknown, failed = book.numbers(Outcome.UNKNOWN), book.numbers(Outcome.FAILED)
        assert unknown
        print(
            f"\nno majority: 200 transfers, {len(failed)} failed, {len(unknown)} unknown "
            f"({len(audit.unknown_and_stored)} stored), {dict(book.errors)}",
            end="",
        )

    @pytest.mark.timeout(90)
    async def test_are_carried_out_where_it_comes_back_in_time(
        self, cluster: ReplicaSet, events: Counter[str]
    ) -> None:
        async with client_of(cluster, serverSelectionTimeoutMS=1000) as client:
            bank, book = ScopedBank(client, DATABASE, timeout=60.0, cleanup_timeout=2.0), Book()
            # The driver has sent a commit twice by then; from here on the package sends it.
            await self._serve(
                cluster,
                bank,
                book,
                lambda: bool(events["commit.retry"] or book.numbers(Outcome.UNKNOWN)),
            )
            await check(bank, book, 200)
        assert book.errors == {"RefusedError": 4}
        assert events["commit.retry"]
        print(f"\nno majority for a while: 200 transfers, {dict(events)}", end="")

    @staticmethod
    async def _serve(
        cluster: ReplicaSet, bank: Bank, book: Book, long_enough: Callable[[], bool]
    ) -> None:
        await bank.open()
        serving = asyncio.ensure_future(serve(bank, orders(200), 8, book))
        await book.reaches(50)
        others = [member for member in cluster.members if member is not cluster.primary]
        for member in others:
            cluster.pause(member)
        # The primary takes commits that no other node can confirm, then gives up its role.
        while not (serving.done() or long_enough()):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(mend, cluster, *others)
        await serving


class Report:
    """What two banks did under the same load, side by side."""

    def __init__(self) -> None:
        self._columns: dict[str, dict[str, str]] = {}

    def add(self, name: str, figures: dict[str, str]) -> None:
        """Add a bank."""
        self._columns[name] = figures

    def __str__(self) -> str:
        """Draw the table."""
        lines = [f"{'':<28}" + "".join(f"{name:>22}" for name in self._columns)]
        for row in next(iter(self._columns.values())):
            values = (f"{figures[row]:>22}" for figures in self._columns.values())
            lines.append(f"{row:<28}" + "".join(values))
        return "\n".join(lines)


class Load:
    """All transfers of one bank, while the primary fails three times.

    Args:
        cluster: The replica set.
        bank: The bank.
    """

    def __init__(self, cluster: ReplicaSet, bank: Bank) -> None:
        self._cluster = cluster
        self._struck_at: dict[str, float] = {}
        self._struck = {fault: asyncio.Event() for fault in FAULTS}
        self.bank = bank
        self.book = Book()
        self.samples = Samples()

    async def run(self) -> Audit:
        """Run it; return what the data says afterwards."""
        await self.bank.open()
        self.bank.before_all = self._wait_for_faults
        self.book = Book()
        sampling = asyncio.ensure_future(self.samples.take(self.bank))
        breaking = asyncio.ensure_future(self._break())
        await serve(self.bank, orders(TRANSFERS), TASKS, self.book)
        await breaking
        sampling.cancel()
        await asyncio.wait([sampling])
        return await self.bank.audit(self.book)

    async def _break(self) -> None:
        for number, fault in enumerate(FAULTS, 1):
            await self.book.reaches(number * TRANSFERS // 4)
            self._struck_at[fault] = time.monotonic()
            self._struck[fault].set()
            await break_and_mend(self._cluster, fault)

    async def _wait_for_faults(self, order: Order) -> None:
        """Don't get far past the moment of a fault, should the one before still be mended."""
        for number, struck in enumerate(self._struck.values(), 1):
            if order.number >= number * TRANSFERS // 4 + TRANSFERS // 8:
                await struck.wait()

    def figures(self, audit: Audit) -> dict[str, str]:
        """Return the rows of the report."""
        book = self.book
        told = {outcome: len(book.numbers(outcome)) for outcome in Outcome}
        return {
            "transfers/s": f"{len(book.outcomes) / (book.ended - book.began):.1f}",
            "acknowledged": str(told[Outcome.ACKNOWLEDGED]),
            "failed (refused)": f"{told[Outcome.FAILED]} ({book.errors['RefusedError']})",
            "failed, and stored": str(len(audit.failed_but_stored)),
            "unknown (stored)": f"{told[Outcome.UNKNOWN]} ({len(audit.unknown_and_stored)})",
            "retries": str(self.bank.attempts - len(book.outcomes)),
            "lost": str(len(audit.lost)),
            "duplicated": str(len(audit.duplicated)),
            "wrong accounts": str(len(audit.wrong_accounts)),
            "sums seen (wrong)": f"{self.samples.seen} ({self.samples.wrong})",
            **self._recovery(),
        }

    def _recovery(self) -> dict[str, str]:
        begins = list(self._struck_at.values())
        ends = [*begins[1:], self.book.ended]
        return {
            f"recovered from {fault}": f"{self.book.longest_gap(begin, end):.1f} s"
            for fault, begin, end in zip(self._struck_at, begins, ends, strict=True)
        }


class TestTheFullLoad:
    @pytest.mark.timeout(1800)
    async def test_moves_no_money_twice_and_loses_none_while_primaries_fail(
        self, cluster: ReplicaSet, client: Any, events: Counter[str]
    ) -> None:
        load = Load(cluster, ScopedBank(client, DATABASE, timeout=60.0, cleanup_timeout=2.0))
        audit = await load.run()
        logged = dict(events)
        baseline = Load(cluster, BaselineBank(client, DATABASE))
        baseline_audit = await baseline.run()
        report = Report()
        report.add("run_in_transaction", load.figures(audit))
        report.add("with_transaction", baseline.figures(baseline_audit))
        print(f"\n{TRANSFERS} transfers, {TASKS} tasks, {ACCOUNTS} accounts, {DRIVER.name}")
        print(report)
        print(f"errors: {dict(load.book.errors)} / {dict(baseline.book.errors)}; logged: {logged}")
        await check(load.bank, load.book, TRANSFERS)
        assert load.samples.seen and not load.samples.wrong
        assert logged["retry"] == load.bank.attempts - TRANSFERS
