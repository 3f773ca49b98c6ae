"""A client that goes away, or a request that is cancelled: nothing is half done or left open."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from typing import Any

import pytest
import pytest_asyncio
from asgi_client import Connection, Message, Receive, Send, body, respond, start
from asgi_models import Order, prepare
from stepping import Stepping, run
from wire import FailPoint, Wire, names, open_transactions

from beanie_session_scope import current_scope
from beanie_session_scope.asgi import ClientDisconnectedError, SessionScopeMiddleware

pytestmark = pytest.mark.timeout(60)


@pytest_asyncio.fixture(autouse=True)
async def stored(client: Any) -> AsyncIterator[Any]:
    """The collection of the orders, as the server holds it."""
    yield await prepare(client)


@pytest.fixture(autouse=True)
def no_task_is_left(server_uri: str) -> Iterator[None]:
    yield
    assert open_transactions(server_uri) == 0


def wrap(app: Any) -> SessionScopeMiddleware:
    return SessionScopeMiddleware(app, collections=[Order])


class Handler:
    """Stores an order, waits for ever, and notes how that ends."""

    def __init__(self) -> None:
        self.stored = asyncio.Event()
        self.ended_by: BaseException | None = None

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await Order().insert()
            self.stored.set()
            await asyncio.Event().wait()
        except BaseException as error:
            self.ended_by = error
            await self.end(send)
            raise

    async def end(self, send: Send) -> None:
        """What it does when it is cancelled."""


async def hang_up(handler: Handler, connection: Connection) -> None:
    await handler.stored.wait()
    connection.disconnect()


async def ask_and_leave(handler: Handler) -> Connection:
    connection = Connection(wrap(handler))
    await asyncio.gather(connection.run(), hang_up(handler, connection))
    return connection


class TestDisconnect:
    async def test_the_handler_is_cancelled_and_its_transaction_aborted(
        self, stored: Any, wire: Wire
    ) -> None:
        handler = Handler()

        with wire.record() as seen:
            connection = await ask_and_leave(handler)

        assert isinstance(handler.ended_by, asyncio.CancelledError)
        assert names(seen) == ["insert", "abortTransaction"]
        assert (connection.status, connection.body) == (499, b"")  # which nobody reads
        assert await stored.count_documents({}) == 0

    async def test_the_task_of_the_request_is_not_cancelled(self) -> None:
        connection = Connection(wrap(handler := Handler()))

        async def server() -> int:
            await connection.run()
            await asyncio.sleep(0)
            cancelling: Callable[[], int] = getattr(asyncio.current_task(), "cancelling", int)
            return cancelling()

        serving = asyncio.create_task(server())
        await hang_up(handler, connection)

        assert await serving == 0

    async def test_it_leaves_no_task_behind(self) -> None:
        before = asyncio.all_tasks()

        await ask_and_leave(Handler())

        assert asyncio.all_tasks() == before

    async def test_a_handler_that_ignores_it_can_not_answer(self, stored: Any) -> None:
        class Stubborn(Handler):
            async def end(self, send: Send) -> None:
                with pytest.raises(ClientDisconnectedError) as raised:
                    await respond(send)
                self.refused: BaseException = raised.value
                await Order(name="on").insert()

            async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
                try:
                    await super().__call__(scope, receive, send)
                except asyncio.CancelledError:
                    await respond(send)

        handler = Stubborn()
        connection = await ask_and_leave(handler)

        assert isinstance(handler.refused, OSError)
        assert connection.status == 499
        assert await stored.count_documents({}) == 0

    async def test_an_error_of_the_handler_goes_on(self) -> None:
        class Failing(Handler):
            async def end(self, send: Send) -> None:
                raise ValueError

        with pytest.raises(ValueError):
            await ask_and_leave(Failing())

    async def test_a_cancellation_from_elsewhere_at_the_same_time_goes_on(self) -> None:
        handler = Handler()
        connection = Connection(wrap(handler))
        serving = asyncio.create_task(connection.run())
        await handler.stored.wait()
        connection.disconnect()
        while handler.ended_by is None:
            await asyncio.sleep(0)
        serving.cancel()  # while the transaction is aborted

        with pytest.raises(asyncio.CancelledError):
            await serving

    if sys.version_info >= (3, 11):  # before, asyncio does not tell two cancellations from one

        async def test_so_does_one_that_comes_in_the_same_turn_of_the_loop(self) -> None:
            class Shutdown(Connection):
                async def receive(self) -> Message:
                    message = await super().receive()
                    if message["type"] == "http.disconnect":
                        asyncio.get_running_loop().call_soon(serving.cancel)
                    return message

            connection = Shutdown(wrap(handler := Handler()))
            serving = asyncio.create_task(connection.run())
            await hang_up(handler, connection)

            with pytest.raises(asyncio.CancelledError):
                await serving

    async def test_a_commit_that_has_begun_is_not_interrupted(
        self, stored: Any, wire: Wire, fail_point: FailPoint
    ) -> None:
        async def app(scope: Any, receive: Receive, send: Send) -> None:
            await Order().insert()
            loop = asyncio.get_running_loop()
            wire.on_start = lambda: loop.call_soon_threadsafe(connection.disconnect)
            await respond(send)

        connection = Connection(wrap(app))
        with fail_point("commitTransaction", block_ms=200):
            await connection.run()

        assert connection.sent == [start(), body()]
        assert await stored.count_documents({}) == 1

    async def test_what_follows_the_start_is_not_interrupted(self, stored: Any) -> None:
        received: list[str] = []

        async def app(scope: Any, receive: Receive, send: Send) -> None:
            await receive()
            await send(start())
            connection.disconnect()
            received.append((await receive())["type"])
            await Order().insert()
            await send(body())

        connection = Connection(wrap(app))
        await connection.run()

        assert received == ["http.disconnect"]
        assert connection.status == 200
        assert await stored.count_documents({}) == 1

    async def test_at_every_step_nothing_is_half_done(self, stored: Any, server_uri: str) -> None:
        async def app(scope: Any, receive: Receive, send: Send) -> None:
            assert (await receive())["body"] == b"the body"
            await Order().insert()
            await asyncio.gather(Order().insert(), Order.count())
            await respond(send)

        before = asyncio.all_tasks()
        for at in count(1):
            connection = Connection(app, body=b"the body")
            stepping = AtStep(wrap(app), connection, at)
            await asyncio.create_task(stepping.run())
            kept = await stored.count_documents({})
            assert kept == (2 if connection.status == 200 else 0)
            assert asyncio.all_tasks() == before
            await stored.delete_many({})
            if stepping.steps < at:
                break

        assert at > 5


class AtStep:
    """Runs a request whose client goes away at the k-th suspension of its task."""

    def __init__(self, app: Any, connection: Connection, at: int) -> None:
        self._connection = connection
        self._app = app
        self._at = at
        self.steps = 0

    async def run(self) -> None:
        connection = self._connection
        request = self._app(connection.scope, connection.receive, connection.send)
        await _Counted(request, self._step)

    def _step(self) -> None:
        self.steps += 1
        if self.steps == self._at:
            self._connection.disconnect()


class _Counted(Stepping):
    def __init__(self, coroutine: Any, step: Callable[[], None]) -> None:
        super().__init__(coroutine, 0, 0)
        self._step = step

    def _suspend(self) -> None:
        self._step()


class TestCancellation:
    @pytest.mark.parametrize("times", [1, 3])
    async def test_at_every_step_it_goes_on_and_nothing_is_half_done(
        self, stored: Any, server_uri: str, times: int
    ) -> None:
        async def app(scope: Any, receive: Receive, send: Send) -> None:
            await receive()
            await Order().insert()
            await Order().insert()
            await respond(send)

        before = asyncio.all_tasks()
        for at in count(1):
            connection = Connection(wrap(app))
            stepping = Stepping(connection.run(), at, times)
            task = asyncio.create_task(run(stepping))
            await asyncio.wait({task})
            kept = await stored.count_documents({})
            assert kept in ((2,) if connection.status else (0, 2))
            assert open_transactions(server_uri) == 0
            assert asyncio.all_tasks() == before
            await stored.delete_many({})
            if not task.cancelled():
                break

        assert stepping.suspensions < at


class TestReceive:
    async def test_an_upload_is_read_ahead_by_one_message(self) -> None:
        chunks = [b"a", b"b", b"c", b"d"]
        received: list[int] = []

        async def app(scope: Any, receive: Receive, send: Send) -> None:
            content = b""
            more = True
            while more:
                await Order.count()  # gives the reader all the time that it needs
                received.append(connection.received)
                message = await receive()
                content += message["body"]
                more = message["more_body"]
            await respond(send, content=content)

        connection = upload(wrap(app), chunks)
        await connection.run()

        assert connection.body == b"abcd"
        assert received == [1, 2, 3, 4]

    async def test_no_message_is_lost_when_the_response_starts(self) -> None:
        async def app(scope: Any, receive: Receive, send: Send) -> None:
            content = (await receive())["body"]
            await send(start())
            for _ in range(3):
                content += (await receive())["body"]
            await send(body(content))

        connection = upload(wrap(app), [b"a", b"b", b"c", b"d"])
        await connection.run()

        assert connection.body == b"abcd"

    async def test_nothing_is_read_ahead_any_more_when_the_response_has_started(self) -> None:
        received: list[int] = []

        async def app(scope: Any, receive: Receive, send: Send) -> None:
            await Order.count()
            for message in (start(), body(more=True)):
                await send(message)
                await receive()
                await Order.count()  # gives the reader all the time that it needs
                received.append(connection.received)
            await send(body())

        connection = upload(wrap(app), [b"a", b"b", b"c", b"d"])
        await connection.run()

        assert received == [1, 2]

    async def test_what_is_waited_for_when_the_response_starts_is_handed_on(self) -> None:
        async def app(scope: Any, receive: Receive, send: Send) -> None:
            await receive()
            waiting = asyncio.create_task(receive())
            await send(start())
            connection.disconnect()
            await send(body((await waiting)["type"].encode()))

        connection = Connection(wrap(app))
        await connection.run()

        assert connection.body == b"http.disconnect"

    async def test_an_error_of_the_middleware_around_it_reaches_the_application(self) -> None:
        async def app(scope: Any, receive: Receive, send: Send) -> None:
            with pytest.raises(ValueError, match="too large"):
                await receive()
            await respond(send, 413)

        connection = Connection(wrap(app))
        connection.coming.get_nowait()
        connection.coming.put_nowait(ValueError("too large"))
        await connection.run()

        assert connection.status == 413

    async def test_a_receive_that_is_cancelled_loses_nothing(self) -> None:
        async def app(scope: Any, receive: Receive, send: Send) -> None:
            await receive()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(receive(), 0.01)
            await send(start())
            connection.disconnect()
            assert (await receive())["type"] == "http.disconnect"
            await send(body())

        connection = Connection(wrap(app))
        await connection.run()

        assert connection.status == 200

    @pytest.mark.parametrize("expects", [True, False])
    async def test_a_client_is_asked_for_its_upload_by_the_application_alone(
        self, expects: bool
    ) -> None:
        received: list[int] = []

        async def app(scope: Any, receive: Receive, send: Send) -> None:
            await Order.count()  # gives the reader all the time that it needs
            received.append(connection.received)
            await receive()
            await respond(send)

        headers = [(b"Expect", b"100-continue")] if expects else []
        connection = Connection(wrap(app), headers=headers)
        await connection.run()

        assert received == [0 if expects else 1]
        assert connection.status == 200

    async def test_the_middleware_around_it_receives_outside_the_scope(self) -> None:
        scopes: list[Any] = []

        def around(app: Any) -> Any:
            async def middleware(scope: Any, receive: Receive, send: Send) -> None:
                async def looking() -> Message:
                    scopes.append((current_scope(), Order.get_session()))
                    return await receive()

                await app(scope, looking, send)

            return middleware

        async def app(scope: Any, receive: Receive, send: Send) -> None:
            await receive()
            await respond(send)

        await Connection(around(wrap(app))).run()

        assert scopes[0] == (None, None)


def upload(app: Any, chunks: list[bytes]) -> Connection:
    connection = Connection(app)
    connection.coming.get_nowait()
    for chunk in chunks:
        message = {"type": "http.request", "body": chunk, "more_body": chunk is not chunks[-1]}
        connection.coming.put_nowait(message)
    return connection
