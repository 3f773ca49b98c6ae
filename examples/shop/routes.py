"""The routes. Each runs in the scope of its request; a checkout has a transaction of its own."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Depends, Query, Request, Response, status
from fastapi.responses import StreamingResponse

from . import services
from .checkout import Checkout
from .schemas import (
    Amount,
    CartOut,
    CustomerOut,
    Expected,
    IdempotencyKey,
    Name,
    NewCustomer,
    OrderOut,
    ProductOut,
    ProductPage,
)

router = APIRouter()


def checkout_of(request: Request) -> Checkout:
    return request.app.state.checkout


@router.get("/products")
async def list_products(
    in_stock: bool = False, limit: Annotated[int, Query(ge=1, le=100)] = 100
) -> list[ProductOut]:
    products = await services.list_products(in_stock=in_stock, limit=limit)
    return [ProductOut.of(product) for product in products]


@router.get("/products/{sku}")
async def show_product(sku: Name, background: BackgroundTasks) -> ProductPage:
    product = await services.find_product(sku)
    background.add_task(services.note_view, sku)
    views = await services.count_views(sku)
    return ProductPage(**ProductOut.of(product).model_dump(), views=views)


@router.put("/customers/{customer}", status_code=status.HTTP_201_CREATED)
async def open_account(customer: Name, new: NewCustomer) -> CustomerOut:
    return CustomerOut.of(await services.open_account(customer, new.balance))


@router.get("/customers/{customer}")
async def show_account(customer: Name) -> CustomerOut:
    return CustomerOut.of(await services.find_account(customer))


@router.get("/carts/{customer}")
async def show_cart(customer: Name) -> CartOut:
    cart = await services.find_cart(customer)
    return CartOut.of(await services.lines_of(cart))


@router.put("/carts/{customer}/{sku}")
async def put_into_cart(customer: Name, sku: Name, amount: Amount) -> CartOut:
    cart = await services.put_into_cart(customer, sku, amount.quantity)
    return CartOut.of(await services.lines_of(cart))


@router.post("/checkout/{customer}", status_code=status.HTTP_201_CREATED)
async def check_out(
    customer: Name,
    expected: Expected,
    idempotency_key: IdempotencyKey,
    checkout: Annotated[Checkout, Depends(checkout_of)],
    response: Response,
) -> OrderOut:
    placed = await checkout.place(customer, idempotency_key, expected.total)
    if not placed.is_new:
        response.status_code = status.HTTP_200_OK
    return OrderOut.of(placed.order)


@router.get("/orders/{customer}")
async def stream_orders(customer: Name) -> StreamingResponse:
    """Send the orders as they are read, one in a line: after the commit, outside the scope."""
    await services.find_account(customer)
    return StreamingResponse(_lines(customer), media_type="application/x-ndjson")


async def _lines(customer: str) -> AsyncIterator[str]:
    async for order in services.history(customer):
        yield OrderOut.of(order).model_dump_json() + "\n"
