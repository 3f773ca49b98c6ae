"""What the shop stores. Money is in cents, as a whole number."""

from typing import Annotated, ClassVar

from beanie import Document, Link
from pydantic import BaseModel, Field
from pymongo import ASCENDING, DESCENDING, IndexModel

from beanie_session_scope import SessionScopeMixin

Cents = Annotated[int, Field(strict=True, ge=0, le=10**12)]
Quantity = Annotated[int, Field(strict=True, ge=0, le=1000)]


class Product(SessionScopeMixin, Document):
    """A thing on sale. Its ``id`` is the SKU."""

    id: str
    name: str
    price: Cents
    stock: Annotated[int, Field(ge=0)]

    class Settings:
        name = "products"


class ProductViews(SessionScopeMixin, Document):
    """How often a product was looked at: apart from its stock, so that nobody waits for it."""

    id: str
    views: int

    class Settings:
        name = "product_views"


class Account(SessionScopeMixin, Document):
    """What a customer, whose name is the ``id``, can spend."""

    id: str
    balance: Cents

    class Settings:
        name = "accounts"


class Cart(SessionScopeMixin, Document):
    """What a customer, whose name is the ``id``, wants to buy: quantities by SKU."""

    id: str
    items: dict[str, Quantity]

    class Settings:
        name = "carts"


class Payment(SessionScopeMixin, Document):
    """Money that went from an account to the shop."""

    customer: str
    amount: Cents

    class Settings:
        name = "payments"


class OrderLine(BaseModel):
    """A product at the price at which it was sold."""

    sku: str
    quantity: Quantity
    price: Cents


def total_of(lines: list[OrderLine]) -> int:
    return sum(line.quantity * line.price for line in lines)


class Order(SessionScopeMixin, Document):
    """What a customer has bought and paid. ``key`` is the idempotency key of the checkout."""

    customer: str
    key: str
    lines: list[OrderLine]
    total: Cents
    payment: Link[Payment]
    confirmed: bool = False

    class Settings:
        name = "orders"
        indexes: ClassVar = [
            IndexModel([("customer", ASCENDING), ("key", ASCENDING)], unique=True),
            IndexModel([("customer", ASCENDING), ("_id", DESCENDING)]),
        ]


MODELS = [Product, ProductViews, Account, Cart, Payment, Order]
