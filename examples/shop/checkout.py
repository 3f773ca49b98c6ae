"""Stock, payment and order: all of it, or nothing.

MongoDB lets one of two transactions that write the same document win, and wants the other one run
again. ``transactional`` does that. So the functions below may run several times for one
request, and everything that can't be taken back waits for the commit.
"""

import asyncio
import logging
from functools import partial
from typing import NamedTuple

from beanie import PydanticObjectId
from beanie.operators import Inc, Set

from beanie_session_scope import on_commit, transactional

from .models import Account, Cart, Order, OrderLine, Payment, Product, total_of
from .problems import (
    EmptyCartError,
    InsufficientFundsError,
    KeyReusedError,
    OutOfStockError,
    TotalChangedError,
)
from .services import find_cart, lines_of

logger = logging.getLogger("shop")

PATIENCE = 30.0
"""For how many seconds a checkout is tried again: no longer than a client waits."""

AT_ONCE = 8
"""How many checkouts run at the same time.

Where everybody wants the same few things, all but one of them conflict: more at once would mean
more work that is thrown away.
"""


class Placed(NamedTuple):
    """An order, and whether this request has placed it, and not an earlier one."""

    order: Order
    is_new: bool


class Confirmations:
    """Stands for what sends mails to customers."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, order_id: PydanticObjectId) -> None:
        logger.info("confirmation sent for order %s", order_id)
        self.sent.append(str(order_id))


class Checkout:
    """Turns carts into orders."""

    def __init__(self, confirmations: Confirmations) -> None:
        self.confirmations = confirmations
        self.turns = asyncio.Semaphore(AT_ONCE)

    async def place(self, customer: str, key: str, total: int) -> Placed:
        """Sell what is in the cart of a customer, for the total that the customer has seen."""
        async with self.turns:
            return await self._place(customer, key, total)

    @transactional(collections=[Product, Account, Cart, Order], timeout=PATIENCE)
    async def _place(self, customer: str, key: str, total: int) -> Placed:
        """Find the order of a key, or sell.

        The key makes it safe to ask again. Where two requests with one key meet, they write the
        same account, so one of them conflicts; run again, it finds the order of the other. (That no
        key has two orders is also in the database: the index is unique.)
        """
        order = await Order.find_one(Order.customer == customer, Order.key == key, fetch_links=True)
        if order is not None and order.total != total:
            raise KeyReusedError("This key belongs to an order with another total.")
        placed = Placed(order or await self._sell(customer, key, total), order is None)
        # Also for an order of an earlier request: that one may not have got so far.
        on_commit(partial(self._confirm, placed.order.id))
        return placed

    async def _sell(self, customer: str, key: str, total: int) -> Order:
        lines = await lines_of(await find_cart(customer))
        if not lines:
            raise EmptyCartError("There is nothing in the cart.")
        if total != total_of(lines):
            raise TotalChangedError("The cart has another total now: look at it again.")
        for line in lines:
            await self._take_from_stock(line)
        payment = await self._pay(customer, total)
        await Cart.find_one(Cart.id == customer).delete()
        order = Order(customer=customer, key=key, lines=lines, total=total, payment=payment)
        return await order.insert()

    async def _take_from_stock(self, line: OrderLine) -> None:
        enough = Product.find_one(Product.id == line.sku, Product.stock >= line.quantity)
        taken = await enough.update(Inc({Product.stock: -line.quantity}))
        if taken.matched_count == 0:
            raise OutOfStockError(f"There are not {line.quantity} of {line.sku} left.")

    async def _pay(self, customer: str, amount: int) -> Payment:
        enough = Account.find_one(Account.id == customer, Account.balance >= amount)
        debited = await enough.update(Inc({Account.balance: -amount}))
        if debited.matched_count == 0:
            raise InsufficientFundsError("There is not enough money in the account.")
        return await Payment(customer=customer, amount=amount).insert()

    async def _confirm(self, order_id: PydanticObjectId) -> None:
        """Send the confirmation of an order, unless that was done.

        It runs after the commit, outside the transaction. The update is atomic by itself, so one
        of several that try it sends. (A process that dies between these two lines has sent
        nothing: to exclude that, the receiver has to know the order by its id.)
        """
        unsent = Order.find_one(Order.id == order_id, Order.confirmed == False)  # noqa: E712
        if (await unsent.update(Set({Order.confirmed: True}))).matched_count == 1:
            self.confirmations.send(order_id)
