"""starlette-admin, with the mixin in the classes that it lists, creates and deletes.

Its releases before 1.0 are for Beanie 1, those from 1.0 on are for Beanie 2.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio
from application_admin import COLLECTIONS, MODELS, Entry, Ticket, create_app
from beanie import Document, init_beanie
from wire import DATABASE, Wire, names

from beanie_session_scope import UnsupportedInTransactionError

pytestmark = pytest.mark.starlette_admin

BEANIE_2 = hasattr(Document, "get_pymongo_collection")
LIST = "/admin/ticket/list" if BEANIE_2 else "/admin/api/ticket"
ACTION = "/admin/_api/ticket/action" if BEANIE_2 else "/admin/api/ticket/action"
CREATE = "/admin/ticket/create"


@pytest_asyncio.fixture(autouse=True)
async def collections(client: Any) -> None:
    """The application's collections, empty."""
    await init_beanie(database=client[DATABASE], document_models=MODELS)
    for name in COLLECTIONS:
        await client[DATABASE][name].delete_many({})


@pytest.fixture
def told() -> list[str]:
    """What was told to others after a commit."""
    return []


@asynccontextmanager
async def serve(app: Any, *, raising: bool = False) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=raising)
    async with httpx.AsyncClient(transport=transport, base_url="http://tests") as http:
        await http.get(CREATE)  # the form sets a cookie, which releases from 1.0 on ask for
        http.headers["X-CSRFToken"] = http.cookies.get("starlette_admin_csrftoken", "")
        yield http


@pytest_asyncio.fixture
async def http(client: Any, told: list[str]) -> AsyncIterator[httpx.AsyncClient]:
    """The application, whose requests that write run in a scope."""
    async with serve(create_app(told, client, methods=["POST"])) as http:
        yield http


@pytest_asyncio.fixture
async def plain_http(told: list[str]) -> AsyncIterator[httpx.AsyncClient]:
    """The same application without scopes."""
    async with serve(create_app(told)) as http:
        yield http


async def create(http: httpx.AsyncClient, title: str) -> httpx.Response:
    return await http.post(CREATE, data={"title": title})


async def delete(http: httpx.AsyncClient, *tickets: Ticket) -> httpx.Response:
    pks = [str(ticket.id) for ticket in tickets]
    return await http.post(ACTION, params={"name": "delete", "pks": pks})


async def titles() -> list[str]:
    return [ticket.title async for ticket in Ticket.find_all()]


async def entries() -> list[str]:
    return [entry.text async for entry in Entry.find_all()]


def escaped(events: list[Any]) -> list[str]:
    """Return the commands on the collections that are in no transaction."""
    return [
        event.command_name
        for event in events
        if event.command.get(event.command_name) in COLLECTIONS and "txnNumber" not in event.command
    ]


class TestCreate:
    async def test_a_document_and_what_the_hooks_write_are_one_transaction(
        self, http: httpx.AsyncClient, wire: Wire, told: list[str]
    ) -> None:
        with wire.record() as events:
            response = await create(http, "Persuasion")

        assert response.status_code == 303
        assert names(events)[:2] == ["insert", "insert"]
        assert names(events)[-1] == "commitTransaction"
        assert escaped(events) == []
        assert (await titles(), await entries()) == (["Persuasion"], ["created Persuasion"])
        assert told == ["Persuasion"]

    async def test_a_hook_that_fails_leaves_no_document(
        self, http: httpx.AsyncClient, told: list[str]
    ) -> None:
        assert (await create(http, "Emma")).status_code == 500

        assert (await titles(), await entries(), told) == ([], [], [])

    async def test_without_a_scope_the_document_stays(self, plain_http: httpx.AsyncClient) -> None:
        assert (await create(plain_http, "Emma")).status_code == 500

        assert (await titles(), await entries()) == (["Emma"], ["created Emma"])


class TestDelete:
    @pytest_asyncio.fixture
    async def tickets(self, client: Any) -> list[Ticket]:
        return [await Ticket(title=title, paid=title == "b").insert() for title in ("a", "b", "c")]

    async def test_several_at_once_are_one_transaction(
        self, http: httpx.AsyncClient, wire: Wire, tickets: list[Ticket]
    ) -> None:
        with wire.record() as events:
            response = await delete(http, tickets[0], tickets[2])

        assert response.status_code == 200
        assert names(events).count("delete") == 2
        assert names(events)[-1] == "commitTransaction"
        assert escaped(events) == []
        assert (await titles(), await entries()) == (["b"], ["deleted a", "deleted c"])

    async def test_where_one_is_refused_all_of_them_stay(
        self, http: httpx.AsyncClient, tickets: list[Ticket]
    ) -> None:
        response = await delete(http, *tickets)

        assert response.json() == {"msg": "A paid ticket can't be deleted."}
        assert (await titles(), await entries()) == (["a", "b", "c"], [])

    async def test_without_a_scope_those_before_it_are_gone(
        self, plain_http: httpx.AsyncClient, tickets: list[Ticket]
    ) -> None:
        response = await delete(plain_http, *tickets)

        assert response.json() == {"msg": "A paid ticket can't be deleted."}
        assert (await titles(), await entries()) == (["b", "c"], ["deleted a"])


class TestList:
    """The package estimates how many documents there are, which no transaction can."""

    @pytest_asyncio.fixture(autouse=True)
    async def ticket(self, client: Any) -> None:
        await Ticket(title="Persuasion").insert()

    async def test_it_works_outside(self, http: httpx.AsyncClient) -> None:
        response = await http.get(LIST)

        assert response.status_code == 200
        assert "Persuasion" in response.text

    async def test_it_is_refused_in_a_scope(self, client: Any, told: list[str]) -> None:
        async with serve(create_app(told, client), raising=True) as http:
            with pytest.raises(UnsupportedInTransactionError, match="estimated_document_count"):
                await http.get(LIST)

    async def test_it_works_in_a_scope_where_the_view_counts_outside(
        self, client: Any, told: list[str], wire: Wire
    ) -> None:
        async with serve(create_app(told, client, count_outside=True)) as http:
            with wire.record() as events:
                response = await http.get(LIST)

        assert response.status_code == 200
        assert "Persuasion" in response.text
        assert escaped(events) == ["count"]
