"""The server ends a transaction that lives too long.

It does so ``transactionLifetimeLimitSeconds`` (a parameter of the server, 60 unless changed)
after the transaction's first operation. The error is then the one of a transaction that lost a
conflict, with the label that says "run it again", though it would only grow as old again
(MongoDB manual, "Production Considerations", "Runtime Limit").
"""

from __future__ import annotations

import asyncio
import logging
import time
from weakref import ref

from pymongo.errors import OperationFailure, PyMongoError

from .drivers import Client
from .errors import TransactionExpiredError
from .log import log

DEFAULT_LIMIT = 60.0
"""The server's default, in seconds: taken where the server does not tell."""

LOOK_EVERY = 0.5
"""How old a transaction is when its limit is looked up, in seconds: most never are."""

NEAR = 0.75
"""The share of its limit at which a transaction is reported."""

NO_SUCH_TRANSACTION = 251
LIFETIME_EXCEEDED = 290


async def limit_of(client: Client) -> float:
    """Ask the server how long a transaction may live, in seconds."""
    name = "transactionLifetimeLimitSeconds"
    try:
        return float((await client.admin.command("getParameter", 1, **{name: 1}))[name])
    except (PyMongoError, KeyError):
        return DEFAULT_LIMIT  # not everybody may ask


class _Limits:
    """What is known of the limits of servers.

    There is one question for each client, not one for each transaction of a process that has a
    thousand of them open.
    """

    def __init__(self) -> None:
        self._limits: dict[int, tuple[ref[Client], float | None]] = {}
        self._asking: set[asyncio.Task[None]] = set()

    def of(self, client: Client) -> float | None:
        """Return the limit in seconds; ``None`` while it is being asked for."""
        known = self._limits.get(id(client))
        if known is not None and known[0]() is client:
            return known[1]
        self._note(client, None)
        task = asyncio.ensure_future(self._ask(client))
        self._asking.add(task)  # asyncio itself holds its tasks only weakly
        task.add_done_callback(self._asking.discard)
        return None

    def _note(self, client: Client, limit: float | None) -> None:
        key = id(client)
        self._limits[key] = (ref(client, lambda _: self._limits.pop(key, None)), limit)

    async def _ask(self, client: Client) -> None:
        limit = DEFAULT_LIMIT
        try:
            limit = await limit_of(client)
        finally:
            self._note(client, limit)


_limits = _Limits()


class Lifetime:
    """How long one transaction has been open on the server.

    Args:
        client: The client, to ask for the limit.
    """

    __slots__ = ("_began", "_client", "_timer")

    def __init__(self, client: Client) -> None:
        self._client = client
        self._began = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def age(self) -> float:
        """How long ago the first operation was sent, in seconds; 0 where none was."""
        return time.monotonic() - self._began if self._began else 0.0

    def begin(self) -> None:
        """Count from now on: the first operation is being sent."""
        self.end()
        self._began = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY, self._look)

    def end(self) -> None:
        """Stop counting."""
        self._began = 0.0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """See when the transaction comes near its limit, where that is known yet."""
        limit = _limits.of(self._client)
        loop = asyncio.get_running_loop()
        if limit is None:
            self._timer = loop.call_later(LOOK_EVERY, self._look)
        else:
            self._timer = loop.call_later(NEAR * limit - self.age, self._warn, limit)

    def _warn(self, limit: float) -> None:
        age = self.age
        log(
            logging.WARNING,
            "transaction.expiring",
            "A transaction is %.1f s old, and the server ends it after %.0f s",
            age,
            limit,
            duration=age,
            limit=limit,
        )

    async def check(self, error: PyMongoError) -> None:
        """Say it clearly where an error means that the transaction has lived too long.

        Raises:
            TransactionExpiredError: If that is so.
        """
        if not isinstance(error, OperationFailure):
            return
        age = self.age
        if error.code == NO_SUCH_TRANSACTION and age:
            limit = await limit_of(self._client)
            if age < limit:
                return
        elif error.code != LIFETIME_EXCEEDED:
            return
        raise TransactionExpiredError(
            f"The server ended the transaction, because it was {age:.0f} s old and had outlived "
            "transactionLifetimeLimitSeconds. Run again it would take as long: do less in one "
            "transaction, or wait for other services before it."
        ) from error
