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
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from pymongo.errors import (
    NotPrimaryError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)

from .drivers import DRIVER, Session
from .errors import (
    CommitUnknownError,
    ScopeClosedError,
    TransactionAbortedError,
    TransactionExpiredError,
    TransactionsNotSupportedError,
)
from .lifetime import Lifetime
from .memory import Journal
from .observers import OBSERVERS, tell
from .waiting import Uncancelled, settle

if TYPE_CHECKING:
    from .scope import SessionScope

TRANSIENT = "TransientTransactionError"
"""The label of an error after which the whole transaction may be run again."""

ILLEGAL_OPERATION = 20
"""The code with which a standalone server answers to a transaction number."""

NEVER_BEGUN = (OperationFailure, NotPrimaryError, ServerSelectionTimeoutError)
"""Errors after which an operation does not begin: refused by the server, or never sent."""

WRITING: ContextVar[tuple[SessionChannel, int] | None] = ContextVar("writing", default=None)
"""The channel and the epoch in which the method began that is writing a document here."""

_channels: WeakValueDictionary[int, SessionChannel] = WeakValueDictionary()


class SessionChannel:
    """One driver session, the lock that belongs to it, and whether it may still be used.

    Args:
        session: The driver's session.
        scope: The scope that owns the session; ``None`` where somebody else does.
        transaction: Whether the scope runs a transaction on the session.

    Attributes:
        epoch: Counts the transactions; a cursor belongs to the one in which it was opened.
        failure: The error that ended the transaction on the server.
        interrupted: Whether no answer came to the operation that opens the transaction, so that
            the server may know more of it than the driver does.
        journal: The documents that the transaction writes, where a scope owns it.
        lifetime: How long the transaction has been open on the server.
        lock: Held for one call of the driver, or for the end of a transaction.
        operations: How many operations the transaction has run.
    """

    __slots__ = (
        "__weakref__",
        "_answered",
        "_guarded",
        "_in_flight",
        "closed_because",
        "epoch",
        "failure",
        "interrupted",
        "journal",
        "lifetime",
        "lock",
        "operations",
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
        self.journal = Journal() if transaction else None
        self.lifetime = Lifetime(session.client)
        # A scope may run on a session that classes are bound to already.
        before = channel_of(session)
        self.lock: asyncio.Lock = asyncio.Lock() if before is None else before.lock
        self.closed_because: str | None = None
        self.epoch = 0
        self._in_flight: asyncio.Future[Any] | None = None
        self.start_transaction()
        _channels[id(session)] = self

    def start_transaction(self) -> None:
        """Forget the transaction that was: the session has none yet, or a new one."""
        self.failure: BaseException | None = None
        self.interrupted = False
        self._answered = False
        self.operations = 0
        self.epoch += 1
        # The first operation of a transaction is the one that opens it on the server. Were
        # it abandoned half-way, an abort could overtake it and leave the transaction open.
        # Of a session that somebody else owns, nobody can tell which operation that is.
        self._guarded = self.transaction or DRIVER.outlives_cancellation

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
        if isinstance(self.failure, CommitUnknownError):
            raise ScopeClosedError(
                "This operation came after a commit() whose outcome is unknown, although the code "
                "caught that error: let it leave the block, and read the data before doing the "
                "work again."
            ) from self.failure
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
            TransactionExpiredError: If the transaction outlived the server's limit.
            TransactionsNotSupportedError: If the server is a standalone one.
        """
        if OBSERVERS and self.lock.locked():
            await self._wait_for_lock()
        else:
            await self.lock.acquire()
        guarded = False
        try:
            if not self.usable:
                self.check_open()
            if (writing := WRITING.get()) is not None:
                self._check_write(*writing)
            self.operations += 1
            guarded = self._guarded or (not self.transaction and self.session.in_transaction)
            if not guarded:
                return await call(owner, *args, **kwargs)
        except PyMongoError as error:
            self._note(error)
            await self.explain(error)
            raise
        finally:
            if not guarded:
                self.lock.release()
        return await self._run_guarded(call, owner, args, kwargs)

    async def _wait_for_lock(self) -> None:
        """Take the lock, and tell how long that took."""
        scope, began = self.scope, time.monotonic()
        await self.lock.acquire()
        waited = time.monotonic() - began
        tell(lambda observer: observer.lock_waited(scope, waited))

    def _check_write(self, channel: SessionChannel, epoch: int) -> None:
        """Refuse to go on with the write of a document in the transaction after its own."""
        if channel is self and epoch != self.epoch:
            raise ScopeClosedError(
                "The transaction in which this write had begun was ended by commit() or abort() in "
                "its block, and a part of the write in each of two transactions would be no "
                "transaction: await the writes of other tasks before you end one."
            )

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
            if self.transaction and not self.lifetime.age:
                self.lifetime.begin()
            in_flight = asyncio.ensure_future(call(owner, *args, **kwargs))
        except BaseException:
            self.lock.release()
            raise
        self._in_flight = in_flight  # asyncio itself holds its tasks only weakly
        try:
            # The owner of a borrowed session ends its transaction without asking this channel,
            # so there the cancellation of the task has to wait, too.
            return await (settle(in_flight) if self.scope is None else Uncancelled(in_flight))
        except OperationFailure as error:
            refuse_standalone(error)
            self._note(error)
            await self.explain(error)
            raise
        finally:
            if in_flight.done():
                self._landed(in_flight)
            else:
                in_flight.add_done_callback(self._landed)

    def _landed(self, done: asyncio.Future[Any]) -> None:
        self.lock.release()
        self._in_flight = None
        if done.cancelled():
            self.interrupted = True
            return
        # Asked also when nobody waits any more: it may have ended the transaction.
        error = done.exception()
        if error is None:
            self._answered = True
            self._guarded = DRIVER.outlives_cancellation
        elif isinstance(error, PyMongoError):
            self._note(error)
            # The server may still be about to open the transaction, after the abort even.
            lost = not self._answered and not isinstance(error, NEVER_BEGUN)
            self.interrupted = self.interrupted or (self.transaction and lost)

    def _note(self, error: PyMongoError) -> None:
        """Remember the error that ended the transaction on the server, the first of all."""
        if self.transaction and self.failure is None and ends_transaction(error):
            self.failure = error

    async def explain(self, error: PyMongoError) -> None:
        """Raise ``TransactionExpiredError`` where an error means just that."""
        try:
            await self.lifetime.check(error)
        except TransactionExpiredError as expired:
            self.failure = expired
            raise

    def close(self, because: str) -> None:
        """Take no further operations; for whoever has seen the lock released.

        Args:
            because: How the scope ended, for the message of ``ScopeClosedError``.
        """
        self.closed_because = because
        self.epoch += 1


def ends_transaction(error: PyMongoError) -> bool:
    """Tell whether an operation's error ends its transaction on the server."""
    return isinstance(error, OperationFailure) or error.has_error_label(TRANSIENT)


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
    channel = channel_of(session)
    if channel is None or (channel.closed and not session.has_ended):
        channel = SessionChannel(session)
    return channel
