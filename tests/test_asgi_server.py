"""The middleware behind a real server, and clients that speak HTTP over sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio
import uvicorn
from asgi_apps import done, fastapi_app, starlette_app
from asgi_client import App, Receive, Send, body, respond, start
from asgi_models import Order, prepare
from starlette.middleware.base import BaseHTTPMiddleware
from wire import FailPoint, Wire, open_transactions

from beanie_session_scope.asgi import SessionScopeMiddleware

pytestmark = pytest.mark.timeout(60)


@pytest_asyncio.fixture(autouse=True)
async def stored(client: Any) -> AsyncIterator[Any]:
    """The collection of the orders, as the server holds it."""
    done.clear()
    yield await prepare(client)


async def until(condition: Callable[[], object]) -> None:
    """Wait for a state."""
    while not condition():
        await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(app: App, **options: Any) -> AsyncIterator[uvicorn.Server]:
    """Run an application in uvicorn, on a port of its own."""
    config = uvicorn.Config(app, port=0, lifespan="off", log_config=None, **options)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield server
    finally:
        server.should_exit = True
        await task


def port_of(server: uvicorn.Server) -> int:
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


async def connect(
    server: uvicorn.Server, *headers: str, sent: bytes = b""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request over a socket of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
    lines = ["POST / HTTP/1.1", "Host: test", *headers, "", ""]
    writer.write("\r\n".join(lines).encode() + sent)
    await writer.drain()
    return reader, writer


class Handler:
    """Stores an order, and waits for ever."""

    def __init__(self) -> None:
        self.stored = False
        self.ended_by: BaseException | None = None

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await Order().insert()
            self.stored = True
            await self.wait(receive)
        except BaseException as error:
            self.ended_by = error
            raise

    async def wait(self, receive: Receive) -> None:
        await asyncio.Event().wait()


class Uploading(Handler):
    async def wait(self, receive: Receive) -> None:
        while (await receive())["more_body"]:
            pass


class TestResponses:
    async def test_many_requests_at_once_commit_or_abort_each_on_its_own(
        self, stored: Any, server_uri: str
    ) -> None:
        async with serving(starlette_app()) as server:
            url = f"http://127.0.0.1:{port_of(server)}"
            async with httpx.AsyncClient(base_url=url) as http:
                kinds = ["order", "conflict", "veto", "broken"] * 10
                responses = await asyncio.gather(*(http.post(f"/{kind}") for kind in kinds))

        statuses = [response.status_code for response in responses]
        assert statuses == [201, 409, 500, 500] * 10
        assert await stored.count_documents({"name": "request"}) == 10
        assert open_transactions(server_uri) == 0

    @pytest.mark.parametrize("make_app", [starlette_app, fastapi_app])
    async def test_streams_and_background_tasks_run_outside(
        self, stored: Any, make_app: Callable[[], App]
    ) -> None:
        async with serving(make_app()) as server:
            url = f"http://127.0.0.1:{port_of(server)}"
            async with httpx.AsyncClient(base_url=url) as http:
                response = await http.post("/stream")
            await until(lambda: done)

        assert response.text == "2 3 4 "
        assert await stored.count_documents({}) == 7

    async def test_the_first_byte_comes_after_the_commit(
        self, stored: Any, fail_point: FailPoint
    ) -> None:
        async def app(scope: Any, receive: Receive, send: Send) -> None:
            await Order().insert()
            await respond(send)

        async with serving(SessionScopeMiddleware(app, collections=[Order])) as server:
            with fail_point("commitTransaction", block_ms=300):
                reader, writer = await connect(server, "Content-Length: 0")
                await reader.readexactly(1)
            assert await stored.count_documents({}) == 1
            writer.close()

    async def test_a_failed_commit_is_one_whole_answer(self) -> None:
        async with serving(starlette_app()) as server:
            url = f"http://127.0.0.1:{port_of(server)}"
            async with httpx.AsyncClient(base_url=url) as http:
                first = await http.post("/veto")
                second = await http.post("/order")  # on the same connection

        assert json.loads(first.content)["outcome"] == "aborted"
        assert "retry-after" not in first.headers
        assert second.status_code == 201


class TestDisconnect:
    @pytest.mark.parametrize("abruptly", [True, False])
    async def test_a_client_that_closes_its_socket_aborts_the_transaction(
        self, stored: Any, server_uri: str, abruptly: bool
    ) -> None:
        handler = Handler()
        async with serving(SessionScopeMiddleware(handler, collections=[Order])) as server:
            _, writer = await connect(server, "Content-Length: 0")
            await until(lambda: handler.stored)
            if abruptly:
                writer.transport.abort()
            else:
                writer.close()
            await until(lambda: handler.ended_by)
            await until(lambda: not server.server_state.tasks)
            assert open_transactions(server_uri) == 0

        assert isinstance(handler.ended_by, asyncio.CancelledError)
        assert await stored.count_documents({}) == 0

    async def test_middleware_around_it_sees_an_end(
        self, stored: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        statuses: list[int] = []

        class Counting(BaseHTTPMiddleware):
            async def dispatch(self, request: Any, call_next: Any) -> Any:
                response = await call_next(request)
                statuses.append(response.status_code)
                return response

        handler = Handler()
        app = Counting(SessionScopeMiddleware(handler, collections=[Order]))
        async with serving(app) as server:
            _, writer = await connect(server, "Content-Length: 0")
            await until(lambda: handler.stored)
            writer.close()
            await until(lambda: not server.server_state.tasks)

        assert isinstance(handler.ended_by, asyncio.CancelledError)
        assert statuses == [499]
        assert [record for record in caplog.records if record.levelname == "ERROR"] == []
        assert await stored.count_documents({}) == 0

    async def test_middleware_inside_that_makes_a_task_of_its_own_is_ended_too(
        self, stored: Any, server_uri: str
    ) -> None:
        class Passing(BaseHTTPMiddleware):
            async def dispatch(self, request: Any, call_next: Any) -> Any:
                return await call_next(request)

        handler = Handler()
        async with serving(SessionScopeMiddleware(Passing(handler), collections=[Order])) as server:
            _, writer = await connect(server, "Content-Length: 0")
            await until(lambda: handler.stored)
            writer.close()
            await until(lambda: not server.server_state.tasks)
            assert open_transactions(server_uri) == 0

        assert isinstance(handler.ended_by, asyncio.CancelledError)
        assert await stored.count_documents({}) == 0

    async def test_so_does_one_in_the_middle_of_its_upload(
        self, stored: Any, server_uri: str
    ) -> None:
        handler = Uploading()
        async with serving(SessionScopeMiddleware(handler, collections=[Order])) as server:
            _, writer = await connect(server, "Content-Length: 1000", sent=b"the beginning")
            await until(lambda: handler.stored)
            writer.close()
            await until(lambda: handler.ended_by)
            await until(lambda: not server.server_state.tasks)
            assert open_transactions(server_uri) == 0

        assert await stored.count_documents({}) == 0

    async def test_one_in_the_middle_of_the_commit_does_not_undo_it(
        self, stored: Any, wire: Wire, fail_point: FailPoint
    ) -> None:
        committing = asyncio.Event()

        async def app(scope: Any, receive: Receive, send: Send) -> None:
            await Order().insert()
            loop = asyncio.get_running_loop()
            wire.on_start = lambda: loop.call_soon_threadsafe(committing.set)
            await send(start())
            await send(body())

        async with serving(SessionScopeMiddleware(app, collections=[Order])) as server:
            with fail_point("commitTransaction", block_ms=300):
                _, writer = await connect(server, "Content-Length: 0")
                await committing.wait()
                writer.transport.abort()
                await until(lambda: not server.server_state.tasks)

        assert await stored.count_documents({}) == 1

    async def test_a_server_that_shuts_down_aborts(self, stored: Any, server_uri: str) -> None:
        handler = Handler()
        app = SessionScopeMiddleware(handler, collections=[Order])
        async with serving(app, timeout_graceful_shutdown=0) as server:
            _, writer = await connect(server, "Content-Length: 0")
            await until(lambda: handler.stored)
        await until(lambda: handler.ended_by)
        await until(lambda: open_transactions(server_uri) == 0)
        writer.close()

        assert isinstance(handler.ended_by, asyncio.CancelledError)
        assert await stored.count_documents({}) == 0
