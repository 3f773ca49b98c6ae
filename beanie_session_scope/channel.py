"""The way to the server that a session offers: one operation at a time, while it is open.

A driver session is not safe for concurrent use, and in a transaction the server refuses
operations that overlap. So every operation of a bound class goes through the
``SessionChannel`` of its session, which holds the lock that *belongs to the session*:
all classes and tasks that share the session share the lock. The lock is held for one
call of the driver and never across code of the user.

Closing the channel takes the same lock. Whoever still holds the channel afterwards, be
it a task that was started in the scope or a cursor that was opened there, is told so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from pymongo.errors import OperationFailure, PyMongoError

from .drivers import DRIVER, Session
from .errors import (
    ScopeClosedError,
    TransactionAbortedError,
    TransactionsNotSupportedError,
)
from .waiting import Uncancelled, settle

if TYPE_CHECKING:
    from .scope import SessionScope

ILLEGAL_OPERATION = 20
"""The code with which a standalone server answers to a transaction number."""

_channels: WeakValueDictionary[int, SessionChannel] = WeakValueDictionary()


class SessionChannel:
    """One driver session, the lock that belongs to it, and whether it may still be used.

    Args:
        session: The driver's session.
        scope: The scope that owns the session; ``None`` where somebody else does.
        transaction: Whether the scope runs a transaction on the session.
    """

    __slots__ = (
        "__weakref__",
        "_guarded",
        "_in_flight",
        "_lock",
        "closed_because",
        "failure",
        "scope",
        "session",
        "transaction",
    )

    def __init__(
        self, session: Session, scope: SessionScope | None = None, *, transaction: bool = False
    ) -> None:
        self.session = session
        self.scope = scope
        self.transaction = transaction
        self.failure: PyMongoError | None = None
        self._lock = asyncio.Lock()
        self.closed_because: str | None = None
        self._in_flight: asyncio.Future[Any] | None = None
        # The first operation of a transaction is the one that opens it on the server. Were
        # it abandoned half-way, an abort could overtake it and leave the transaction open.
        # Of a session that somebody else owns, nobody can tell which operation that is.
        self._guarded = transaction or DRIVER.outlives_cancellation
        _channels[id(session)] = self

    @property
    def closed(self) -> bool:
        """Whether the channel takes no further operations."""
        return self.closed_because is not None

    @property
    def usable(self) -> bool:
        """Whether an operation that runs now would be sent."""
        alive = not self.transaction or bool(self.session.in_transaction)
        return not self.closed and self.failure is None and alive

    @property
    def in_transaction(self) -> bool:
        """Whether an operation that runs now would run inside a transaction."""
        return self.transaction or bool(self.session.in_transaction)

    def check_open(self) -> None:
        """Refuse to go on where the scope is over or its transaction is gone.

        Raises:
            ScopeClosedError: If the channel was closed.
            TransactionAbortedError: If an earlier error ended the transaction.
        """
        if self.closed_because is not None:
            raise ScopeClosedError(
                f"This operation came after its session scope: {self.closed_because}. A task "
                "or cursor that began inside the block went on after it, and its writes could "
                "no longer be part of the transaction. Await it before the block ends, or start "
                "it under outside_session()."
            )
        if self.failure is not None:
            raise TransactionAbortedError(
                f"The transaction is gone: {type(self.failure).__name__} in an earlier operation "
                "ended it on the server, although the code caught that error. Let such an error "
                "leave the block, then run the block again."
            ) from self.failure
        if self.transaction and not self.session.in_transaction:
            # The driver would run the operation without a transaction, and it would stay.
            raise TransactionAbortedError(
                "The transaction is over: it was committed or aborted by hand on the driver's "
                "session, inside the block that owns it. Leave the block instead, and open "
                "another with_session() for what comes next."
            )

    async def run(
        self,
        call: Callable[..., Any],
        owner: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = {},
    ) -> Any:
        """Run one call of the driver while no other runs on this session.

        Args:
            call: The driver's method, as a function.
            owner: The object that it is a method of.
            args: Its positional arguments.
            kwargs: Its keyword arguments, the session among them.

        Returns:
            What the driver returns.

        Raises:
            ScopeClosedError: If the channel was closed.
            TransactionAbortedError: If an earlier error ended the transaction.
            TransactionsNotSupportedError: If the server is a standalone one.
        """
        await self._lock.acquire()
        guarded = False
        try:
            if not self.usable:
                self.check_open()
            guarded = self._guarded or (not self.transaction and self.session.in_transaction)
            if not guarded:
                return await call(owner, *args, **kwargs)
        except PyMongoError as error:
            self._note(error)
            raise
        finally:
            if not guarded:
                self._lock.release()
        return await self._run_guarded(call, owner, args, kwargs)

    async def _run_guarded(
        self,
        call: Callable[..., Any],
        owner: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run a call that must come to its end, also when the task that asked is cancelled.

        Until the driver is done the session stays taken, and whoever waits for it, the abort
        too, comes after that.
        """
        try:
            in_flight = asyncio.ensure_future(call(owner, *args, **kwargs))
        except BaseException:
            self._lock.release()
            raise
        self._in_flight = in_flight  # asyncio itself holds its tasks only weakly
        try:
            # The owner of a borrowed session ends its transaction without asking this channel,
            # so there the cancellation of the task has to wait, too.
            return await (settle(in_flight) if self.scope is None else Uncancelled(in_flight))
        except OperationFailure as error:
            refuse_standalone(error)
            raise
        finally:
            if in_flight.done():
                self._landed(in_flight)
            else:
                in_flight.add_done_callback(self._landed)

    def _landed(self, done: asyncio.Future[Any]) -> None:
        self._lock.release()
        self._in_flight = None
        if done.cancelled():
            return
        # Asked also when nobody waits any more: it may have ended the transaction.
        error = done.exception()
        if error is None:
            self._guarded = DRIVER.outlives_cancellation
        elif isinstance(error, PyMongoError):
            self._note(error)

    def _note(self, error: PyMongoError) -> None:
        """Remember an error that ended the transaction on the server."""
        if self.transaction and (
            isinstance(error, OperationFailure)
            or error.has_error_label("TransientTransactionError")
        ):
            self.failure = error

    async def close(self, because: str) -> None:
        """Wait for what is in flight, then take no further operations.

        Args:
            because: How the scope ended, for the message of ``ScopeClosedError``.
        """
        async with self._lock:
            self.closed_because = because


def refuse_standalone(error: OperationFailure) -> None:
    """Say it clearly where the first operation of a transaction met a standalone server."""
    if error.code == ILLEGAL_OPERATION and "Transaction numbers" in str(error):
        raise TransactionsNotSupportedError(
            "This MongoDB server runs no transactions: it is a standalone server. Start it as a "
            "replica set (one node is enough: mongod --replSet rs0, then rs.initiate() once), "
            "or use transaction=False."
        ) from error


def channel_of(session: Session) -> SessionChannel | None:
    """Return the channel that a session already has, or ``None``."""
    channel = _channels.get(id(session))
    return channel if channel is not None and channel.session is session else None


def borrow(session: Session) -> SessionChannel:
    """Return the channel of a session that somebody else owns, opening one if needed."""
    return channel_of(session) or SessionChannel(session)
