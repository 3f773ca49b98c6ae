"""The same application in three frameworks, to be put behind the middleware."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import fastapi
import litestar
import litestar.background_tasks
import litestar.exceptions
import litestar.response
import pydantic
from asgi_models import Order
from fastapi.responses import JSONResponse as FastAPIJSONResponse
from fastapi.responses import StreamingResponse as FastAPIStreamingResponse
from litestar.middleware import DefineMiddleware
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from beanie_session_scope import current_scope
from beanie_session_scope.asgi import SessionScopeMiddleware

App = Any
SECRET = "mongodb://user:password@host"


class Handled(Exception):
    """An error that the application has a handler for."""


done: list[str] = []
"""What background tasks did."""


async def background(name: str) -> None:
    """Store some orders at once, which is outside."""
    assert current_scope() is None
    await asyncio.gather(*(Order(name=name, n=n).insert() for n in range(3)))
    done.append(name)


def veto_the_commit() -> None:
    def veto() -> None:
        raise Handled(SECRET)  # what a handler could only answer to before the response starts

    scope = current_scope()
    assert scope is not None
    scope.before_commit(veto)


async def counts() -> AsyncIterator[bytes]:
    """Read and write in a stream, which is outside."""
    for n in range(3):
        assert current_scope() is None
        await asyncio.gather(Order(name="streamed", n=n).insert(), Order.count())
        yield f"{await Order.count()} ".encode()


# -- Starlette -----------------------------------------------------------------------------


async def starlette_endpoint(request: Request) -> Response:
    await Order(name="request").insert()
    kind = request.path_params["kind"]
    if kind == "conflict":
        raise HTTPException(409)
    if kind == "handled":
        raise Handled
    if kind == "broken":
        raise ValueError(SECRET)
    if kind == "stream":
        return StreamingResponse(counts(), background=BackgroundTask(background, "after"))
    if kind == "veto":
        veto_the_commit()
    return JSONResponse({}, 201, background=BackgroundTask(background, "after"))


async def starlette_handler(request: Request, error: Exception) -> Response:
    return JSONResponse({}, 418)


def starlette_app(*inner: Middleware, outer: tuple[Middleware, ...] = ()) -> App:
    return Starlette(
        routes=[Route("/{kind}", starlette_endpoint, methods=["POST"])],
        exception_handlers={Handled: starlette_handler},
        middleware=[*outer, Middleware(SessionScopeMiddleware, collections=[Order]), *inner],
    )


# -- FastAPI -------------------------------------------------------------------------------


async def fastapi_endpoint(kind: str, tasks: fastapi.BackgroundTasks) -> Any:
    await Order(name="request").insert()
    if kind == "conflict":
        raise fastapi.HTTPException(409)
    if kind == "handled":
        raise Handled
    if kind == "broken":
        raise ValueError(SECRET)
    tasks.add_task(background, "after")
    if kind == "stream":
        return FastAPIStreamingResponse(counts())
    if kind == "veto":
        veto_the_commit()
    return {}


async def fastapi_handler(request: fastapi.Request, error: Exception) -> FastAPIJSONResponse:
    return FastAPIJSONResponse({}, 418)


def fastapi_app() -> App:
    app = fastapi.FastAPI(exception_handlers={Handled: fastapi_handler})
    app.add_middleware(SessionScopeMiddleware, collections=[Order])
    app.post("/{kind}", status_code=201)(fastapi_endpoint)
    return app


# -- Litestar ------------------------------------------------------------------------------


@litestar.post("/{kind:str}")
async def litestar_endpoint(request: litestar.Request[Any, Any, Any]) -> litestar.Response[Any]:
    await Order(name="request").insert()
    kind = request.path_params["kind"]
    if kind == "conflict":
        raise litestar.exceptions.HTTPException(status_code=409)
    if kind == "handled":
        raise Handled
    if kind == "broken":
        raise ValueError(SECRET)
    after = litestar.background_tasks.BackgroundTask(background, "after")
    if kind == "stream":
        return litestar.response.Stream(counts(), background=after, status_code=200)
    if kind == "veto":
        veto_the_commit()
    return litestar.Response({}, background=after)


def litestar_handler(request: Any, error: Exception) -> litestar.Response[Any]:
    return litestar.Response({}, status_code=418)


def litestar_app() -> App:
    return litestar.Litestar(
        [litestar_endpoint],
        exception_handlers={Handled: litestar_handler},
        middleware=[DefineMiddleware(SessionScopeMiddleware, collections=[Order])],
        logging_config=None,
        openapi_config=None,
    )


def litestar_app_inside() -> App:
    plain = litestar.Litestar(
        [litestar_endpoint],
        exception_handlers={Handled: litestar_handler},
        logging_config=None,
        openapi_config=None,
    )
    return SessionScopeMiddleware(plain, collections=[Order])


APPS: dict[str, Callable[[], App]] = {"starlette": starlette_app, "fastapi": fastapi_app}
if hasattr(pydantic, "JsonValue"):  # Litestar asks for pydantic 2.5, and does not say so
    APPS |= {"litestar": litestar_app, "around-litestar": litestar_app_inside}
