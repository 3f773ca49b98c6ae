"""The transactions of one scope, from their start to their outcome.

A scope runs one transaction, or, with ``commit()`` and ``abort()``, one after the other. What
ends one runs in a task of its own, which no cancellation of the task that asked for it
reaches: that one waits, for a bounded time, and takes its cancellation afterwards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

from pymongo.errors import PyMongoError

from .binding import enclosing
from .channel import SessionChannel
from .deadline import Deadline
from .drivers import DRIVER
from .errors import (
    CommitUnknownError,
    HookError,
    SessionScopeError,
    TransactionAbortedError,
    UnexpectedRollbackError,
)
from .hooks import Hook, Hooks, failures, run_all
from .log import log, logger
from .memory import Journal
from .observers import OBSERVERS, tell
from .options import ScopeOptions
from .outcome import abort, commit, is_rollback
from .state import OUTCOMES, ScopeState, check_move
from .waiting import insist

SLOW = 10.0
"""How long a transaction may be open before that is reported, in seconds."""


class Transaction:
    """The transaction that a scope owns; with ``transaction=False``, its plain session.

    Args:
        channel: The way to the session.
        options: The options of the scope.
        deadline: Makes the moment up to which a commit of unknown outcome is tried again.
        will_retry: Tells whether the scope's block is run again after an error.
        unbind: Restores, in the current context, what was bound before the scope.

    Attributes:
        abandoned: Whether nobody waits for the end any longer, so that documents, which may
            be in use again, are left alone.
        failure: The error that had ended the transaction, when it is over.
        foreign: Errors of other transactions that came through: no reason to retry this one.
        has_committed: Whether something is stored, which must not be done a second time.
        hooks: What is to run before the commit and after the end.
        journal: The documents that were written or are tracked, as they were.
        joined_by: How many blocks that joined are open.
        rollback_only: Why it can only be rolled back; ``None`` where it need not be.
        state: Where it is in its life.
    """

    __slots__ = (
        "_began",
        "_deadline",
        "_unbind",
        "_will_retry",
        "abandoned",
        "channel",
        "failure",
        "foreign",
        "has_committed",
        "hooks",
        "joined_by",
        "journal",
        "options",
        "rollback_only",
        "session",
        "state",
    )

    def __init__(
        self,
        channel: SessionChannel,
        options: ScopeOptions,
        deadline: Callable[[], Deadline],
        will_retry: Callable[[BaseException], bool],
        unbind: Callable[[], None],
    ) -> None:
        self.channel = channel
        self.session = channel.session
        self.options = options
        self.journal = Journal() if channel.journal is None else channel.journal
        self.hooks = Hooks()
        self.failure: BaseException | None = None
        self.rollback_only: str | None = None
        self.state = ScopeState.OPEN
        self.abandoned = False
        self.has_committed = False
        self.joined_by = 0
        self.foreign: list[BaseException] = []
        self._deadline = deadline
        self._will_retry = will_retry
        self._unbind = unbind

    def begin(self) -> None:
        """Say that a transaction has begun."""
        self._began = time.monotonic()
        log(logging.DEBUG, "begin", "A %s has begun", self._kind)
        if OBSERVERS and self.channel.transaction and (scope := self.channel.scope) is not None:
            tell(lambda observer: observer.transaction_started(scope))

    @property
    def _kind(self) -> str:
        return "transaction" if self.channel.transaction else "session without a transaction"

    @property
    def can_roll_back(self) -> bool:
        """Whether its outcome is still open."""
        return self.channel.transaction and not self.channel.closed

    def refusal(self) -> SessionScopeError | None:
        """Return what to raise where leaving normally would wrongly mean committed."""
        failure = self.channel.failure
        if self.rollback_only is not None:
            return UnexpectedRollbackError(
                f"The transaction was rolled back, because {self.rollback_only}. The block was "
                "left normally, which would have meant committed: let the error leave the "
                "block, or raise Rollback to say that nothing should stay."
            )
        if failure is not None:
            return TransactionAbortedError(
                f"The transaction was rolled back: {type(failure).__name__} in one of its "
                "operations had ended it on the server, although the code caught that error. "
                "Let such an error leave the block, then run the block again."
            )
        if not self.channel.transaction:
            return UnexpectedRollbackError(
                "A transaction was rolled back that had been started by hand on the session of "
                "a scope with transaction=False, and was still open: commit it inside the "
                "block, or leave transaction=False out."
            )
        return None

    def _caught(self) -> SessionScopeError:
        """Return what to raise where a commit() in the block has failed, and that was caught."""
        if self.state is ScopeState.UNKNOWN:
            return CommitUnknownError(
                "The outcome of a commit() in this block is unknown, although the code caught "
                "that error. Read the data before doing the work again: it may be there.",
                self.journal.documents,
            )
        return self.refusal() or TransactionAbortedError(
            "The transaction is over: commit() had failed, although the code caught its error. "
            "Let such an error leave the block, then run the block again."
        )

    async def run_before_commit(self) -> BaseException | None:
        """Run the hooks that may veto, where a commit is due.

        Returns:
            The veto, or ``None``.
        """
        due = self.state is ScopeState.OPEN and self.session.in_transaction
        if due and self.refusal() is None:
            try:
                await self.hooks.run_before_commit()
            except BaseException as veto:
                return veto
        return None

    async def finish(self, exc: BaseException | None, *, end_session: bool) -> None:
        """End the last transaction, then the session; runs in a task of its own.

        Args:
            exc: What left the block; ``None`` where it was left normally.
            end_session: Whether the session belongs to the scope.

        Raises:
            SessionScopeError: What leaving the scope normally raises where nothing was committed,
                or a hook failed.
            PyMongoError: If the server refused the commit.
        """
        channel, bound = self.channel, self.options.cleanup_timeout
        because = "it was left" if exc is None else f"{type(exc).__name__} ended it"
        failure: BaseException | None = None
        try:
            if channel.lock.locked():
                await insist(channel.lock.acquire, bound)  # what is in flight ends first
                channel.lock.release()
            channel.close(because)
            await self._conclude(exc)
        except BaseException as error:
            failure = error
        self.failure = channel.failure
        channel.lifetime.end()
        if end_session:
            await insist(lambda: DRIVER.end_session(self.session), bound)
        # A task that inherited the channel must not keep documents, nor an error's frames do so.
        channel.scope = channel.journal = channel.failure = None
        if self.hooks:
            await self._run_hooks(self.hooks, failure or exc)
        if failure is not None:
            raise failure

    async def _conclude(self, exc: BaseException | None) -> None:
        """Commit or abort: from here on nothing changes the outcome any more."""
        if self.state is not ScopeState.OPEN:
            # A commit() in the block has failed, and ended the scope's last transaction.
            if exc is None:
                raise self._caught() from self.channel.failure
        elif not self.session.in_transaction:
            self._move(ScopeState.ENDED, exc)
            if exc is not None and self._will_retry(exc):
                self._rewind()
        elif exc is not None:
            await self._abort(exc)
        elif (refusal := self.refusal()) is None:
            await self._commit()
        else:
            await self._abort(refusal)
            raise refusal from self.channel.failure

    async def _commit(self) -> None:
        channel = self.channel
        self._move(ScopeState.COMMITTING)
        try:
            await commit(channel, self._deadline(), self.options.cleanup_timeout)
        except CommitUnknownError as error:
            error.documents = self.journal.documents
            self._move(ScopeState.UNKNOWN, error)
            raise
        except BaseException as error:
            self._rewind()
            self._move(ScopeState.ABORTED, error)
            if isinstance(error, PyMongoError):
                await channel.explain(error)
            raise
        self._move(ScopeState.COMMITTED)
        self.journal.commit()
        self.has_committed = True
        # What is stored now is what an enclosing transaction goes back to.
        for outer in enclosing(past_outside=True) if len(self.journal) else ():
            if outer is not channel and outer.journal is not None:
                outer.journal.renew(self.journal.written)

    async def _abort(self, error: BaseException | None = None) -> None:
        self._move(ScopeState.ABORTING)
        self._rewind()
        await abort(self.channel, self.options.cleanup_timeout)
        self._move(ScopeState.ABORTED, error)

    def _rewind(self) -> None:
        if not self.abandoned:
            self.journal.rewind()

    def abandon(self, exc: BaseException | None) -> None:
        """Wait no longer for the end: an abort, if there was reason for one, is still to come."""
        if exc is not None:
            self._rewind()
        self.abandoned = True

    async def next(self, how: Literal["commit", "abort"]) -> None:
        """End the transaction and start another one; runs in a task of its own.

        The lock of the channel is held by the caller, and released here.

        Raises:
            SessionScopeError: If nothing was committed, or a hook failed.
            PyMongoError: If the server refused the commit.
        """
        channel = self.channel
        hooks, self.hooks = self.hooks, Hooks()
        try:
            if channel.closed:
                channel.check_open()
            await self._end(how)
            outcome = self.state
            channel.lifetime.end()
            await DRIVER.start_transaction(self.session, **self.options.transaction_options())
            self.journal.start_anew()
            self.rollback_only = None
            channel.start_transaction()
            self._move(ScopeState.OPEN)
            self.begin()
        except BaseException as error:
            if self.state is not ScopeState.OPEN:
                channel.failure = error
            self.hooks = hooks  # for abort(), or the end of the block
            raise
        finally:
            channel.lock.release()
        if hooks:
            await self._run_hooks(hooks, None, outcome)

    async def _end(self, how: Literal["commit", "abort"]) -> None:
        if how == "commit":
            self.channel.check_open()
            await self._conclude(None)
        elif self.state is ScopeState.OPEN:
            if not self.session.in_transaction:
                self.channel.check_open()
            await self._abort()

    async def _run_hooks(
        self, hooks: Hooks, error: BaseException | None, outcome: ScopeState | None = None
    ) -> None:
        """Run what was to run after this outcome, where the classes are unbound."""
        committed = (outcome or self.state) is ScopeState.COMMITTED
        if committed:
            due = hooks.after_commit
        elif (outcome or self.state) is ScopeState.ABORTED:
            due = hooks.after_abort
        else:
            due = []
        if not due or (error is not None and self._will_retry(error)):
            return
        self._unbind()
        await self._run_all(due, committed, quietly=error is not None and not is_rollback(error))

    async def run_abort_hooks(self) -> None:
        """Run the hooks of an attempt that was to be run again, and then was not."""
        await self._run_all(self.hooks.after_abort, committed=False, quietly=True)

    @staticmethod
    async def _run_all(due: list[Hook], committed: bool, quietly: bool) -> None:
        errors = await run_all(due)
        if not errors:
            return
        which, name = ("committed", "on_commit") if committed else ("aborted", "on_abort")
        if not quietly:
            raise HookError(
                f"The transaction was {which}, and then {len(errors)} of its {len(due)} {name} "
                f"hooks failed: {failures(errors)}. Don't run the transaction again: mend what "
                "the hooks were to do.",
                committed,
                errors,
            ) from errors[0]
        # What left the block is what the caller must see.
        log(
            logging.ERROR,
            "hooks.failed",
            "Hooks failed after a transaction was %s: %s",
            which,
            failures(errors),
            errors=len(errors),
        )

    def _move(self, state: ScopeState, error: BaseException | None = None) -> None:
        self.state = check_move(self.state, state)
        if state not in OUTCOMES:
            return
        duration = time.monotonic() - self._began
        if state is not ScopeState.ENDED:
            self._log_outcome(state.value, duration)
        if OBSERVERS and self.channel.transaction:
            self._tell_outcome(state, duration, error)

    def _tell_outcome(
        self, outcome: ScopeState, duration: float, error: BaseException | None
    ) -> None:
        scope, operations = self.channel.scope, self.channel.operations
        if scope is not None:
            tell(lambda o: o.transaction_ended(scope, outcome, duration, operations, error))

    def _log_outcome(self, outcome: str, duration: float) -> None:
        warn = duration >= SLOW or outcome == "unknown"
        level = logging.WARNING if warn else logging.DEBUG
        if not logger.isEnabledFor(level):
            return
        log(
            level,
            outcome,
            "A transaction took %.3f s (%d operations), and its outcome is: %s",
            duration,
            self.channel.operations,
            outcome,
            outcome=outcome,
            duration=duration,
            operations=self.channel.operations,
            documents=len(self.journal),
        )
