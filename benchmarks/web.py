"""Requests, each in a transaction: ``python -m benchmarks.web``.

The applications speak ASGI and are called in memory, so that no web server or framework is
measured. Each request finds a document and inserts one. By hand the handler opens the transaction,
and commits it before it answers. The time is that of one request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

from beanie_session_scope.asgi import SessionScopeMiddleware

from .measure import Block, Row, Sample, Stopwatch, measure
from .models import Plain, Scoped
from .suite import Benchmark, Setting, main
from .ways import WAYS, Way

MIDDLEWARE = "middleware"


async def handle(model: Any, session: dict[str, Any]) -> None:
    """Do what the request is for."""
    await model.find_one(model.color == "target", **session)
    await model(color="new").insert(**session)


async def respond(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


def with_own_transaction(setting: Setting, way: Way, works: bool) -> Any:
    """Return an application whose handler opens the transaction."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with way.open(setting.client) as session:
            if works:
                await handle(way.model, way.arguments(session))
        await respond(send)

    return app


def with_middleware(works: bool) -> Any:
    """Return an application that leaves this to the middleware."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if works:
            await handle(Scoped, {})
        await respond(send)

    return SessionScopeMiddleware(app, collections=[Scoped])


async def request(app: Any) -> None:
    """Send a request, and take the response."""
    body = [{"type": "http.request", "body": b"", "more_body": False}]
    got: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return body.pop() if body else await asyncio.get_running_loop().create_future()

    async def send(message: MutableMapping[str, Any]) -> None:
        got.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    await app(scope, receive, send)
    assert [message["type"] for message in got] == ["http.response.start", "http.response.body"]


def requests(app: Any, at_once: int, count: int) -> Block:
    """Send many requests, some at once."""

    async def client() -> None:
        for _ in range(count // at_once):
            await request(app)

    async def block() -> Sample:
        with Stopwatch(count // at_once * at_once) as watch:
            await asyncio.gather(*(client() for _ in range(at_once)))
        return watch.spent

    return block


async def rows(setting: Setting) -> AsyncIterator[Row]:
    for model in (Plain, Scoped):
        await model(color="target").insert()
    for name, works in (("find and insert", True), ("nothing in the database", False)):
        apps = {
            **{way.name: with_own_transaction(setting, way, works) for way in WAYS},
            MIDDLEWARE: with_middleware(works),
        }
        for at_once in setting.pick((1, 10, 50), (1, 10), (1, 2)):
            count = setting.pick(50, 50, 2)
            blocks = {way: requests(app, at_once, count) for way, app in apps.items()}
            yield await measure(name, blocks, setting.pick(15, 5, 1), x=at_once)


BENCHMARK = Benchmark("web", "Web requests", rows, x_name="at once", plot="lines")

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
