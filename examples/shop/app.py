"""The application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from beanie_session_scope.asgi import SessionScopeMiddleware

from .checkout import Checkout, Confirmations
from .database import connected, fill_shelves
from .models import MODELS
from .problems import add_handlers
from .routes import router


def create_app(uri: str, database: str) -> FastAPI:
    """Return the shop. Its client is created when the application starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with connected(uri, database):
            await fill_shelves()
            yield

    app = FastAPI(title="Shop", lifespan=lifespan)
    app.state.checkout = Checkout(Confirmations())
    app.include_router(router)
    add_handlers(app)
    # A checkout is run again where it conflicts, which the middleware can't do for it.
    app.add_middleware(SessionScopeMiddleware, collections=MODELS, exclude_paths=["/checkout"])
    return app
