"""What requests and answers hold."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import Header, Path
from pydantic import BaseModel

from .models import Account, Cents, Order, OrderLine, Product, Quantity, total_of

Name = Annotated[str, Path(pattern="^[a-z0-9-]{1,40}$")]  # a key of Cart.items: no dot, no $
IdempotencyKey = Annotated[str, Header(min_length=1, max_length=255)]


class NewCustomer(BaseModel):
    balance: Cents


class Amount(BaseModel):
    quantity: Quantity


class Expected(BaseModel):
    total: Cents


class ProductOut(BaseModel):
    sku: str
    name: str
    price: int
    stock: int

    @classmethod
    def of(cls, product: Product) -> ProductOut:
        return cls(sku=product.id, **product.model_dump(include={"name", "price", "stock"}))


class ProductPage(ProductOut):
    views: int


class CustomerOut(BaseModel):
    customer: str
    balance: int

    @classmethod
    def of(cls, account: Account) -> CustomerOut:
        return cls(customer=account.id, balance=account.balance)


class CartOut(BaseModel):
    items: list[OrderLine]
    total: int

    @classmethod
    def of(cls, lines: list[OrderLine]) -> CartOut:
        return cls(items=lines, total=total_of(lines))


class OrderOut(BaseModel):
    order: str
    placed_at: datetime
    lines: list[OrderLine]
    total: int
    payment: str

    @classmethod
    def of(cls, order: Order) -> OrderOut:
        return cls(
            order=str(order.id),
            placed_at=order.id.generation_time,
            lines=order.lines,
            total=order.total,
            payment=str(order.payment.id),
        )
