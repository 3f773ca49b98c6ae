"""The ways to run Beanie's operations in a transaction, which the benchmarks compare."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from beanie_session_scope import with_session
from beanie_session_scope.drivers import DRIVER

from .models import Plain, Scoped


@asynccontextmanager
async def transaction_by_hand(client: Any) -> AsyncIterator[Any]:
    """Open a transaction, for operations with ``session=``; commit it, or end it otherwise."""
    session = await DRIVER.start_session(client)
    try:
        await DRIVER.start_transaction(session)
        yield session
        await session.commit_transaction()
    finally:
        await session.end_session()  # aborts what was not committed


@asynccontextmanager
async def bound_transaction(client: Any) -> AsyncIterator[Any]:
    """Do the same with PyMongo's ``bind()``, for operations without ``session=``."""
    async with client.start_session().bind() as session:
        async with await session.start_transaction():
            yield session


@dataclass(frozen=True)
class Way:
    """A way to run operations in a transaction.

    Attributes:
        name: As tables and plots call it.
        model: The class whose operations are run.
        open: Opens the transaction.
        passes_session: Whether its operations are given ``session=``.
    """

    name: str
    model: Any
    open: Callable[[Any], AbstractAsyncContextManager[Any]]
    passes_session: bool = False

    def arguments(self, session: Any) -> dict[str, Any]:
        """Return what an operation is given."""
        return {"session": session} if self.passes_session else {}


BY_HAND = Way("by hand", Plain, transaction_by_hand, passes_session=True)
BIND = Way("bind()", Plain, bound_transaction)
SCOPE = Way("with_session", Scoped, lambda client: with_session(client, [Scoped]))

# PyMongo has bind() from 4.17 on, and Motor has none.
WAYS = (BY_HAND, *([BIND] if hasattr(DRIVER.session_class, "bind") else []), SCOPE)
