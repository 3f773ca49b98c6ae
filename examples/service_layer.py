"""Services in three layers that know nothing of sessions, and one transaction above them.

    python examples/service_layer.py

``OrderService`` uses ``InventoryService`` and ``PaymentService``, and each of these uses a
repository. None takes, keeps or passes a session. ``handle_order``, where a request comes in,
opens the one transaction in which all of it happens.
"""

import asyncio
from typing import Any

from _server import open_database
from beanie import Document
from beanie.operators import Inc

from beanie_session_scope import SessionScopeMixin, with_session


class Product(SessionScopeMixin, Document):
    name: str
    stock: int
    price: int


class Wallet(SessionScopeMixin, Document):
    owner: str
    credit: int


class Order(SessionScopeMixin, Document):
    buyer: str
    product: str
    state: str


class OrderError(Exception):
    """An order that can't be carried out."""


# Repositories: the only layer that knows Beanie.


class ProductRepository:
    async def take(self, name: str) -> Product:
        await Product.find_one(Product.name == name).update(Inc({Product.stock: -1}))
        product = await Product.find_one(Product.name == name)
        if product is None:
            raise OrderError(f"no such product: {name}")
        return product


class WalletRepository:
    async def take(self, owner: str, amount: int) -> Wallet:
        await Wallet.find_one(Wallet.owner == owner).update(Inc({Wallet.credit: -amount}))
        wallet = await Wallet.find_one(Wallet.owner == owner)
        if wallet is None:
            raise OrderError(f"no such wallet: {owner}")
        return wallet


class OrderRepository:
    async def add(self, buyer: str, product: str) -> Order:
        return await Order(buyer=buyer, product=product, state="new").insert()

    async def close(self, order: Order) -> None:
        order.state = "paid"
        await order.save()


# Services: what the shop does.


class InventoryService:
    def __init__(self, products: ProductRepository) -> None:
        self.products = products

    async def reserve(self, name: str) -> int:
        """Take one product from the stock and return its price."""
        product = await self.products.take(name)
        if product.stock < 0:
            raise OrderError(f"out of stock: {name}")
        return product.price


class PaymentService:
    def __init__(self, wallets: WalletRepository) -> None:
        self.wallets = wallets

    async def charge(self, owner: str, amount: int) -> None:
        wallet = await self.wallets.take(owner, amount)
        if wallet.credit < 0:
            raise OrderError(f"{owner} can't pay {amount}")


class OrderService:
    def __init__(
        self, orders: OrderRepository, inventory: InventoryService, payment: PaymentService
    ) -> None:
        self.orders = orders
        self.inventory = inventory
        self.payment = payment

    async def place(self, buyer: str, product: str) -> Order:
        order = await self.orders.add(buyer, product)
        price = await self.inventory.reserve(product)
        await self.payment.charge(buyer, price)
        await self.orders.close(order)
        return order


# Where requests come in: the only place that knows of a transaction.


async def handle_order(service: OrderService, buyer: str, product: str) -> str:
    try:
        async with with_session(collections=[Product, Wallet, Order]):
            order = await service.place(buyer, product)
    except OrderError as error:
        return f"refused: {error}"
    return f"accepted: {order.state}"


async def report(database: Any, stock: int, credit: int, orders: list[str]) -> None:
    """Show what the database holds, read by the driver, and check it."""
    bell = await database[Product.get_collection_name()].find_one({"name": "bell"})
    ann = await database[Wallet.get_collection_name()].find_one({"owner": "Ann"})
    cursor = database[Order.get_collection_name()].find()
    states = [order["state"] async for order in cursor]
    print(f"  stock: {bell['stock']}, Ann's credit: {ann['credit']}, orders: {states}")
    expect((bell["stock"], ann["credit"], states), (stock, credit, orders))


def expect(actual: object, expected: object) -> None:
    if actual != expected:
        raise AssertionError(f"{actual!r} should be {expected!r}")


async def main() -> None:
    service = OrderService(
        OrderRepository(),
        InventoryService(ProductRepository()),
        PaymentService(WalletRepository()),
    )
    async with open_database(Product, Wallet, Order) as database:
        print("\nTwo bells at 7 each, one lamp at 30; Ann has 20")
        await Product(name="bell", stock=2, price=7).insert()
        await Product(name="lamp", stock=1, price=30).insert()
        await Wallet(owner="Ann", credit=20).insert()
        await report(database, stock=2, credit=20, orders=[])

        for buyer, product, outcome, stock, credit, orders in (
            ("Ann", "bell", "accepted: paid", 1, 13, ["paid"]),
            ("Ann", "lamp", "refused: Ann can't pay 30", 1, 13, ["paid"]),
            ("Zoe", "bell", "refused: no such wallet: Zoe", 1, 13, ["paid"]),
            ("Ann", "bell", "accepted: paid", 0, 6, ["paid", "paid"]),
            ("Ann", "bell", "refused: out of stock: bell", 0, 6, ["paid", "paid"]),
        ):
            print(f"\n{buyer} orders a {product}")
            actual = await handle_order(service, buyer, product)
            print(f"  {actual}")
            expect(actual, outcome)
            await report(database, stock, credit, orders)
    print("\nNo refused order left a trace, and no service ever saw a session.")


if __name__ == "__main__":
    asyncio.run(main())
