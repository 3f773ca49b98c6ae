"""What the middleware takes and refuses, and which requests are its business."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from asgi_client import Connection, Receive, Send, respond
from asgi_models import Elsewhere, Order, prepare
from beanie import Document, init_beanie
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from wire import DATABASE, Wire

from beanie_session_scope import (
    ModelNotInitializedError,
    ModelNotScopedError,
    NotAClientError,
    SessionScope,
    SessionScopeMixin,
    bind_session,
    current_scope,
    outside_session,
    with_session,
)
from beanie_session_scope.asgi import SessionScopeMiddleware
from beanie_session_scope.drivers import DRIVER

pytestmark = pytest.mark.timeout(30)


class Plain(Document):
    """A class without the mixin."""


class Late(SessionScopeMixin, Document):
    """A class that nobody initialises."""


async def nothing(scope: Any, receive: Receive, send: Send) -> None:
    """An application that is never asked."""


async def coroutine_function() -> Any:
    """What can't return a client at once."""


class CoroutineObject:
    async def __call__(self) -> Any:
        """The same, as an object."""


REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("neither", {}, ValueError, "client=, collections=, or both"),
    ("no class", {"collections": []}, ValueError, "no client and an empty collections="),
    ("client", {"client": "mongodb://h"}, NotAClientError, "and is a str object"),
    ("client class", {"client": DRIVER.client_class}, TypeError, "a function, and is a class"),
    ("async client", {"client": coroutine_function}, TypeError, "client must be a plain function"),
    ("async object", {"client": CoroutineObject()}, TypeError, "client must be a plain function"),
    ("class", {"collections": Order}, ModelNotScopedError, r"write collections=\["),
    ("string", {"collections": "Order"}, ModelNotScopedError, r"write collections=\["),
    ("number", {"collections": 1}, ModelNotScopedError, r"write collections=\["),
    ("plain", {"collections": [Plain]}, ModelNotScopedError, "Plain has no SessionScopeMixin"),
    (
        "async classes",
        {"collections": coroutine_function},
        TypeError,
        "collections must be a plain function",
    ),
    ("methods", {"methods": "POST"}, TypeError, "methods must be an iterable of strings"),
    ("no method", {"methods": []}, ValueError, "no request to handle"),
    ("odd method", {"methods": [1]}, TypeError, "methods must hold strings, and holds a int"),
    ("paths", {"paths": "/orders"}, TypeError, "paths must be an iterable of strings"),
    ("bytes", {"paths": b"/orders"}, TypeError, "paths must be an iterable of strings"),
    ("no path", {"paths": []}, ValueError, "no request to handle"),
    ("relative", {"paths": ["orders"]}, ValueError, "begin with '/', and holds 'orders'"),
    ("excluded", {"exclude_paths": "/x"}, TypeError, "exclude_paths must be an iterable"),
    ("none", {"exclude_paths": None}, TypeError, "exclude_paths must be an iterable"),
    ("predicate", {"should_commit": True}, TypeError, "should_commit must be a function"),
    (
        "async predicate",
        {"should_commit": coroutine_function},
        TypeError,
        "should_commit must be a plain function",
    ),
    ("timeout", {"timeout": 0}, ValueError, "timeout=0 must be a number of seconds"),
    ("cleanup", {"cleanup_timeout": -1}, ValueError, "cleanup_timeout=-1"),
    ("option", {"propagation": "never"}, TypeError, "takes no propagation"),
    ("options", {"snapshot": True, "session": 1}, TypeError, "takes no session, snapshot"),
]


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [pytest.param(*case[1:], id=case[0]) for case in REFUSED],
    )
    def test_what_can_not_work_is_refused_when_it_is_built(
        self, arguments: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        needed = {"collections": [Order]}
        if not {"client", "collections"} & set(arguments) and arguments:
            arguments = {**needed, **arguments}

        with pytest.raises(error, match=message):
            SessionScopeMiddleware(nothing, **arguments)

    async def test_a_secondary_read_preference_is_refused(self) -> None:
        from pymongo.read_preferences import ReadPreference

        with pytest.raises(ValueError, match="reads from the primary"):
            SessionScopeMiddleware(
                nothing, collections=[Order], read_preference=ReadPreference.SECONDARY
            )

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"client": lambda: "mongodb://h"}, NotAClientError),
            ({"client": functools.partial(str)}, NotAClientError),
            ({"collections": lambda: [Plain]}, ModelNotScopedError),
            ({"collections": lambda: Order}, ModelNotScopedError),
            ({"collections": lambda: 1}, ModelNotScopedError),
            ({"collections": [Late]}, ModelNotInitializedError),
        ],
    )
    async def test_what_shows_only_at_a_request_is_raised_before_the_application_runs(
        self, arguments: dict[str, Any], error: type[Exception]
    ) -> None:
        async def app(scope: Any, receive: Receive, send: Send) -> None:
            raise AssertionError

        with pytest.raises(error):
            await Connection(SessionScopeMiddleware(app, **arguments)).run()
        assert current_scope() is None

    async def test_classes_may_come_from_an_iterator(self, client: Any) -> None:
        await prepare(client)
        middleware = SessionScopeMiddleware(Probe(), collections=iter([Order]))

        for _ in range(2):
            connection = await Connection(middleware).run()
            assert connection.status == 200

    async def test_options_are_those_of_the_transaction(self, client: Any, wire: Wire) -> None:
        await prepare(client)
        options: dict[str, Any] = {
            "read_concern": ReadConcern("snapshot"),
            "write_concern": WriteConcern("majority"),
            "max_commit_time_ms": 5000,
            "causal_consistency": False,
            "timeout": 1.5,
            "cleanup_timeout": 2.5,
        }
        scopes: list[SessionScope] = []

        async def app(scope: Any, receive: Receive, send: Send) -> None:
            scope = current_scope()
            assert scope is not None
            scopes.append(scope)
            await Order().insert()
            await respond(send)

        with wire.record() as seen:
            await Connection(SessionScopeMiddleware(app, collections=[Order], **options)).run()

        insert, commit = (event.command for event in seen)
        assert insert["readConcern"]["level"] == "snapshot"
        assert (commit["writeConcern"]["w"], commit["maxTimeMS"]) == ("majority", 5000)
        assert (scopes[0].options.timeout, scopes[0].options.cleanup_timeout) == (1.5, 2.5)


class Probe:
    """An application that notes, for each request, whether a scope was open."""

    def __init__(self) -> None:
        self.scopes: list[SessionScope | None] = []

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        self.scopes.append(current_scope())
        if scope["type"] == "http":
            await Order().insert()
            await respond(send)


class TestWhichRequests:
    @pytest_asyncio.fixture(autouse=True)
    async def stored(self, client: Any) -> AsyncIterator[Any]:
        yield await prepare(client)

    async def is_handled(self, scope: dict[str, Any], **arguments: Any) -> bool:
        probe = Probe()
        await Connection(
            SessionScopeMiddleware(probe, collections=[Order], **arguments), **scope
        ).run()
        return probe.scopes[0] is not None

    @pytest.mark.parametrize("kind", ["websocket", "lifespan"])
    async def test_nothing_but_http_is_handled(self, kind: str) -> None:
        assert not await self.is_handled({"type": kind})

    @pytest.mark.parametrize(("method", "handled"), [("POST", True), ("GET", False)])
    async def test_methods_can_be_chosen(self, method: str, handled: bool) -> None:
        assert await self.is_handled({"method": method}, methods={"post", "PUT"}) is handled

    @pytest.mark.parametrize(
        ("path", "handled"),
        [
            ("/orders", True),
            ("/orders/", True),
            ("/orders/1", True),
            ("/orders/export", False),
            ("/orders/export/all", False),
            ("/orders/exported", True),
            ("/orders-old", False),
            ("/", False),
        ],
    )
    async def test_paths_are_matched_by_whole_segments(self, path: str, handled: bool) -> None:
        chosen = {"paths": ["/orders/"], "exclude_paths": ["/orders/export"]}

        assert await self.is_handled({"path": path}, **chosen) is handled

    async def test_the_root_stands_for_every_path(self) -> None:
        assert await self.is_handled({"path": "/orders"}, paths=["/"])
        assert not await self.is_handled({"path": "/orders"}, exclude_paths=["/"])

    @pytest.mark.parametrize(
        ("path", "root_path", "handled"),
        [
            ("/api/orders", "/api", True),
            ("/api/orders", "/api/", True),
            ("/orders", "/api", True),  # a server that leaves it out of the path
            ("/apiorders", "/api", False),
            ("/api", "/api", False),
        ],
    )
    async def test_paths_are_those_below_the_mount(
        self, path: str, root_path: str, handled: bool
    ) -> None:
        scope = {"path": path, "root_path": root_path}

        assert await self.is_handled(scope, paths=["/orders"]) is handled


class TestInsideAScope:
    @pytest_asyncio.fixture(autouse=True)
    async def stored(self, client: Any) -> AsyncIterator[Any]:
        yield await prepare(client)

    @pytest.mark.parametrize("status", [200, 409])
    async def test_it_does_nothing_where_one_is_open(
        self, client: Any, stored: Any, status: int
    ) -> None:
        async def app(scope: Any, receive: Receive, send: Send) -> None:
            assert current_scope() is outer
            await Order().insert()
            await respond(send, status)

        outer = with_session(client)
        async with outer:
            connection = await Connection(SessionScopeMiddleware(app, client)).run()
            assert connection.status == status
            assert not outer.rollback_only
            assert await Order.count() == 1
            assert await stored.count_documents({}) == 0

        assert await stored.count_documents({}) == 1

    async def test_it_does_nothing_where_one_is_open_that_binds_other_classes(
        self, client: Any
    ) -> None:
        async def app(scope: Any, receive: Receive, send: Send) -> None:
            assert current_scope() is outer
            assert Order.get_session() is None
            await respond(send, 409)

        outer = with_session(client, [])
        async with outer:
            await Connection(SessionScopeMiddleware(app, collections=[Order])).run()
            assert not outer.rollback_only

    async def test_it_does_nothing_where_a_session_was_bound(
        self, client: Any, stored: Any
    ) -> None:
        session = await DRIVER.start_session(client)
        await DRIVER.start_transaction(session)
        with bind_session(session, collections=[Order]):
            await Connection(SessionScopeMiddleware(Probe(), client)).run()
        await session.abort_transaction()
        await session.end_session()

        assert await stored.count_documents({}) == 0

    @pytest.mark.parametrize("named", [True, False])
    async def test_it_does_nothing_where_a_session_was_bound_by_hand(
        self, client: Any, stored: Any, named: bool
    ) -> None:
        session = await DRIVER.start_session(client)
        await DRIVER.start_transaction(session)
        token = Order.set_session(session)
        middleware = (
            SessionScopeMiddleware(Probe(), collections=[Order])
            if named
            else SessionScopeMiddleware(Probe(), client)
        )
        await Connection(middleware).run()
        Order.clear_session(token)
        await session.abort_transaction()
        await session.end_session()

        assert await stored.count_documents({}) == 0

    async def test_an_inner_middleware_leaves_it_to_the_outer_one(
        self, stored: Any, wire: Wire
    ) -> None:
        inner = SessionScopeMiddleware(Probe(), collections=[Order])
        with wire.record() as seen:
            await Connection(SessionScopeMiddleware(inner, collections=[Order])).run()

        assert [event.command_name for event in seen] == ["insert", "commitTransaction"]

    async def test_outside_session_lets_it_open_its_own(self, stored: Any) -> None:
        probe = Probe()
        async with with_session(collections=[Order]):
            with outside_session():
                await Connection(SessionScopeMiddleware(probe, collections=[Order])).run()
            assert probe.scopes[0] is not current_scope()

        assert probe.scopes[0] is not None

    @pytest.mark.parametrize("by_hand", [True, False])
    async def test_a_session_of_another_client_is_no_reason(
        self, client: Any, other_client: Any, stored: Any, by_hand: bool
    ) -> None:
        await init_beanie(database=other_client[DATABASE], document_models=[Elsewhere])
        probe = Probe()
        async with with_session(
            other_client, collections=[] if by_hand else [Elsewhere]
        ) as session:
            token = Elsewhere.set_session(session) if by_hand else None
            await Connection(SessionScopeMiddleware(probe, client)).run()
            if token is not None:
                Elsewhere.clear_session(token)

        assert probe.scopes[0] is not None
        assert probe.scopes[0].client is client
        assert await stored.count_documents({}) == 1


class TestOrder:
    """A middleware that runs the application in a task of its own must not stand inside."""

    class Timing(BaseHTTPMiddleware):
        pass

    def warnings_of(self, app: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
        caplog.set_level(logging.WARNING, "beanie_session_scope")
        SessionScopeMiddleware(app, collections=[Order])
        return [record.getMessage() for record in caplog.records]

    def test_one_inside_is_warned_of(self, caplog: pytest.LogCaptureFixture) -> None:
        (warning,) = self.warnings_of(GZipMiddleware(self.Timing(nothing)), caplog)

        assert "Timing" in warning
        assert "innermost" in warning
        assert caplog.records[0].event == "asgi.order"  # type: ignore[attr-defined]

    def test_one_of_an_application_inside_is_warned_of(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        app = Starlette(middleware=[Middleware(self.Timing)])

        assert len(self.warnings_of(app, caplog)) == 1

    def test_others_inside_are_fine(self, caplog: pytest.LogCaptureFixture) -> None:
        app = Starlette(middleware=[Middleware(GZipMiddleware)])

        assert self.warnings_of(GZipMiddleware(app), caplog) == []
