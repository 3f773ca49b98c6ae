"""Many checkouts at once on the last items of stock: none sold twice, none lost.

``SHOP_CHECKOUTS`` says how many requests; ``-s`` shows what became of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from .serving import Customer, FailPoint, OpenShop, await_no_transactions

REQUESTS = int(os.environ.get("SHOP_CHECKOUTS", "40"))
STOCK = REQUESTS // 10
PRICE = {"last": 1000, "gift": 300}
REPEATED = "repeated"


@dataclass(frozen=True)
class Attempt:
    """A request to be sent: some customers send the same twice, or another one at once."""

    customer: str
    key: str
    is_impatient: bool = False


def requests() -> list[Attempt]:
    """Of ten requests, seven are by seven customers; two send theirs twice, one buys twice."""
    found = []
    for ten in range(REQUESTS // 10):
        names = [f"customer-{ten}-{number}" for number in range(7)]
        found += [Attempt(name, REPEATED) for name in names]
        found += [Attempt(name, REPEATED) for name in names[:2]]
        found += [Attempt(names[2], "another")]
    return found


@dataclass
class Crowd:
    """Everybody who wants the last items, at the same time."""

    http: httpx.AsyncClient
    total: dict[str, int]
    answers: list[tuple[Attempt, httpx.Response]] = field(default_factory=list)
    asked_again: int = 0

    async def rush(self, attempts: list[Attempt]) -> None:
        await asyncio.gather(*(self._buy(attempt) for attempt in attempts))

    async def _buy(self, attempt: Attempt) -> None:
        """Send a request, and again while it is not known what became of it."""
        customer = Customer(self.http, attempt.customer)
        patience = 0.3 if attempt.is_impatient else 60
        while True:
            try:
                answer = await customer.check_out(
                    self.total[attempt.customer], attempt.key, timeout=patience
                )
            except httpx.TimeoutException:
                patience = 60
            else:
                if answer.status_code != 503:
                    self.answers.append((attempt, answer))
                    return
            self.asked_again += 1

    def outcomes(self) -> Counter[tuple[int, str]]:
        return Counter((a.status_code, a.json().get("title", "Order")) for _, a in self.answers)

    def orders(self) -> set[str]:
        """Return the orders that customers know of."""
        return {a.json()["order"] for _, a in self.answers if a.status_code < 300}


async def open_for(attempts: list[Attempt], http: httpx.AsyncClient, database: Any) -> Crowd:
    """Give everybody money and a full cart; every fifth customer has too little money."""
    database.products.insert_many(
        [
            {"_id": "last", "name": "Last items", "price": PRICE["last"], "stock": STOCK},
            {"_id": "gift", "name": "Gift wrap", "price": PRICE["gift"], "stock": REQUESTS},
        ]
    )
    names = sorted({attempt.customer for attempt in attempts})
    carts = {n: {"last": 1} if i % 2 else {"last": 1, "gift": 1} for i, n in enumerate(names)}
    database.carts.insert_many([{"_id": name, "items": carts[name]} for name in names])
    database.accounts.insert_many(
        [{"_id": name, "balance": 999 if i % 5 == 0 else 2500} for i, name in enumerate(names)]
    )
    return Crowd(http, {name: sum(map(PRICE.__getitem__, carts[name])) for name in names})


def audit(database: Any, money: int) -> list[dict[str, Any]]:
    """Check what the server holds, and return the orders."""
    orders = list(database.orders.find())
    payments = {payment["_id"]: payment for payment in database.payments.find()}
    lines = [line for order in orders for line in order["lines"]]
    sold = Counter(dict.fromkeys(PRICE, 0))
    for line in lines:
        sold[line["sku"]] += line["quantity"]
    left = {each["_id"]: each["stock"] for each in database.products.find()}

    assert (left["last"], sold["last"]) == (0, STOCK)
    assert left["gift"] + sold["gift"] == REQUESTS
    assert money_in(database) == money
    assert len(payments) == len(orders)
    for order in orders:
        payment = payments[order["payment"].id]
        assert (payment["customer"], payment["amount"]) == (order["customer"], order["total"])
        assert order["total"] == sum(line["price"] * line["quantity"] for line in order["lines"])
    return orders


def money_in(database: Any) -> int:
    """Return what the customers have, and what the shop got."""
    balances = [account["balance"] for account in database.accounts.find()]
    assert min(balances) >= 0
    return sum(balances) + sum(payment["amount"] for payment in database.payments.find())


TRANSIENT = {"errorCode": 112, "errorLabels": ["TransientTransactionError"]}
NOT_ANSWERED = {"errorCode": 89, "errorLabels": ["UnknownTransactionCommitResult"]}
NOT_REPLICATED = {"writeConcernError": {"code": 100, "errmsg": "not enough members"}}
CONNECTION_LOST = {"closeConnection": True}
SLOW = {"blockConnection": True, "blockTimeMS": 400}
FAULTS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "without faults": None,
    "all at the same time": None,
    "commits that conflict": ("commitTransaction", TRANSIENT),
    "commits without an answer": ("commitTransaction", NOT_ANSWERED),
    "commits of unknown outcome": ("commitTransaction", NOT_REPLICATED),
    "lost connections": ("update", CONNECTION_LOST),
    "clients that disconnect": ("commitTransaction", SLOW),
}
FEW = 3


@pytest.fixture
def retries() -> Iterator[Counter[str]]:
    """How often the library ran a transaction, or sent a commit, again."""
    counted: Counter[str] = Counter()
    handler = logging.Handler()
    handler.emit = lambda record: counted.update([getattr(record, "event", "")])
    logger = logging.getLogger("beanie_session_scope")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield counted
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.fixture(params=FAULTS, ids=[name.replace(" ", "-") for name in FAULTS])
def fault(
    request: pytest.FixtureRequest, fail_point: FailPoint
) -> tuple[str, AbstractContextManager[None]]:
    chosen = FAULTS[request.param]
    if chosen is None:
        return request.param, nullcontext()
    command, data = chosen
    return request.param, fail_point(command, times=max(FEW, REQUESTS // 20), **data)


@pytest.mark.timeout(300)
class TestTheLastItems:
    async def test_are_sold_once_each(
        self,
        shop: OpenShop,
        http: httpx.AsyncClient,
        database: Any,
        server_uri: str,
        fault: tuple[str, AbstractContextManager[None]],
        retries: Counter[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        name, failing = fault
        attempts = requests()
        if name == "clients that disconnect":
            attempts = [Attempt(each.customer, each.key, True) for each in attempts]
        if name == "all at the same time":
            everybody = asyncio.Semaphore(REQUESTS)
            monkeypatch.setattr(shop.app.state.checkout, "turns", everybody)
        crowd = await open_for(attempts, http, database)
        money = money_in(database)

        began = time.perf_counter()
        with failing:
            await crowd.rush(attempts)
        took = time.perf_counter() - began

        orders = audit(database, money)
        stored = {str(order["_id"]) for order in orders}
        assert crowd.orders() == stored
        assert sorted(shop.sent) == sorted(stored)
        assert len(crowd.answers) == len(attempts)
        assert set(crowd.outcomes()) <= {
            (201, "Order"),
            (200, "Order"),
            (402, "Insufficient funds"),
            (409, "Out of stock"),
            (409, "Empty cart"),
        }
        placed = Counter(a.json()["order"] for _, a in crowd.answers if a.status_code == 201)
        assert set(placed.values()) <= {1}
        await await_no_transactions(server_uri)
        report(name, crowd, retries, took)


def report(name: str, crowd: Crowd, retries: Counter[str], took: float) -> None:
    outcomes = ", ".join(
        f"{number} x {status} {title}"
        for (status, title), number in sorted(crowd.outcomes().items())
    )
    print(
        f"\n{name}: {REQUESTS} checkouts of {STOCK} items in {took:.2f} s "
        f"({REQUESTS / took:.0f}/s): {outcomes}; {retries['retry']} transactions run again, "
        f"{retries['commit.retry']} commits sent again, {crowd.asked_again} requests repeated"
    )
