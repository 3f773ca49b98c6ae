"""A bank whose money is moved in transactions, and what an auditor finds in it afterwards.

One bank runs on ``run_in_transaction``. The other one is the baseline: the same work with the
driver's own ``with_transaction``, and the session passed by hand.
"""

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any, ClassVar

from beanie import Document, init_beanie
from pymongo.errors import PyMongoError
from pymongo.read_concern import ReadConcern

from beanie_session_scope import (
    CommitUnknownError,
    SessionScopeMixin,
    current_scope,
    run_in_transaction,
    with_session,
)
from beanie_session_scope.drivers import DRIVER

ACCOUNTS = 10
DEPOSIT = 10**9
UNKNOWN_COMMIT = "UnknownTransactionCommitResult"


class Account(SessionScopeMixin, Document):
    id: int
    balance: int = DEPOSIT

    class Settings:
        name = "account"


class Entry(SessionScopeMixin, Document):
    """A row of the ledger. ``order`` is no key: a transfer that ran twice must show."""

    order: int
    source: int
    target: int
    amount: int

    class Settings:
        name = "entry"


class BaselineAccount(Document):
    id: int
    balance: int = DEPOSIT

    class Settings:
        name = "baseline_account"


class BaselineEntry(Document):
    order: int
    source: int
    target: int
    amount: int

    class Settings:
        name = "baseline_entry"


@dataclass(frozen=True)
class Order:
    """One transfer that somebody asks for."""

    number: int
    source: int
    target: int
    amount: int
    refused: bool

    def row(self) -> dict[str, int]:
        """Return the row of the ledger."""
        return {
            "order": self.number,
            "source": self.source,
            "target": self.target,
            "amount": self.amount,
        }


def orders(count: int, seed: int = 1) -> list[Order]:
    """Make up transfers; every fiftieth is one that the bank refuses after it has written.

    The amounts are large and random: two errors don't cancel each other out.
    """
    chance = random.Random(seed)
    made = []
    for number in range(count):
        source, target = chance.sample(range(ACCOUNTS), 2)
        amount = chance.randrange(1, 10**6)
        made.append(Order(number, source, target, amount, refused=number % 50 == 49))
    return made


class RefusedError(Exception):
    """The bank does not carry out an order."""


class Outcome(Enum):
    """What the one who asked for a transfer was told."""

    ACKNOWLEDGED = "acknowledged"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass
class Book:
    """What those who asked for transfers were told, and when."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    acknowledged_at: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0

    def write(self, order: Order, error: Exception | None) -> None:
        """Write down how an order ended."""
        if error is None:
            self.outcomes[order.number] = Outcome.ACKNOWLEDGED
            self.acknowledged_at.append(time.monotonic())
            return
        unknown = is_unknown(error)
        self.outcomes[order.number] = Outcome.UNKNOWN if unknown else Outcome.FAILED
        self.errors[type(error).__name__] += 1

    def numbers(self, outcome: Outcome) -> set[int]:
        """Return the numbers of the orders that ended so."""
        return {number for number, each in self.outcomes.items() if each is outcome}

    def longest_gap(self, begin: float, end: float) -> float:
        """Return for how long nothing was acknowledged, at most, before it was, in a time."""
        pairs = pairwise([self.began, *self.acknowledged_at])
        gaps = (later - earlier for earlier, later in pairs if begin < later <= end)
        return max(gaps, default=end - begin)

    async def reaches(self, count: int) -> None:
        """Wait until so many orders have ended."""
        while len(self.outcomes) < count:
            await asyncio.sleep(0.01)


def is_unknown(error: Exception) -> bool:
    """Tell whether an error says that the outcome can't be known."""
    return isinstance(error, CommitUnknownError) or (
        isinstance(error, PyMongoError) and error.has_error_label(UNKNOWN_COMMIT)
    )


@dataclass
class Audit:
    """What the data says of the outcomes."""

    lost: set[int]
    duplicated: set[int]
    failed_but_stored: set[int]
    unknown_and_stored: set[int]
    invented: set[int]
    sum: int
    wrong_accounts: set[int]


Moment = Callable[[Order], Awaitable[None]]


async def nothing(order: Order) -> None:
    """Happens at most moments."""


class Bank(ABC):
    """Ten accounts, and a ledger.

    Args:
        client: A client of the installed driver.
        database: The name of the database.

    Attributes:
        attempts: How often a transfer was begun.
        before_all: What happens before a transfer is begun for the first time.
        in_body: What happens in the middle of a transfer.
        before_commit: What happens between the last write of a transfer and its commit.
    """

    account: ClassVar[Any]
    entry: ClassVar[Any]

    def __init__(self, client: Any, database: str) -> None:
        self.client = client
        self.database = client[database]
        self.attempts = 0
        self.before_all: Moment = nothing
        self.in_body: Moment = nothing
        self.before_commit: Moment = nothing

    async def open(self) -> None:
        """Begin with nothing but the deposits."""
        await init_beanie(database=self.database, document_models=[self.account, self.entry])
        for model in (self.account, self.entry):
            await model.delete_all()
        await self.account.insert_many([self.account(id=number) for number in range(ACCOUNTS)])
        await self.database[self.entry.Settings.name].create_index("order")

    @abstractmethod
    async def transfer(self, order: Order) -> None:
        """Carry out an order, and return when it is stored."""

    @abstractmethod
    async def total(self) -> int:
        """Return the sum of all balances at one point in time."""

    async def audit(self, book: Book) -> Audit:
        """Compare what people were told with the data, which a majority of the nodes has."""
        rows = await self._stored(self.entry)
        balances = {row["_id"]: row["balance"] for row in await self._stored(self.account)}
        stored = Counter(row["order"] for row in rows)
        replayed = dict.fromkeys(range(ACCOUNTS), DEPOSIT)
        for row in rows:
            replayed[row["source"]] -= row["amount"]
            replayed[row["target"]] += row["amount"]
        return Audit(
            lost=book.numbers(Outcome.ACKNOWLEDGED) - set(stored),
            duplicated={number for number, times in stored.items() if times > 1},
            failed_but_stored=book.numbers(Outcome.FAILED) & set(stored),
            unknown_and_stored=book.numbers(Outcome.UNKNOWN) & set(stored),
            invented=set(stored) - set(book.outcomes),
            sum=sum(balances.values()),
            wrong_accounts={number for number in replayed if balances[number] != replayed[number]},
        )

    async def _stored(self, model: Any) -> list[dict[str, Any]]:
        concern = ReadConcern("majority")
        collection = self.database.get_collection(model.Settings.name, read_concern=concern)
        rows: list[dict[str, Any]] = await collection.find({}).to_list(None)
        return rows


SUM: list[dict[str, Any]] = [{"$group": {"_id": None, "sum": {"$sum": "$balance"}}}]


class ScopedBank(Bank):
    """The bank that this package keeps.

    Args:
        options: Those of ``run_in_transaction``.
    """

    account = Account
    entry = Entry

    def __init__(self, client: Any, database: str, **options: Any) -> None:
        super().__init__(client, database)
        self._options = options

    async def transfer(self, order: Order) -> None:
        await run_in_transaction(
            self._body, order, client=self.client, collections=[Account, Entry], **self._options
        )

    async def _body(self, order: Order) -> None:
        self.attempts += 1
        scope = current_scope()
        assert scope is not None
        scope.before_commit(lambda: self.before_commit(order))
        await Account.find_one({"_id": order.source}).inc({"balance": -order.amount})
        await self.in_body(order)
        await Account.find_one({"_id": order.target}).inc({"balance": order.amount})
        await Entry(**order.row()).insert()
        if order.refused:
            raise RefusedError

    async def total(self) -> int:
        async with with_session(self.client, [Account], transaction=False, snapshot=True):
            (found,) = await Account.aggregate(SUM).to_list()
        return int(found["sum"])


class BaselineBank(Bank):
    """The bank that the driver's ``with_transaction`` keeps."""

    account = BaselineAccount
    entry = BaselineEntry

    async def transfer(self, order: Order) -> None:
        async def body(session: Any) -> None:
            self.attempts += 1
            source = BaselineAccount.find_one({"_id": order.source}, session=session)
            await source.inc({"balance": -order.amount}, session=session)
            await self.in_body(order)
            target = BaselineAccount.find_one({"_id": order.target}, session=session)
            await target.inc({"balance": order.amount}, session=session)
            await BaselineEntry(**order.row()).insert(session=session)
            if order.refused:
                raise RefusedError
            await self.before_commit(order)

        async with await DRIVER.start_session(self.client) as session:
            await session.with_transaction(body)

    async def total(self) -> int:
        async with await DRIVER.start_session(self.client, snapshot=True) as session:
            rows = BaselineAccount.aggregate(SUM, session=session)
            (found,) = await rows.to_list()
        return int(found["sum"])


async def serve(bank: Bank, todo: list[Order], tasks: int, book: Book) -> None:
    """Let tasks work off orders, and write down what each was told."""
    waiting = iter(todo)

    async def work() -> None:
        for order in waiting:
            await bank.before_all(order)
            try:
                await bank.transfer(order)
            except Exception as error:
                book.write(order, error)
            else:
                book.write(order, None)
            assert Account.get_session() is None
            assert current_scope() is None

    await asyncio.gather(*(work() for _ in range(tasks)))
    book.ended = time.monotonic()


@dataclass
class Samples:
    """The sums that were seen while money moved."""

    seen: int = 0
    wrong: int = 0
    unanswered: int = 0

    async def take(self, bank: Bank) -> None:
        """Take one sample after the other, until the task is cancelled."""
        while True:
            try:
                self.wrong += await bank.total() != ACCOUNTS * DEPOSIT
                self.seen += 1
            except PyMongoError:
                self.unanswered += 1  # there is no primary
            await asyncio.sleep(0.05)
