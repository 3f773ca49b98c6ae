"""The middleware around an application written by hand: commit, abort, and the answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

import pytest
import pytest_asyncio
from asgi_client import BODY, START, Connection, Message, Receive, Send, body, respond, start
from asgi_models import Order, prepare
from labels import TRANSIENT, UNKNOWN
from pymongo.errors import DuplicateKeyError, OperationFailure
from wire import FailPoint, Wire, names, open_transactions

from beanie_session_scope import (
    PropagationError,
    Rollback,
    ScopeClosedError,
    ScopeObserver,
    SessionScope,
    TransactionAbortedError,
    TransactionExpiredError,
    current_scope,
    observe,
    on_abort,
    on_commit,
)
from beanie_session_scope.asgi import SessionScopeMiddleware

REFUSED = 20  # no code that the driver itself sends a commit again for
SECRET = "mongodb://user:password@host"

pytestmark = pytest.mark.timeout(30)


@pytest_asyncio.fixture(autouse=True)
async def stored(client: Any) -> AsyncIterator[Any]:
    """The collection of the orders, as the server holds it."""
    yield await prepare(client)


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the library logs as an error."""
    caplog.set_level(logging.ERROR, "beanie_session_scope")
    return caplog


class App:
    """Stores an order and answers; what a test needs otherwise, it overrides."""

    def __init__(self, status: int = 200) -> None:
        self._status = status
        self.ended = False

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        await Order().insert()
        await self.before()
        await self.respond(send)
        self.ended = True

    async def before(self) -> None:
        """What comes before the response."""

    async def respond(self, send: Send) -> None:
        await respond(send, self._status)


def wrap(app: Any, **options: Any) -> SessionScopeMiddleware:
    return SessionScopeMiddleware(app, collections=[Order], **options)


async def ask(app: Any, **options: Any) -> Connection:
    return await Connection(wrap(app, **options)).run()


class Refusing(ScopeObserver):
    """Lets no scope be entered, as a test that is rolled back does outside its own."""

    def scope_entering(self, scope: SessionScope) -> None:
        raise PropagationError("refused")


class TestAScopeThatIsRefused:
    async def test_is_not_taken_for_one_that_is_open(self, stored: Any) -> None:
        stop = observe(Refusing())
        try:
            with pytest.raises(PropagationError, match="refused"):
                await ask(App())
        finally:
            stop()

        assert await stored.count_documents({}) == 0


class TestCommit:
    @pytest.mark.parametrize("status", [200, 204, 302, 399])
    async def test_a_status_below_400_commits(self, stored: Any, status: int) -> None:
        connection = await ask(App(status))

        assert connection.sent == [start(status), body()]
        assert await stored.count_documents({}) == 1

    async def test_it_comes_before_the_start_is_sent_on(
        self, stored: Any, fail_point: FailPoint
    ) -> None:
        seen = []

        async def look(message: Message) -> None:
            seen.append((message["type"], await stored.count_documents({})))

        with fail_point("commitTransaction", block_ms=300):
            await Connection(wrap(App()), look).run()

        assert seen == [(START, 1), (BODY, 1)]

    async def test_the_request_is_one_transaction(self, client: Any, wire: Wire) -> None:

        async def app(scope: Any, receive: Receive, send: Send) -> None:
            session = Order.get_session()
            ids.append(session.session_id)
            await Order().insert()
            await asyncio.gather(*(Order().insert() for _ in range(3)))
            assert await Order.count() == 4
            await respond(send)

        ids: list[Any] = []
        with wire.record() as seen:
            await Connection(SessionScopeMiddleware(app, client)).run()

        assert names(seen) == ["insert"] * 4 + ["aggregate", "commitTransaction"]
        assert {bytes(event.command["lsid"]["id"]) for event in seen} == {bytes(ids[0]["id"])}

    async def test_a_request_that_uses_no_bound_class_sends_nothing(
        self, client: Any, wire: Wire
    ) -> None:
        async def app(scope: Any, receive: Receive, send: Send) -> None:
            assert current_scope() is not None
            await respond(send)

        with wire.record() as seen:
            for middleware in (
                wrap(app),
                SessionScopeMiddleware(app, client),
                SessionScopeMiddleware(app, lambda: client, lambda: [Order]),
            ):
                assert (await Connection(middleware).run()).status == 200

        assert names(seen) == []

    async def test_the_client_is_asked_for_at_each_request(self, client: Any, stored: Any) -> None:
        clients: list[Any] = []
        middleware = SessionScopeMiddleware(App(), lambda: clients[-1])  # none yet

        clients.append(client)
        await Connection(middleware).run()

        assert await stored.count_documents({}) == 1

    async def test_messages_that_are_no_part_of_the_response_pass_at_once(self, wire: Wire) -> None:
        hint = {"type": "http.response.early_hint", "links": []}
        seen: list[Any] = []

        async def look(message: Message) -> None:
            seen.append((message["type"], current_scope() is None))

        class Hinting(App):
            async def respond(self, send: Send) -> None:
                await send(hint)
                await send(start())
                await send({"type": "http.response.pathsend", "path": "/file"})
                await send({"type": "http.response.trailers", "headers": []})

        await Connection(wrap(Hinting()), look).run()

        assert seen == [
            (hint["type"], False),
            (START, True),
            ("http.response.pathsend", True),
            ("http.response.trailers", True),
        ]


class TestAbort:
    @pytest.mark.parametrize("status", [400, 404, 500, 599])
    async def test_a_status_of_400_and_above_aborts(self, stored: Any, status: int) -> None:
        connection = await ask(App(status))

        assert connection.sent == [start(status), body()]
        assert await stored.count_documents({}) == 0

    async def test_it_comes_before_the_start_is_sent_on(self, server_uri: str) -> None:
        seen = []

        async def look(message: Message) -> None:
            seen.append(open_transactions(server_uri))

        await Connection(wrap(App(404)), look).run()

        assert seen == [0, 0]

    @pytest.mark.parametrize("error", [ValueError("mine"), Rollback(), asyncio.CancelledError()])
    async def test_an_exception_aborts_and_goes_on_unchanged(
        self, stored: Any, error: BaseException
    ) -> None:
        class Failing(App):
            async def before(self) -> None:
                raise error

        connection = Connection(wrap(Failing()))
        with pytest.raises(type(error)) as raised:
            await connection.run()

        assert raised.value is error
        assert connection.sent == []
        assert await stored.count_documents({}) == 0

    async def test_an_application_that_does_not_answer_is_aborted(
        self, stored: Any, server_uri: str
    ) -> None:
        class Silent(App):
            async def respond(self, send: Send) -> None:
                pass

        connection = await ask(Silent())

        assert connection.sent == []
        assert await stored.count_documents({}) == 0
        assert open_transactions(server_uri) == 0

    async def test_a_response_after_the_applications_end_is_not_sent(self, stored: Any) -> None:
        ended = asyncio.Event()
        tasks = []

        async def late(send: Send) -> None:
            await ended.wait()
            await respond(send)

        async def app(scope: Any, receive: Receive, send: Send) -> None:
            await Order().insert()
            tasks.append(asyncio.create_task(late(send)))

        connection = await ask(app)
        ended.set()

        with pytest.raises(RuntimeError, match="after the application's end"):
            await tasks[0]
        assert connection.sent == []

    async def test_a_start_that_is_none_is_refused_and_aborts(
        self, stored: Any, server_uri: str
    ) -> None:
        class Wrong(App):
            async def respond(self, send: Send) -> None:
                await send({"type": START})

        with pytest.raises(KeyError):
            await ask(Wrong())

        assert open_transactions(server_uri) == 0
        assert await stored.count_documents({}) == 0

    async def test_a_dry_run_ends_its_transaction_itself(self, stored: Any) -> None:
        class DryRun(App):
            async def before(self) -> None:
                scope = current_scope()
                assert scope is not None
                await scope.abort()

        assert (await ask(DryRun())).status == 200
        assert await stored.count_documents({}) == 0

    async def test_its_hooks_can_not_change_the_response(
        self, stored: Any, errors: pytest.LogCaptureFixture
    ) -> None:
        def fail() -> None:
            raise ValueError(SECRET)

        class Hooked(App):
            async def before(self) -> None:
                on_abort(fail)

        connection = await ask(Hooked(409))

        assert connection.sent == [start(409), body()]
        (record,) = errors.records
        assert record.event == "hooks.failed"  # type: ignore[attr-defined]
        assert "ValueError" in record.getMessage()
        assert SECRET not in record.getMessage()


class TestShouldCommit:
    async def test_it_decides_by_status_and_scope(self, stored: Any) -> None:
        asked: list[Any] = []

        def keep_errors(status: int, scope: Mapping[str, Any]) -> bool:
            asked.append((status, scope["path"]))
            return status == 402

        await ask(App(402), should_commit=keep_errors)
        await ask(App(200), should_commit=keep_errors)

        assert asked == [(402, "/"), (200, "/")]
        assert await stored.count_documents({}) == 1

    @pytest.mark.parametrize("answer", [None, 1, "yes", ValueError(SECRET)])
    async def test_one_that_fails_aborts_and_is_answered_for(
        self, stored: Any, errors: pytest.LogCaptureFixture, answer: Any
    ) -> None:
        def broken(status: int, scope: Mapping[str, Any]) -> bool:
            if isinstance(answer, Exception):
                raise answer
            return answer  # type: ignore[no-any-return]

        app = App()
        connection = await ask(app, should_commit=broken)

        assert connection.status == connection.problem["status"] == 500
        assert not app.ended
        assert await stored.count_documents({}) == 0
        (record,) = errors.records
        assert record.event == "asgi.should_commit.failed"  # type: ignore[attr-defined]
        assert SECRET not in record.getMessage() + connection.body.decode()

    async def test_one_that_ends_the_program_leaves_nothing_open(
        self, stored: Any, server_uri: str
    ) -> None:
        class Exit(BaseException):
            pass

        def leave(status: int, scope: Mapping[str, Any]) -> bool:
            raise Exit

        with pytest.raises(Exit):
            await ask(App(), should_commit=leave)

        assert open_transactions(server_uri) == 0
        assert await stored.count_documents({}) == 0


class Vetoed(App):
    """Its transaction can't be committed.

    Args:
        error: What a hook says to the commit.
    """

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self._error = error or ValueError(SECRET)

    async def before(self) -> None:
        scope = current_scope()
        assert scope is not None
        scope.before_commit(self._veto)

    def _veto(self) -> None:
        raise self._error


class TestFailedCommit:
    async def test_a_refused_commit_is_a_500(self, stored: Any, fail_point: FailPoint) -> None:
        with fail_point("commitTransaction", error_code=REFUSED):
            connection = await ask(App())

        assert connection.status == 500
        assert connection.problem == {
            "type": "about:blank",
            "title": "Internal Server Error",
            "status": 500,
            "detail": "The changes of this request could not be stored.",
            "outcome": "aborted",
        }

    async def test_a_transient_error_is_a_503_with_retry_after(
        self, stored: Any, fail_point: FailPoint
    ) -> None:
        with fail_point("commitTransaction", error_code=REFUSED, labels=[TRANSIENT]):
            connection = await ask(App())

        assert (connection.status, connection.headers["retry-after"]) == (503, "1")
        assert connection.problem["title"] == "Service Unavailable"
        assert connection.problem["outcome"] == "aborted"
        assert await stored.count_documents({}) == 0

    async def test_an_unknown_outcome_says_so(self, fail_point: FailPoint) -> None:
        with fail_point("commitTransaction", error_code=REFUSED, labels=[UNKNOWN]):
            connection = await ask(App(), timeout=0.05)

        assert connection.status == 500
        assert connection.problem["outcome"] == "unknown"
        assert "not known" in connection.problem["detail"]

    async def test_after_a_commit_in_the_endpoint_nobody_is_told_to_repeat_all(
        self, stored: Any
    ) -> None:
        class InTwoSteps(App):
            async def before(self) -> None:
                scope = current_scope()
                assert scope is not None
                assert not scope.has_committed
                await scope.commit()
                await Order().insert()
                scope.before_commit(self._conflict)

            def _conflict(self) -> None:
                raise OperationFailure("conflict", 112, {"errorLabels": [TRANSIENT]})

        connection = await ask(InTwoSteps())

        assert connection.status == 500
        assert connection.problem["outcome"] == "unknown"
        assert await stored.count_documents({}) == 1

    async def test_an_error_of_the_server_that_was_caught_is_a_500(self, stored: Any) -> None:
        class Catching(App):
            async def before(self) -> None:
                order = await Order().insert()
                with pytest.raises(DuplicateKeyError):
                    await Order(id=order.id).insert()

        connection = await ask(Catching())

        assert connection.problem["status"] == 500
        assert await stored.count_documents({}) == 0

    async def test_a_transient_error_that_was_caught_is_a_503(
        self, stored: Any, fail_point: FailPoint
    ) -> None:
        class Catching(App):
            async def before(self) -> None:
                with fail_point("insert", error_code=112, labels=[TRANSIENT]):
                    with pytest.raises(OperationFailure):
                        await Order().insert()

        connection = await ask(Catching())

        assert connection.problem["status"] == 503
        assert await stored.count_documents({}) == 0

    async def test_a_transaction_that_was_too_old_is_no_503(self, stored: Any) -> None:
        class Late(App):
            async def before(self) -> None:
                scope = current_scope()
                assert scope is not None
                scope.before_commit(self._expire)

            def _expire(self) -> None:
                old = TransactionExpiredError("too old")
                old.__cause__ = OperationFailure("gone", 251, {"errorLabels": [TRANSIENT]})
                raise TransactionAbortedError("gone") from old

        assert (await ask(Late())).problem["status"] == 500

    async def test_a_scope_that_is_rollback_only_is_a_500(self, stored: Any) -> None:
        class Doomed(App):
            async def before(self) -> None:
                scope = current_scope()
                assert scope is not None
                scope.set_rollback_only("the stock is gone")

        connection = await ask(Doomed())

        assert connection.problem["status"] == 500
        assert await stored.count_documents({}) == 0

    @pytest.mark.parametrize("veto", [ValueError(SECRET), Rollback()])
    async def test_a_veto_is_a_500(self, stored: Any, veto: Exception) -> None:
        connection = await ask(Vetoed(veto))

        assert connection.problem["status"] == 500
        assert await stored.count_documents({}) == 0

    async def test_nothing_of_the_response_is_sent(self) -> None:
        connection = await ask(Vetoed())

        assert [message["type"] for message in connection.sent] == [START, BODY]
        assert set(connection.headers) == {"content-type", "content-length"}
        assert connection.headers["content-length"] == str(len(connection.body))
        assert SECRET not in connection.body.decode()

    async def test_a_head_request_is_answered_without_a_body(self) -> None:
        connection = await Connection(wrap(Vetoed()), method="HEAD").run()

        assert (connection.status, connection.body) == (500, b"")

    async def test_the_application_is_ended(self) -> None:
        app = Vetoed()
        await ask(app)

        assert not app.ended

    async def test_it_is_logged_once_by_the_name_of_the_error(
        self, errors: pytest.LogCaptureFixture
    ) -> None:
        await ask(Vetoed())

        (record,) = errors.records
        assert record.event == "asgi.commit.failed"  # type: ignore[attr-defined]
        assert record.error == "ValueError"  # type: ignore[attr-defined]
        assert record.status == 500  # type: ignore[attr-defined]
        assert SECRET not in record.getMessage()
        assert record.exc_info is None

    async def test_an_application_that_goes_on_is_told_again(self) -> None:
        raised: list[BaseException] = []

        class Stubborn(Vetoed):
            async def respond(self, send: Send) -> None:
                for message in (start(), body(more=True), body()):
                    try:
                        await send(message)
                    except ValueError as error:
                        raised.append(error)

        connection = await ask(Stubborn())

        assert len(raised) == 3
        assert len(set(map(id, raised))) == 1
        assert connection.status == 500
        assert len(connection.sent) == 2

    async def test_what_its_error_handler_sends_is_dropped(self) -> None:
        class Handling(Vetoed):
            async def respond(self, send: Send) -> None:
                try:
                    await super().respond(send)
                except ValueError:
                    await respond(send, 418)

        app = Handling()
        connection = await ask(app)

        assert app.ended
        assert connection.status == 500
        assert len(connection.sent) == 2

    async def test_what_it_raises_instead_is_dropped(self) -> None:
        class Raising(Vetoed):
            async def respond(self, send: Send) -> None:
                try:
                    await super().respond(send)
                except ValueError as error:
                    raise RuntimeError("the response had started already") from error

        assert (await ask(Raising())).status == 500

    async def test_a_client_that_has_gone_is_no_other_error(
        self, errors: pytest.LogCaptureFixture
    ) -> None:
        async def broken_pipe(message: Message) -> None:
            raise BrokenPipeError

        await Connection(wrap(Vetoed()), broken_pipe).run()

        assert len(errors.records) == 1

    async def test_hooks_that_fail_after_the_commit_leave_the_response_as_it_is(
        self, stored: Any, errors: pytest.LogCaptureFixture
    ) -> None:
        async def fail() -> None:
            raise ValueError(SECRET)

        class Hooked(App):
            async def before(self) -> None:
                on_commit(fail)

        app = Hooked()
        connection = await ask(app)

        assert app.ended
        assert connection.sent == [start(), body()]
        assert await stored.count_documents({}) == 1
        (record,) = errors.records
        assert record.event == "hooks.failed"  # type: ignore[attr-defined]
        assert SECRET not in record.getMessage()

    async def test_a_response_after_a_commit_that_was_cancelled_and_failed_is_not_sent(
        self, stored: Any, fail_point: FailPoint, wire: Wire
    ) -> None:
        app = TimingOut(wire)
        with fail_point("commitTransaction", block_ms=300, error_code=REFUSED):
            connection = await ask(app)

        assert not app.ended
        assert connection.problem["status"] == 500
        assert await stored.count_documents({}) == 0

    async def test_a_response_after_an_abort_that_was_cancelled_is_not_sent(
        self, stored: Any, fail_point: FailPoint, wire: Wire
    ) -> None:
        with fail_point("abortTransaction", block_ms=300):
            connection = await ask(TimingOut(wire, 404, then=200))

        assert connection.problem["status"] == 500
        assert await stored.count_documents({}) == 0

    async def test_a_response_after_a_commit_that_was_cancelled_and_applied_is_sent(
        self, stored: Any, fail_point: FailPoint, wire: Wire
    ) -> None:
        with fail_point("commitTransaction", block_ms=300):
            connection = await ask(TimingOut(wire))

        assert connection.status == 203
        assert await stored.count_documents({}) == 1


class TimingOut(App):
    """Begins its response, is cancelled while the transaction ends, and sends another one."""

    def __init__(self, wire: Wire, status: int = 200, *, then: int = 203) -> None:
        super().__init__(status)
        self._wire, self._then = wire, then

    async def respond(self, send: Send) -> None:
        await cancelled_while_it_ends(super().respond(send), self._wire)
        await respond(send, self._then)


async def cancelled_while_it_ends(answer: Coroutine[Any, Any, None], wire: Wire) -> None:
    """Cancel a response when its first command is on its way to the server."""
    task = asyncio.create_task(answer)
    wire.on_start = lambda: task.get_loop().call_soon_threadsafe(task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task
    wire.on_start = lambda: None


class TestAfterTheStart:
    async def test_the_rest_runs_outside(self, wire: Wire, stored: Any) -> None:
        class Streaming(App):
            async def respond(self, send: Send) -> None:
                await send(start())
                for n in range(3):
                    await Order(n=n).insert()
                    await send(body(str(await Order.count()).encode(), more=True))
                await send(body(b""))
                await Order(name="background").insert()

        with wire.record() as seen:
            connection = await ask(Streaming())

        assert connection.body == b"234"
        assert await stored.count_documents({}) == 5
        commit = names(seen).index("commitTransaction")
        assert all("txnNumber" in event.command for event in seen[: commit + 1])
        assert not any("autocommit" in event.command for event in seen[commit + 1 :])

    async def test_a_start_from_a_child_task_leaves_both_tasks_outside(self, stored: Any) -> None:
        scopes: list[Any] = []

        async def stream(send: Send) -> None:
            await send(start())
            scopes.append(current_scope())
            await Order(name="streamed").insert()
            await send(body())

        async def app(scope: Any, receive: Receive, send: Send) -> None:
            await Order().insert()
            await asyncio.create_task(stream(send))
            scopes.append(current_scope())
            await Order(name="background").insert()

        await ask(app)

        assert scopes == [None, None]
        assert await stored.count_documents({}) == 3

    async def test_what_the_task_of_the_request_starts_after_that_is_outside(
        self, stored: Any
    ) -> None:
        hooks: list[str] = []

        async def background(name: str) -> None:
            on_commit(lambda: hooks.append(name))
            await Order(name=name).insert()

        async def app(scope: Any, receive: Receive, send: Send) -> None:
            await Order().insert()
            assert (await receive())["type"] == "http.request"
            streaming = asyncio.create_task(respond(send))
            assert (await receive())["type"] == "http.disconnect"
            await streaming
            await asyncio.gather(*(background(name) for name in "abc"))

        await Connection(wrap(app)).run()

        assert hooks == ["a", "b", "c"]
        assert await stored.count_documents({}) == 4

    async def test_a_task_of_the_endpoint_that_goes_on_is_refused(self, stored: Any) -> None:
        started = asyncio.Event()
        tasks = []

        async def late() -> None:
            await started.wait()
            await Order(name="late").insert()

        class Spawning(App):
            async def before(self) -> None:
                tasks.append(asyncio.create_task(late()))

            async def respond(self, send: Send) -> None:
                await super().respond(send)
                started.set()

        await ask(Spawning())

        with pytest.raises(ScopeClosedError):
            await tasks[0]
        assert await stored.count_documents({}) == 1

    async def test_no_message_of_another_task_overtakes_the_commit(
        self, stored: Any, fail_point: FailPoint, wire: Wire
    ) -> None:
        committing = asyncio.Event()
        seen = []

        async def look(message: Message) -> None:
            seen.append((message["type"], await stored.count_documents({})))

        async def second(send: Send) -> None:
            await committing.wait()
            await send(body())

        async def app(scope: Any, receive: Receive, send: Send) -> None:
            await Order().insert()
            loop = asyncio.get_running_loop()
            wire.on_start = lambda: loop.call_soon_threadsafe(committing.set)
            await asyncio.gather(send(start()), second(send))

        with fail_point("commitTransaction", block_ms=200):
            await Connection(wrap(app), look).run()

        assert seen == [(START, 1), (BODY, 1)]


class TestManyRequests:
    async def test_each_sees_its_own_transaction_alone(self, stored: Any, wire: Wire) -> None:
        inserted: set[str] = set()
        together = asyncio.Event()

        async def app(scope: Any, receive: Receive, send: Send) -> None:
            name = scope["path"]
            await Order(name=name).insert()
            inserted.add(name)
            if len(inserted) == 20:
                together.set()
            await together.wait()
            assert [order.name for order in await Order.find_all().to_list()] == [name]
            await respond(send, 200 if int(name[1:]) % 2 else 409)

        middleware = wrap(app)
        connections = [Connection(middleware, path=f"/{n}") for n in range(20)]
        await asyncio.gather(*(connection.run() for connection in connections))

        left = {each["name"] async for each in stored.find()}
        assert left == {f"/{n}" for n in range(20) if n % 2}
