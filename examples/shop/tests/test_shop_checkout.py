"""A checkout sells all of a cart, once, or changes nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from pymongo.errors import DuplicateKeyError

from .serving import Customer, FailPoint, OpenShop, await_no_transactions, check_problem


def stored(database: Any) -> Any:
    """Return what a checkout can change, as the server holds it."""
    return (
        {each["_id"]: each["stock"] for each in database.products.find()},
        {each["_id"]: each["balance"] for each in database.accounts.find()},
        {each["_id"]: each["items"] for each in database.carts.find()},
        database.orders.count_documents({}),
        database.payments.count_documents({}),
    )


@pytest.fixture
def sent(shop: OpenShop) -> list[str]:
    """The orders that confirmations were sent for."""
    return shop.sent


class TestCheckout:
    async def test_sells_what_is_in_the_cart(
        self, ann: Customer, database: Any, sent: list[str]
    ) -> None:
        await ann.put("teapot", 2)
        await ann.put("cup", 4)

        answer = await ann.check_out(12800)

        order = answer.json()
        assert answer.status_code == 201
        assert order["lines"] == [
            {"sku": "cup", "quantity": 4, "price": 1250},
            {"sku": "teapot", "quantity": 2, "price": 3900},
        ]
        stock, balances, carts, orders, payments = stored(database)
        assert stock == {"cup": 36, "tea": 25, "teapot": 1}
        assert balances == {"ann": 7200, "bob": 1000}
        assert (carts, orders, payments) == ({}, 1, 1)
        assert sent == [order["order"]]

    async def test_a_payment_that_fails_leaves_nothing_behind(
        self, bob: Customer, database: Any, sent: list[str]
    ) -> None:
        await bob.put("teapot")
        before = stored(database)

        check_problem(await bob.check_out(3900), 402, "Insufficient funds")

        assert stored(database) == before
        assert sent == []

    async def test_takes_nothing_where_one_product_is_short(
        self, ann: Customer, database: Any
    ) -> None:
        await ann.put("cup", 1)
        await ann.put("teapot", 4)
        before = stored(database)

        check_problem(await ann.check_out(16850), 409, "Out of stock")

        assert stored(database) == before

    async def test_takes_no_more_than_the_customer_agreed_to(
        self, ann: Customer, database: Any
    ) -> None:
        await ann.put("teapot")
        database.products.update_one({"_id": "teapot"}, {"$inc": {"price": 100}})
        before = stored(database)

        check_problem(await ann.check_out(3900), 409, "Total changed")

        assert stored(database) == before

    async def test_sells_what_costs_nothing(self, bob: Customer, database: Any) -> None:
        leaflet = {"_id": "leaflet", "name": "About tea", "price": 0, "stock": 5}
        database.products.insert_one(leaflet)
        await bob.put("leaflet")

        assert (await bob.check_out(0)).status_code == 201

    async def test_wants_something_in_the_cart(self, ann: Customer) -> None:
        check_problem(await ann.check_out(0), 409, "Empty cart")

    async def test_wants_a_customer(self, http: httpx.AsyncClient) -> None:
        check_problem(await Customer(http, "zoe").check_out(0), 404, "Not found")


class TestIdempotencyKey:
    async def test_a_request_that_is_repeated_gets_the_same_order(
        self, ann: Customer, database: Any, sent: list[str]
    ) -> None:
        await ann.put("teapot")
        first = await ann.check_out(3900)
        after = stored(database)
        await ann.put("cup")  # for another order

        second = await ann.check_out(3900)

        assert (first.status_code, second.status_code) == (201, 200)
        assert second.json() == first.json()
        assert stored(database)[0] == after[0]
        assert await ann.cart() == {"cup": 1}
        assert len(sent) == 1

    async def test_requests_at_the_same_time_place_one_order(
        self, ann: Customer, database: Any, sent: list[str]
    ) -> None:
        await ann.put("teapot")

        answers = await asyncio.gather(*(ann.check_out(3900) for _ in range(5)))

        assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 201]
        assert len({answer.json()["order"] for answer in answers}) == 1
        assert await ann.balance() == 16100
        assert len(sent) == 1

    async def test_is_not_for_another_order(self, ann: Customer) -> None:
        await ann.put("teapot")
        await ann.check_out(3900)
        await ann.put("cup")

        check_problem(await ann.check_out(1250), 422, "Idempotency key reused")

    async def test_belongs_to_one_customer(self, http: httpx.AsyncClient, ann: Customer) -> None:
        await http.put("/customers/zoe", json={"balance": 5000})
        zoe = Customer(http, "zoe")
        await ann.put("teapot")
        await zoe.put("teapot")

        answers = [await ann.check_out(3900), await zoe.check_out(3900)]

        assert [answer.status_code for answer in answers] == [201, 201]

    async def test_has_one_order_in_the_database_too(self, ann: Customer, database: Any) -> None:
        await ann.put("teapot")
        await ann.check_out(3900)
        copy = {**database.orders.find_one({}), "_id": "another"}

        with pytest.raises(DuplicateKeyError):
            database.orders.insert_one(copy)

    async def test_is_required(self, http: httpx.AsyncClient) -> None:
        answer = await http.post("/checkout/ann", json={"total": 0})

        check_problem(answer, 422, "Invalid request")


TRANSIENT = {"errorCode": 112, "errorLabels": ["TransientTransactionError"]}
NOT_ANSWERED = {"errorCode": 89, "errorLabels": ["UnknownTransactionCommitResult"]}
CONNECTION_LOST = {"closeConnection": True}
# Applied, but nobody can say whether it is there to stay.
NOT_REPLICATED = {"writeConcernError": {"code": 100, "errmsg": "not enough members"}}


class TestFaults:
    @pytest.mark.parametrize("fault", [TRANSIENT, NOT_ANSWERED, CONNECTION_LOST])
    async def test_a_commit_that_fails_is_tried_again(
        self,
        ann: Customer,
        database: Any,
        sent: list[str],
        fail_point: FailPoint,
        fault: dict[str, Any],
    ) -> None:
        await ann.put("teapot")

        with fail_point("commitTransaction", times=2, **fault):
            answer = await ann.check_out(3900)

        assert answer.status_code == 201
        assert sent == [answer.json()["order"]]
        assert stored(database)[0]["teapot"] == 2
        assert await ann.balance() == 16100

    async def test_an_outcome_that_nobody_knows_is_found_out_by_repeating(
        self, ann: Customer, database: Any, sent: list[str], fail_point: FailPoint
    ) -> None:
        await ann.put("teapot")

        with fail_point("commitTransaction", times=1, **NOT_REPLICATED):
            unknown = await ann.check_out(3900)
        sent_before = [*sent]
        repeated = await ann.check_out(3900)

        check_problem(unknown, 503, "Service Unavailable")
        assert sent_before == []
        assert repeated.status_code == 200
        assert sent == [repeated.json()["order"]]
        assert await ann.balance() == 16100

    async def test_a_confirmation_that_fails_is_made_up_for_by_repeating(
        self, ann: Customer, sent: list[str], fail_point: FailPoint
    ) -> None:
        await ann.put("cup", 2)

        with fail_point("commitTransaction", times=1, **NOT_REPLICATED):
            await ann.check_out(2500)
        with fail_point("update", times=2, errorCode=11601):
            failed = await ann.check_out(2500)
        repeated = await ann.check_out(2500)

        check_problem(failed, 503, "Service Unavailable")
        assert sent == [repeated.json()["order"]]

    async def test_a_client_that_has_gone_finds_its_order_later(
        self, ann: Customer, server_uri: str, sent: list[str], fail_point: FailPoint
    ) -> None:
        await ann.put("teapot")

        with fail_point("commitTransaction", times=1, blockConnection=True, blockTimeMS=500):
            with pytest.raises(httpx.ReadTimeout):
                await ann.check_out(3900, timeout=0.2)
            repeated = await ann.check_out(3900)

        assert (await ann.orders()) == [repeated.json()]
        assert await ann.balance() == 16100
        assert sent == [repeated.json()["order"]]
        await await_no_transactions(server_uri)
