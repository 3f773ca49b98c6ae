"""One session scope: the life of a session and its transaction, from entry to exit.

A scope moves through the states of ``ScopeState``, and only along ``TRANSITIONS``::

    NEW -> OPEN -> COMMITTING -> COMMITTED
                       |------> ABORTED      the server refused the commit
                       |------> UNKNOWN      the outcome can't be known
                -> ABORTING  -> ABORTED
                -> ENDED                     no transaction, or one that was ended by hand

Leaving the block without an exception means committed. Any exception means aborted, and
it propagates unchanged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from enum import Enum
from itertools import count
from random import random
from types import TracebackType
from typing import Any

from pymongo.errors import OperationFailure, PyMongoError

from .binding import SCOPE, Block, Variable, innermost
from .channel import SessionChannel
from .drivers import DRIVER, Client, Session
from .errors import (
    CommitUnknownError,
    PropagationError,
    Rollback,
    ScopeClosedError,
    ScopeReusedError,
    SessionScopeError,
    TransactionAbortedError,
    UnexpectedRollbackError,
)
from .options import ScopeOptions
from .waiting import logger, nameof, settle

UNKNOWN_COMMIT = "UnknownTransactionCommitResult"
MAX_TIME_MS_EXPIRED = 50


class ScopeState(Enum):
    """Where a scope is in its life."""

    NEW = "new"
    OPEN = "open"
    COMMITTING = "committing"
    COMMITTED = "committed"
    ABORTING = "aborting"
    ABORTED = "aborted"
    UNKNOWN = "unknown"
    ENDED = "ended"


TRANSITIONS: dict[ScopeState, frozenset[ScopeState]] = {
    ScopeState.NEW: frozenset({ScopeState.OPEN}),
    ScopeState.OPEN: frozenset({ScopeState.COMMITTING, ScopeState.ABORTING, ScopeState.ENDED}),
    ScopeState.COMMITTING: frozenset(
        {ScopeState.COMMITTED, ScopeState.ABORTED, ScopeState.UNKNOWN}
    ),
    ScopeState.ABORTING: frozenset({ScopeState.ABORTED}),
    ScopeState.COMMITTED: frozenset(),
    ScopeState.ABORTED: frozenset(),
    ScopeState.UNKNOWN: frozenset(),
    ScopeState.ENDED: frozenset(),
}


class SessionScope:
    """What ``with_session`` returns: an asynchronous context manager, to be entered once.

    Entering it gives the driver's session. ``async with await with_session(...)`` works too.

    Attributes:
        options: The options that it was made with.
    """

    def __init__(
        self,
        plan: Callable[[], tuple[Client, list[Variable]]],
        options: ScopeOptions,
    ) -> None:
        self.options = options
        self._plan = plan
        self._state = ScopeState.NEW
        self._block = Block()
        self._client: Client | None = None
        self._channel: SessionChannel | None = None
        self._owner: SessionScope | None = None
        self._joined = False
        self._rollback_only: str | None = None

    def __await__(self) -> Generator[Any, None, SessionScope]:
        """Return the scope itself, still to be entered."""
        return self
        yield  # makes this a generator, as __await__ must be

    def __repr__(self) -> str:
        """Show the state; no connection string."""
        return f"<SessionScope {self.state.value}>"

    @property
    def state(self) -> ScopeState:
        """Where the scope is in its life; a joined one follows the scope that it joined."""
        return self._owner.state if self._owner is not None else self._state

    @property
    def session(self) -> Session | None:
        """The driver's session; ``None`` before the scope is entered."""
        return self._channel.session if self._channel is not None else None

    @property
    def client(self) -> Client | None:
        """The client of the session; ``None`` before the scope is entered."""
        return self._client

    @property
    def rollback_only(self) -> bool:
        """Whether the transaction can only be rolled back."""
        owner = self._owner or self
        return owner._rollback_only is not None

    def set_rollback_only(self, reason: str) -> None:
        """Let the transaction end in a rollback, however the block is left.

        Args:
            reason: Why, for the message of the ``UnexpectedRollbackError`` that leaving the
                block without an exception then raises.

        Raises:
            ScopeClosedError: If the scope is not open, so that nothing can be changed.
            PropagationError: If there is no transaction that this scope, or the one that it
                joined, could roll back.
        """
        owner = self._owner or self
        if owner._state is not ScopeState.OPEN or (owner._channel and owner._channel.closed):
            raise ScopeClosedError(
                f"set_rollback_only() came when the scope was {owner._state.value}: call it "
                "inside the block."
            )
        if owner._channel is None or not owner._channel.transaction:
            raise PropagationError(
                "set_rollback_only() needs a transaction that with_session() owns, and here is "
                "a plain session, or one that somebody else owns: raise an error instead."
            )
        owner._rollback_only = owner._rollback_only or reason

    async def __aenter__(self) -> Session:
        """Open or join a scope and bind the classes.

        Returns:
            The driver's session.
        """
        if self._state is not ScopeState.NEW:
            raise ScopeReusedError(
                "This scope was entered before, and a scope is entered once: call "
                "with_session() again for another transaction."
            )
        self._client, variables = self._plan()
        outer = self._joinable(innermost(self._client))
        self._move(ScopeState.OPEN)
        if outer is None:
            try:
                self._channel = await self._open()
            except BaseException:
                self._move(ScopeState.ENDED)
                raise
        else:
            self._channel, self._owner, self._joined = outer, outer.scope, True
        self._block.enter([SCOPE, *variables], self._channel)
        return self._channel.session

    def _joinable(self, open_channel: SessionChannel | None) -> SessionChannel | None:
        """Return the channel to join, or ``None`` where this scope starts its own."""
        how = self.options.propagation
        if how == "mandatory" and open_channel is None:
            raise PropagationError(
                'propagation="mandatory" joins an open scope, and none is open on this client '
                "here: open one around this call."
            )
        if how == "never" and open_channel is not None:
            raise PropagationError(
                'propagation="never" refuses to run inside a scope, and one is open on this '
                'client: call it outside, or use propagation="requires_new".'
            )
        if how == "requires_new" or open_channel is None:
            return None
        self.options.check_joinable(
            open_channel.scope.options
            if open_channel.scope is not None
            else ScopeOptions(transaction=bool(open_channel.session.in_transaction))
        )
        return open_channel

    async def _open(self) -> SessionChannel:
        options = self.options
        session = await DRIVER.start_session(self._client, **options.session_options())
        if options.transaction:
            try:
                await DRIVER.start_transaction(session, **options.transaction_options())
            except BaseException:
                await DRIVER.end_session(session)
                raise
        return SessionChannel(session, self, transaction=options.transaction)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> bool:
        """Commit or abort, end the session, and restore every binding.

        Returns:
            ``True`` where the owner of the transaction is left by ``Rollback``.

        Raises:
            UnexpectedRollbackError: If the block was left normally, but is rollback-only.
            TransactionAbortedError: If the block was left normally, but an error that it
                caught had ended the transaction.
            CommitUnknownError: If the outcome of the commit can't be known.
        """
        if self._state is not ScopeState.OPEN:
            raise ScopeReusedError("This scope is not open, so it can't be left.")
        try:
            if self._joined:
                self._leave_joined(exc)
                return False
            await settle(asyncio.ensure_future(self._finish(exc)))
            # A rollback that did not happen is not quiet: there was nothing to roll back.
            return self.state is ScopeState.ABORTED and is_rollback(exc)
        finally:
            self._block.leave()

    def _leave_joined(self, exc: BaseException | None) -> None:
        self._move(ScopeState.ENDED)
        owner = self._owner
        # Not where the owner ends already: this block's operations were refused then.
        if exc is not None and owner is not None and owner._may_roll_back():
            owner.set_rollback_only(f"a block that had joined it failed: {type(exc).__name__}")

    def _may_roll_back(self) -> bool:
        channel = self._channel
        return channel is not None and channel.transaction and not channel.closed

    async def _finish(self, exc: BaseException | None) -> None:
        """End the transaction and the session, in a task that nobody cancels."""
        channel = self._channel
        assert channel is not None
        await channel.close("it was left" if exc is None else f"{type(exc).__name__} ended it")
        # From here on nothing changes the outcome any more.
        try:
            if not channel.session.in_transaction:
                self._move(ScopeState.ENDED)
            elif exc is None and channel.transaction and self._silent_rollback() is None:
                await self._commit(channel.session)
            else:
                await self._abort(channel.session)
        finally:
            await DRIVER.end_session(channel.session)
        if exc is None and self._state is ScopeState.ABORTED:
            error = self._silent_rollback()
            assert error is not None
            raise error from channel.failure

    def _silent_rollback(self) -> SessionScopeError | None:
        """Return what to raise where leaving normally would wrongly mean committed."""
        channel = self._channel
        assert channel is not None
        if self._rollback_only is not None:
            return UnexpectedRollbackError(
                f"The transaction was rolled back, because {self._rollback_only}. The block was "
                "left normally, which would have meant committed: let the error leave the "
                "block, or raise Rollback to say that nothing should stay."
            )
        if channel.failure is not None:
            return TransactionAbortedError(
                f"The transaction was rolled back: {type(channel.failure).__name__} in one of "
                "its operations had ended it on the server, although the code caught that "
                "error. Let such an error leave the block, then run the block again."
            )
        if not channel.transaction:
            return UnexpectedRollbackError(
                "A transaction was rolled back that had been started by hand on the session of "
                "a scope with transaction=False, and was still open: commit it inside the "
                "block, or leave transaction=False out."
            )
        return None

    async def _commit(self, session: Session) -> None:
        """Commit; again while the outcome is unknown (transactions specification)."""
        self._move(ScopeState.COMMITTING)
        deadline = time.monotonic() + self.options.timeout
        for attempt in count():
            try:
                await session.commit_transaction()
            except PyMongoError as error:
                if not error.has_error_label(UNKNOWN_COMMIT):
                    self._move(ScopeState.ABORTED)
                    raise
                if _out_of_time(error) or time.monotonic() >= deadline:
                    self._move(ScopeState.UNKNOWN)
                    raise CommitUnknownError(
                        "The commit was sent, and no answer says whether it was applied. Read "
                        "the data before doing the work again: it may be there."
                    ) from error
                await asyncio.sleep(random() * min(0.005 * 1.5**attempt, 0.5))
            else:
                self._move(ScopeState.COMMITTED)
                return

    async def _abort(self, session: Session) -> None:
        self._move(ScopeState.ABORTING)
        try:
            await session.abort_transaction()
        except PyMongoError as error:
            # The server aborts by itself what it is not told to commit, and what the user
            # must see is the exception that left the block.
            logger.warning("Aborting a transaction failed: %s", nameof(error))
        self._move(ScopeState.ABORTED)

    def _move(self, state: ScopeState) -> None:
        if state not in TRANSITIONS[self._state]:
            raise RuntimeError(f"A scope can't go from {self._state.value} to {state.value}.")
        self._state = state


def is_rollback(exc: BaseException | None) -> bool:
    """Tell whether an exception is a ``Rollback``, or a group of nothing else."""
    inner = getattr(exc, "exceptions", ())
    return isinstance(exc, Rollback) or (bool(inner) and all(map(is_rollback, inner)))


def _out_of_time(error: PyMongoError) -> bool:
    """Tell whether the commit ran into its own ``max_commit_time_ms``."""
    return isinstance(error, OperationFailure) and error.code == MAX_TIME_MS_EXPIRED
