"""Catalogue, customers, carts and history: routes in the scope of the middleware."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from .serving import Customer, FailPoint, await_no_transactions, check_problem


class TestCatalogue:
    async def test_lists_what_is_on_sale(self, http: httpx.AsyncClient) -> None:
        products = (await http.get("/products")).json()

        assert [product["sku"] for product in products] == ["cup", "tea", "teapot"]
        assert products[2] == {
            "sku": "teapot",
            "name": "Teapot, stoneware",
            "price": 3900,
            "stock": 3,
        }

    async def test_leaves_out_what_is_sold(self, http: httpx.AsyncClient, database: Any) -> None:
        database.products.update_one({"_id": "cup"}, {"$set": {"stock": 0}})

        products = (await http.get("/products", params={"in_stock": True})).json()

        assert [product["sku"] for product in products] == ["tea", "teapot"]

    async def test_counts_a_view_after_the_answer(
        self, http: httpx.AsyncClient, database: Any
    ) -> None:
        first = await http.get("/products/teapot")
        while database.product_views.find_one({"_id": "teapot"}) is None:
            pass  # it is done in the background
        second = await http.get("/products/teapot")

        assert (first.json()["views"], second.json()["views"]) == (0, 1)

    async def test_does_not_know_everything(self, http: httpx.AsyncClient) -> None:
        check_problem(await http.get("/products/coffee"), 404, "Not found")


class TestCustomers:
    async def test_open_an_account_once(self, http: httpx.AsyncClient) -> None:
        first = await http.put("/customers/zoe", json={"balance": 500})
        second = await http.put("/customers/zoe", json={"balance": 99})

        assert (first.status_code, first.json()) == (201, {"customer": "zoe", "balance": 500})
        check_problem(second, 409, "Customer exists")
        assert await Customer(http, "zoe").balance() == 500

    async def test_money_is_counted_in_whole_cents(self, http: httpx.AsyncClient) -> None:
        for balance in (0.5, "500", -1, 10**13):
            answer = await http.put("/customers/zoe", json={"balance": balance})

            check_problem(answer, 422, "Invalid request")


class TestCart:
    async def test_has_the_prices_of_today(self, ann: Customer) -> None:
        await ann.put("teapot", 2)
        answer = await ann.put("cup", 1)

        assert answer.json() == {
            "items": [
                {"sku": "cup", "quantity": 1, "price": 1250},
                {"sku": "teapot", "quantity": 2, "price": 3900},
            ],
            "total": 9050,
        }

    async def test_a_quantity_of_none_takes_a_product_out(self, ann: Customer) -> None:
        await ann.put("teapot")
        await ann.put("cup")
        await ann.put("teapot", 0)

        assert await ann.cart() == {"cup": 1}

    async def test_takes_no_product_that_is_not_there(self, ann: Customer, database: Any) -> None:
        check_problem(await ann.put("coffee"), 404, "Not found")
        check_problem(await ann.put("a.b"), 422, "Invalid request")

        assert database.carts.count_documents({}) == 0

    async def test_a_change_that_conflicts_is_to_be_repeated(
        self, ann: Customer, database: Any
    ) -> None:
        with database.client.start_session() as session, session.start_transaction():
            database.carts.insert_one({"_id": "ann", "items": {"tea": 1}}, session=session)
            conflicting = await ann.put("teapot")
        repeated = await ann.put("teapot")

        check_problem(conflicting, 503, "Service Unavailable")
        assert conflicting.headers["retry-after"] == "1"
        assert [item["sku"] for item in repeated.json()["items"]] == ["tea", "teapot"]

    async def test_a_commit_that_fails_is_no_success(
        self, ann: Customer, fail_point: FailPoint
    ) -> None:
        with fail_point("commitTransaction", times=1, errorCode=112):
            failed = await ann.put("teapot")

        check_problem(failed, 503, "Service Unavailable")
        assert await ann.cart() == {}

    async def test_a_client_that_gives_up_changes_nothing(
        self, ann: Customer, server_uri: str, fail_point: FailPoint
    ) -> None:
        writes = ("insert", "update", "findAndModify")
        with fail_point(*writes, times=1, blockConnection=True, blockTimeMS=500):
            with pytest.raises(httpx.ReadTimeout):
                await ann.put("teapot", timeout=0.2)
            await await_no_transactions(server_uri)

        assert await ann.cart() == {}


class TestHistory:
    async def test_streams_the_latest_order_first(self, ann: Customer) -> None:
        await ann.put("teapot")
        first = await ann.check_out(3900, key="first")
        await ann.put("cup", 2)
        second = await ann.check_out(2500, key="second")

        assert await ann.orders() == [second.json(), first.json()]

    async def test_of_nobody_there_is_none(self, http: httpx.AsyncClient) -> None:
        check_problem(await http.get("/orders/zoe"), 404, "Not found")
