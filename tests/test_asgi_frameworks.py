"""The middleware in Starlette, FastAPI and Litestar."""

from __future__ import annotations

import logging
import traceback
from collections.abc import AsyncIterator
from importlib.util import find_spec
from typing import Any

import fastapi
import httpx
import pytest
import pytest_asyncio
from asgi_apps import APPS, SECRET, App, done, starlette_app
from asgi_client import Connection
from asgi_models import Order, prepare
from fastapi.responses import StreamingResponse
from labels import TRANSIENT
from pymongo.errors import OperationFailure
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from wire import Wire, names, open_transactions

from beanie_session_scope import (
    ScopeClosedError,
    TransactionTimeoutError,
    current_scope,
    outside_session,
    transactional,
    with_session,
)
from beanie_session_scope.asgi import SessionScopeMiddleware

pytestmark = pytest.mark.timeout(30)


@pytest_asyncio.fixture(autouse=True)
async def stored(client: Any) -> AsyncIterator[Any]:
    """The collection of the orders, as the server holds it."""
    done.clear()
    yield await prepare(client)


async def post(app: App, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        return await http.post(path)


@pytest.mark.parametrize("name", APPS)
class TestFramework:
    async def test_a_response_commits(self, name: str, stored: Any) -> None:
        response = await post(APPS[name](), "/order")

        assert response.status_code == 201
        assert await stored.count_documents({"name": "request"}) == 1

    @pytest.mark.parametrize(
        ("path", "status"), [("/conflict", 409), ("/handled", 418), ("/broken", 500)]
    )
    async def test_an_error_aborts_and_is_the_applications_own_answer(
        self, name: str, path: str, status: int, stored: Any
    ) -> None:
        response = await post(APPS[name](), path)

        assert response.status_code == status
        assert "problem" not in response.headers["content-type"]
        assert await stored.count_documents({}) == 0

    async def test_a_background_task_runs_after_the_commit_and_outside(
        self, name: str, stored: Any, wire: Wire
    ) -> None:
        app = APPS[name]()
        with wire.record() as seen:
            await post(app, "/order")

        assert names(seen) == ["insert", "commitTransaction", *["insert"] * 3]
        assert done == ["after"]

    async def test_a_stream_runs_after_the_commit_and_outside(self, name: str, stored: Any) -> None:
        response = await post(APPS[name](), "/stream")

        assert response.text == "2 3 4 "
        assert done == ["after"]
        assert await stored.count_documents({}) == 7

    async def test_a_stream_does_so_on_a_server_of_the_newer_specification(
        self, name: str, stored: Any
    ) -> None:
        connection = Connection(
            APPS[name](), path="/stream", asgi={"version": "3.0", "spec_version": "2.4"}
        )
        await connection.run()

        assert connection.body == b"2 3 4 "
        assert done == ["after"]

    async def test_a_failed_commit_drops_the_response_and_ends_the_application(
        self, name: str, stored: Any, server_uri: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.ERROR)
        response = await post(APPS[name](), "/veto")

        assert response.status_code == response.json()["status"] == 500
        assert response.headers["content-type"] == "application/problem+json"
        assert SECRET not in response.text
        assert done == []
        assert await stored.count_documents({}) == 0
        assert open_transactions(server_uri) == 0
        ours = [each for each in caplog.records if each.name == "beanie_session_scope"]
        assert [each.event for each in ours] == ["asgi.commit.failed"]  # type: ignore[attr-defined]


class Passing(BaseHTTPMiddleware):
    """Does nothing, in a task of its own."""

    async def dispatch(self, request: Any, call_next: Any) -> Any:
        return await call_next(request)


class TestOrderOfMiddleware:
    @pytest.mark.parametrize("path", ["/order", "/stream"])
    async def test_inside_one_that_makes_a_task_all_works(self, path: str, stored: Any) -> None:
        response = await post(starlette_app(outer=(Middleware(Passing),)), path)

        assert response.is_success
        assert done == ["after"]

    async def test_around_one_that_makes_a_task_requests_commit_and_abort(
        self, stored: Any
    ) -> None:
        app = starlette_app(Middleware(Passing))

        assert (await post(app, "/conflict")).status_code == 409
        assert (await post(app, "/veto")).status_code == 500
        assert await stored.count_documents({}) == 0
        assert done == []

    async def test_around_one_that_makes_a_task_background_tasks_are_refused(
        self, stored: Any
    ) -> None:
        transport = httpx.ASGITransport(starlette_app(Middleware(Passing)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            with pytest.raises(ScopeClosedError):
                await http.post("/order")

        # Refused, and not run somewhere: what it did is not known to be part of anything.
        assert await stored.count_documents({}) == 1


async def stock_events() -> AsyncIterator[dict[str, int]]:
    for _ in range(3):
        await Order(name="event").insert()
        yield {"orders": await Order.count()}


async def stock_lines() -> AsyncIterator[str]:
    async for event in stock_events():
        yield f"data: {event['orders']}\n\n"


async def events_response() -> StreamingResponse:
    await Order(name="request").insert()
    return StreamingResponse(stock_lines(), media_type="text/event-stream")


async def no_scope() -> AsyncIterator[None]:
    with outside_session():
        yield


class TestServerSentEvents:
    async def test_a_response_runs_after_the_commit_and_outside(
        self, stored: Any, wire: Wire
    ) -> None:
        app = fastapi.FastAPI()
        app.add_middleware(SessionScopeMiddleware, collections=[Order])
        app.post("/")(events_response)
        with wire.record() as seen:
            response = await post(app, "/")

        assert response.text == "data: 2\n\ndata: 3\n\ndata: 4\n\n"
        assert names(seen)[:3] == ["insert", "commitTransaction", "insert"]


if find_spec("fastapi.sse"):  # newer releases of FastAPI
    from fastapi.sse import EventSourceResponse

    class TestGeneratorsOfEvents:
        async def test_one_is_a_task_that_began_inside(self, stored: Any) -> None:
            app = fastapi.FastAPI()
            app.add_middleware(SessionScopeMiddleware, collections=[Order])
            app.post("/", response_class=EventSourceResponse)(stock_events)

            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                with pytest.raises(BaseException) as raised:  # a group from Python 3.11 on
                    await http.post("/")

            assert "ScopeClosedError" in "".join(traceback.format_exception(raised.value))

        @pytest.mark.parametrize("how", ["dependency", "path"])
        async def test_one_works_where_the_route_is_outside(
            self, stored: Any, wire: Wire, how: str
        ) -> None:
            excluded = ["/events"] if how == "path" else []
            dependencies = [fastapi.Depends(no_scope)] if how == "dependency" else []
            app = fastapi.FastAPI()
            app.add_middleware(SessionScopeMiddleware, collections=[Order], exclude_paths=excluded)
            app.post("/events", response_class=EventSourceResponse, dependencies=dependencies)(
                stock_events
            )
            with wire.record() as seen:
                response = await post(app, "/events")

            assert response.text.count("data: ") == 3
            assert await stored.count_documents({}) == 3
            assert not any("autocommit" in event.command for event in seen)


class Busy:
    """Runs a function that fails twice, as where two requests write the same document."""

    def __init__(self) -> None:
        self.calls = 0

    async def sell(self) -> None:
        self.calls += 1
        await Order(name="sold").insert()
        if self.calls < 3:
            raise OperationFailure("conflict", 112, {"errorLabels": [TRANSIENT]})


class TestTransactional:
    def app(self, endpoint: Any, *dependencies: Any, **options: Any) -> App:
        app = fastapi.FastAPI()
        app.add_middleware(SessionScopeMiddleware, collections=[Order], **options)
        app.post("/sell", dependencies=dependencies)(endpoint)
        return app

    async def test_in_the_scope_of_the_request_it_is_not_run_again(self, stored: Any) -> None:
        busy = Busy()

        @transactional(collections=[Order])
        async def sell() -> None:
            await busy.sell()

        response = await post(self.app(sell), "/sell")

        assert (response.status_code, busy.calls) == (500, 1)
        assert await stored.count_documents({}) == 0

    @pytest.mark.parametrize("how", ["excluded", "outside", "dependency", "requires_new"])
    async def test_outside_of_it_it_is_run_again(self, stored: Any, how: str) -> None:
        busy = Busy()
        propagation: Any = "requires_new" if how == "requires_new" else "required"

        @transactional(collections=[Order], propagation=propagation)
        async def sell() -> None:
            await busy.sell()

        async def sell_outside() -> None:
            with outside_session():
                await sell()

        app = self.app(
            sell_outside if how == "outside" else sell,
            *([fastapi.Depends(no_scope)] if how == "dependency" else []),
            exclude_paths=["/sell"] if how == "excluded" else (),
        )
        response = await post(app, "/sell")

        assert (response.status_code, busy.calls) == (200, 3)
        assert await stored.count_documents({}) == 1

    async def test_an_independent_transaction_does_not_follow_the_status(self, stored: Any) -> None:
        @transactional(collections=[Order], propagation="requires_new")
        async def note() -> None:
            await Order(name="note").insert()

        async def endpoint() -> None:
            await Order(name="request").insert()
            await note()
            raise fastapi.HTTPException(409)

        await post(self.app(endpoint), "/sell")

        assert [each["name"] async for each in stored.find()] == ["note"]

    async def test_an_independent_transaction_can_not_write_what_the_request_has_written(
        self, stored: Any
    ) -> None:
        order = await Order().insert()

        @transactional(collections=[Order], propagation="requires_new", timeout=0.05)
        async def change() -> None:
            await order.inc({Order.n: 1})

        async def endpoint() -> None:
            await Order.find_one(Order.n == 0).update({"$set": {"name": "request"}})
            with pytest.raises(TransactionTimeoutError):
                await change()

        assert (await post(self.app(endpoint), "/sell")).status_code == 200
        assert [(each["name"], each["n"]) async for each in stored.find()] == [("request", 0)]


class TestYieldDependency:
    """Why the commit does not belong into one."""

    async def test_it_finishes_after_the_response(self, stored: Any) -> None:
        stages: list[str] = []

        async def transaction() -> AsyncIterator[None]:
            async with with_session(collections=[Order]):
                yield
                scope = current_scope()
                assert scope is not None
                scope.before_commit(fail)

        def fail() -> None:
            stages.append("commit")
            raise ValueError("not committed")

        async def endpoint() -> None:
            await Order().insert()

        async def noting(scope: Any, receive: Any, send: Any) -> None:
            async def note(message: Any) -> None:
                stages.append(str(message.get("status", "body")))
                await send(message)

            await app(scope, receive, note)

        app = fastapi.FastAPI()
        app.post("/", dependencies=[fastapi.Depends(transaction)])(endpoint)
        response = await post(noting, "/")

        assert response.status_code == 200
        assert stages == ["200", "body", "commit"]
        assert await stored.count_documents({}) == 0
