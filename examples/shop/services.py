"""Catalogue, customers, carts and order history.

No session here: the middleware opens a scope for each request, and what these functions read
and write belongs to it.
"""

from collections.abc import AsyncIterator

from beanie.operators import In, Inc

from .models import Account, Cart, Order, OrderLine, Product, ProductViews
from .problems import CustomerExistsError, NotFoundError


async def list_products(*, in_stock: bool, limit: int) -> list[Product]:
    query = Product.find(Product.stock > 0) if in_stock else Product.find_all()
    return await query.sort("_id").limit(limit).to_list()


async def find_product(sku: str) -> Product:
    product = await Product.get(sku)
    if product is None:
        raise NotFoundError(f"There is no product {sku}.")
    return product


async def count_views(sku: str) -> int:
    found = await ProductViews.get(sku)
    return 0 if found is None else found.views


async def note_view(sku: str) -> None:
    """Count a view; done in the background, after the answer, and so outside any scope."""
    views = ProductViews.find_one(ProductViews.id == sku)
    await views.update(Inc({ProductViews.views: 1}), upsert=True)


async def open_account(customer: str, balance: int) -> Account:
    if await Account.get(customer) is not None:
        raise CustomerExistsError(f"There is a customer {customer} already.")
    return await Account(id=customer, balance=balance).insert()


async def find_account(customer: str) -> Account:
    account = await Account.get(customer)
    if account is None:
        raise NotFoundError(f"There is no customer {customer}.")
    return account


async def find_cart(customer: str) -> Cart:
    await find_account(customer)
    return await Cart.get(customer) or Cart(id=customer, items={})


async def lines_of(cart: Cart) -> list[OrderLine]:
    """Look up what the things in a cart cost now."""
    products = await Product.find(In(Product.id, list(cart.items))).sort("_id").to_list()
    return [OrderLine(sku=p.id, quantity=cart.items[p.id], price=p.price) for p in products]


async def put_into_cart(customer: str, sku: str, quantity: int) -> Cart:
    """Set how many of a product are in a cart; none takes it out.

    Two requests that change one cart can't undo each other's change: one of them conflicts.
    """
    await find_product(sku)
    cart = await find_cart(customer)
    cart.items[sku] = quantity
    if quantity == 0:
        del cart.items[sku]
    return await cart.save()


async def history(customer: str) -> AsyncIterator[Order]:
    """Read the orders of a customer one by one, the latest first, each with its payment."""
    async for order in Order.find(Order.customer == customer, fetch_links=True).sort("-_id"):
        yield order
