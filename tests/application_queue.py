"""An application on beanie-batteries-queue: orders, and the tasks that follow upon them."""

from typing import Any, List, Optional  # noqa: UP035 - Beanie 1.26 evaluates these itself

from beanie import Document, Link, PydanticObjectId
from beanie.operators import Inc
from beanie_batteries_queue import DependencyType, Task
from fastapi import FastAPI
from pydantic import Field

from beanie_session_scope import SessionScopeMixin, run_in_transaction, with_session
from beanie_session_scope.asgi import SessionScopeMiddleware


class Order(SessionScopeMixin, Document):
    title: str
    shipped: int = 0

    class Settings:
        name = "application_order"


class Payment(SessionScopeMixin, Task):
    order_id: Optional[PydanticObjectId] = None  # noqa: UP045

    class Settings:
        name = "application_payment"


class Shipment(SessionScopeMixin, Task):
    order_id: Optional[PydanticObjectId] = None  # noqa: UP045
    address: str = "1 High Street"
    after: List[Link[Payment]] = Field(  # noqa: UP006
        default=[], json_schema_extra={"dependency_type": DependencyType.ALL_OF}
    )

    class Settings:
        name = "application_shipment"

    async def run(self) -> None:
        """Ship it, which fails half-way where there is no address."""
        await Order.find_one({"_id": self.order_id}).update(Inc({"shipped": 1}))
        if not self.address:
            raise ValueError("no address")


MODELS: list[Any] = [Order, Payment, Shipment]
COLLECTIONS = ("application_order", "application_payment", "application_shipment")


def create_app(client: Any = None) -> FastAPI:
    """Create the application; with a client, its requests run in a scope."""
    app = FastAPI()
    if client is not None:
        app.add_middleware(SessionScopeMiddleware, client=client, collections=MODELS)

    @app.post("/orders", status_code=201)
    async def order(title: str, card: str) -> None:
        order = await Order(title=title).insert()
        await Shipment(order_id=order.id).push()
        if card == "expired":
            raise RuntimeError("the card has expired")

    return app


async def take_and_ship() -> "Shipment | None":
    shipment = await Shipment.pop()
    if shipment is not None:
        await shipment.run()
        await shipment.finish()
    return shipment


async def ship_next() -> "Shipment | None":
    """Take a task, do its work and finish it, in one transaction."""
    return await run_in_transaction(take_and_ship, collections=MODELS)


async def ship_next_or_fail() -> None:
    """Do the same, and mark a task whose work fails as failed."""
    shipment = None
    try:
        async with with_session(collections=MODELS):
            shipment = await Shipment.pop()
            if shipment is not None:
                await shipment.run()
                await shipment.finish()
    except ValueError:
        if shipment is not None:
            await shipment.fail()
