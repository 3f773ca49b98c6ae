"""``SessionScope``: the block that ``with_session`` opens, and its controls.

A scope owns a session and its transactions, or has joined the scope that does. Leaving the
block without an exception means committed. Any exception means aborted, and it propagates
unchanged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Literal

from beanie import Document

from .binding import SCOPE, Block, Variable, enclosing, forget, innermost
from .channel import SessionChannel
from .deadline import Deadline
from .drivers import DRIVER, Client, Session
from .errors import PropagationError, ScopeClosedError, ScopeReusedError
from .hooks import DONE, Hook, Hooks, check_hook, run_now
from .memory import Journal, check_documents, read_again
from .observers import OBSERVERS, tell
from .options import ScopeOptions
from .outcome import is_rollback, is_transient
from .state import OUTCOMES, ScopeState, check_move
from .transaction import Transaction
from .waiting import settle


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
        session: Session | None = None,
    ) -> None:
        self.options = options
        self._plan = plan
        self._given = session
        self._block = Block()
        self._client: Client | None = None
        self._variables: list[Variable] = []
        self._channel: SessionChannel | None = None
        self._transaction: Transaction | None = None
        self._joined = False
        self._state = ScopeState.NEW
        # When the block is run again, in seconds; for the forms that do so.
        self._retry_in: float | None = None

    def __await__(self) -> Generator[Any, None, SessionScope]:
        """Return the scope itself, still to be entered."""
        return self
        yield  # makes this a generator, as __await__ must be

    def __repr__(self) -> str:
        """Show the state; no connection string."""
        return f"<{type(self).__name__} {self.state.value}>"

    @property
    def state(self) -> ScopeState:
        """Where the scope is in its life; a joined one follows the scope that it joined."""
        return self._state if self._transaction is None else self._transaction.state

    @property
    def session(self) -> Session | None:
        """The driver's session; ``None`` before the scope is entered."""
        return self._channel.session if self._channel is not None else None

    @property
    def client(self) -> Client | None:
        """The client of the session; ``None`` before the scope is entered."""
        return self._client

    @property
    def has_committed(self) -> bool:
        """Whether a transaction of the scope was committed: all of it again would be too much."""
        return self._transaction is not None and self._transaction.has_committed

    @property
    def hooks(self) -> Hooks:
        """What is to run before the commit, and after the end, of the transaction in force.

        A joined scope has those of its owner. The lists may be changed, as test tools do.

        Raises:
            ScopeClosedError: If the scope is not open.
            PropagationError: If there is no transaction that with_session() owns.
        """
        return self._open_transaction("hooks").hooks

    @property
    def rollback_only(self) -> bool:
        """Whether the transaction can only be rolled back."""
        return self._transaction is not None and self._transaction.rollback_only is not None

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
        transaction = self._open_transaction("set_rollback_only")
        transaction.rollback_only = transaction.rollback_only or reason

    async def commit(self) -> None:
        """Commit what was done so far, and go on with a new transaction in the same scope.

        The hooks of the transaction that ends run, those ``before_commit`` first. Cursors that
        were opened in it are over, and so are writes of documents that other tasks had begun.

        Raises:
            PropagationError: If this scope has joined another one, or another one has joined
                it and is open: only the owner ends a transaction.
            ScopeClosedError: If the scope is not open.
            UnexpectedRollbackError: If the transaction could only be rolled back.
            TransactionAbortedError: If an error that was caught had ended the transaction.
            CommitUnknownError: If the outcome of the commit can't be known.
        """
        transaction = self._own_transaction("commit")
        self._check_context()
        veto = await transaction.run_before_commit()
        if veto is not None:
            if transaction.rollback_only is None:
                transaction.rollback_only = f"a before_commit hook raised {type(veto).__name__}"
            raise veto
        await self._next_transaction("commit")

    async def abort(self) -> None:
        """Take back what was done so far, and go on with a new transaction in the same scope.

        That works, too, after an error of the server that was caught had ended the
        transaction, and in a scope that was rollback-only.

        Raises:
            PropagationError: If this scope has joined another one, or another one has joined
                it and is open: only the owner ends a transaction.
            ScopeClosedError: If the scope is not open.
            TransactionAbortedError: If the transaction was ended by hand.
        """
        await self._next_transaction("abort")

    async def _next_transaction(self, how: Literal["commit", "abort"]) -> None:
        transaction = self._own_transaction(how)
        await transaction.channel.lock.acquire()  # what is in flight ends first
        await self._settle(transaction.next(how))

    def before_commit(self, hook: Hook) -> None:
        """Let a function run before the commit, inside the transaction.

        Args:
            hook: A function without arguments, or a coroutine function. What it raises is a
                veto: the transaction is aborted, and the error leaves the block.

        Raises:
            TypeError: If it can't be called.
            ScopeClosedError: If the scope is not open.
            PropagationError: If there is no transaction that with_session() owns.
        """
        self._open_transaction("before_commit").hooks.before_commit.append(check_hook(hook))

    def on_commit(self, hook: Hook) -> Awaitable[None]:
        """Let a function run after the commit, when the classes are unbound again.

        A joined scope hands it to its owner. With ``transaction=False`` every operation stands
        at once, so the function is run at once.

        Args:
            hook: A function without arguments, or a coroutine function.

        Returns:
            An awaitable, for a coroutine function that is run at once.

        Raises:
            TypeError: If it can't be called.
            ScopeClosedError: If the scope is not open.
            PropagationError: If somebody else owns the transaction.
        """
        if self._is_plain_session():
            return run_now(hook)
        self._open_transaction("on_commit").hooks.after_commit.append(check_hook(hook))
        return DONE

    def on_abort(self, hook: Hook) -> None:
        """Let a function run after the transaction was aborted, as ``on_commit`` does."""
        if self._is_plain_session():
            check_hook(hook)
        else:
            self._open_transaction("on_abort").hooks.after_abort.append(check_hook(hook))

    def track(self, *documents: Document) -> None:
        """Let documents be what they are now, fields and all, should the transaction be aborted.

        Documents that are written in the scope need no tracking for what the writes change;
        this is for what the block itself changes in them before. The documents that they
        link to, where these were fetched, are tracked as well.

        Args:
            documents: The documents.

        Raises:
            TypeError: If one of them is no document.
            ScopeClosedError: If the scope is not open.
            PropagationError: If there is no transaction that with_session() owns.
        """
        check_documents(documents)
        journal = self._open_transaction("track").journal
        for document in documents:
            journal.track(document)

    async def refresh(self, *documents: Document) -> None:
        """Read documents again, as after a ``CommitUnknownError``.

        A document that is not stored becomes what it was before the scope first wrote to it.

        Args:
            documents: The documents; none named means all that the scope wrote or tracks.

        Raises:
            TypeError: If one of them is no document.
        """
        check_documents(documents)
        transaction = self._transaction
        journal = Journal() if transaction is None else transaction.journal
        if transaction is not None and transaction.can_roll_back:
            # What is read now may be taken back.
            for document in documents:
                journal.note(document)
        await read_again(journal, documents)

    def forget(self) -> None:
        """Let the current context forget the scope, once it is over.

        Leaving does that in the context that leaves. This is for a task that entered the scope,
        where another one has left it: the operations of the first run outside by then, but tasks
        that it starts would inherit the bindings of a scope that is over.
        """
        forget([SCOPE, *self._variables])

    # -- entering and leaving --------------------------------------------------------------

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
        self._client, self._variables = self._plan()
        channel = self._joinable(innermost(self._client))
        if channel is None:
            for observer in tuple(OBSERVERS):
                observer.scope_entering(self)
        self._state = check_move(self._state, ScopeState.OPEN)
        if channel is None:
            channel = await self._open()
        else:
            self._join(channel)
        self._channel = channel
        self._block.enter([SCOPE, *self._variables], channel)
        if self._transaction is not None and not self._joined:
            if OBSERVERS:
                tell(lambda observer: observer.scope_entered(self))
            self._transaction.begin()
        return channel.session

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
        if self._given is not None and self._given is not open_channel.session:
            raise PropagationError(
                "session= names another session than the one of the scope that is open on this "
                'client: leave session= out to join that one, or use propagation="requires_new".'
            )
        self.options.check_joinable(
            open_channel.scope.options
            if open_channel.scope is not None
            else ScopeOptions(transaction=bool(open_channel.session.in_transaction))
        )
        return open_channel

    def _join(self, channel: SessionChannel) -> None:
        self._joined = True
        if channel.scope is not None:
            self._transaction = channel.scope._transaction
            assert self._transaction is not None
            self._transaction.joined_by += 1

    async def _open(self) -> SessionChannel:
        options, session = self.options, self._given
        if session is not None and session.in_transaction:
            raise PropagationError(
                "session= names a session that is in a transaction already: end that one first, "
                "or bind the classes to it with bind_session()."
            )
        try:
            if session is None:
                session = await DRIVER.start_session(self._client, **options.session_options())
            if options.transaction:
                await DRIVER.start_transaction(session, **options.transaction_options())
        except BaseException:
            self._state = check_move(self._state, ScopeState.ENDED)
            if session is not None and self._given is None:
                await DRIVER.end_session(session)
            raise
        channel = SessionChannel(session, self, transaction=options.transaction)
        self._transaction = Transaction(
            channel, options, self._deadline, self._will_retry, self._block.restore
        )
        return channel

    def _deadline(self) -> Deadline:
        return Deadline(self.options.timeout)

    def _will_retry(self, error: BaseException) -> bool:
        return False

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
            UnexpectedRollbackError: If the block was left normally, but is rollback-only, or was
                entered in a task that is over and is bound here no longer.
            TransactionAbortedError: If the block was left normally, but an error that it
                caught had ended the transaction.
            CommitUnknownError: If the outcome of the commit can't be known.
            HookError: If a hook failed after the outcome was settled.
        """
        if self._state is not ScopeState.OPEN:
            raise ScopeReusedError("This scope is not open, so it can't be left.")
        left_by = exc
        try:
            return await self._leave(exc)
        except BaseException as error:
            left_by = error
            raise
        finally:
            if self._retry_in is None:  # else that was told when it was decided
                self._tell_left(left_by)

    async def _leave(self, exc: BaseException | None) -> bool:
        quiet = False
        if exc is None:
            self._check_context()
        try:
            if self._joined:
                self._leave_joined(exc)
            else:
                quiet = await self._leave_owned(exc)
        except BaseException as error:
            exc = error
            raise
        finally:
            self._state = check_move(self._state, ScopeState.ENDED)
            self._block.leave()
            if exc is not None and not self._joined:
                tell_enclosing(exc)
        return quiet

    def _check_context(self) -> None:
        """Let the transaction be rolled back where operations of the block may have missed it.

        An asynchronous generator, for one, runs in the context of whoever asks it for its next
        value: where that is a new task each time, what one has entered is not bound in the next.
        """
        transaction = self._transaction
        if transaction is None or not transaction.can_roll_back or transaction.rollback_only:
            return
        if self._block.outlived_its_context():
            transaction.rollback_only = (
                "its block was entered in a task that is over, and left in a context in which it "
                "was never bound, so that operations have run outside it, as in an asynchronous "
                "generator whose steps run in tasks of their own"
            )

    def _tell_left(self, error: BaseException | None) -> None:
        if OBSERVERS and not self._joined:
            tell(lambda observer: observer.scope_left(self, error, self._retry_in))

    def _leave_joined(self, exc: BaseException | None) -> None:
        transaction = self._transaction
        if transaction is not None:
            transaction.joined_by -= 1
            # Not where the owner ends already: this block's operations were refused then.
            if exc is not None and transaction.can_roll_back and not transaction.rollback_only:
                transaction.rollback_only = (
                    f"a block that had joined it failed: {type(exc).__name__}"
                )

    async def _leave_owned(self, exc: BaseException | None) -> bool:
        transaction = self._transaction
        assert transaction is not None
        veto = None
        if exc is None and transaction.hooks.before_commit:
            veto = await transaction.run_before_commit()
        cause = exc or veto
        await self._settle(transaction.finish(cause, end_session=self._given is None), cause)
        # A rollback that did not happen is not quiet: there was nothing to roll back.
        # (OPEN: what is in flight has not ended yet, and the abort comes in the background.)
        aborted = transaction.state in (ScopeState.OPEN, ScopeState.ABORTING, ScopeState.ABORTED)
        if aborted and is_rollback(cause):
            return True
        if veto is not None:
            raise veto
        return False

    async def _settle(
        self, ending: Coroutine[Any, Any, None], cause: BaseException | None = None
    ) -> None:
        """Let a transaction end, in a task that nobody cancels, and wait for it."""
        work = asyncio.get_running_loop().create_task(ending)
        try:
            await settle(work, self.options.cleanup_timeout, bounded=cause is not None)
        finally:
            if not work.done() and self._transaction is not None:
                self._transaction.abandon(cause)

    # -- what its controls need ------------------------------------------------------------

    def _open_transaction(self, wanted_by: str) -> Transaction:
        """Return the transaction that can still be told something."""
        transaction = self._transaction
        if self.state is not ScopeState.OPEN or (transaction and transaction.channel.closed):
            raise ScopeClosedError(
                f"{wanted_by}() came when the scope was {self.state.value}: call it inside the "
                "block."
            )
        if transaction is None or not transaction.channel.transaction:
            raise PropagationError(
                f"{wanted_by}() needs a transaction that with_session() owns, and here is a "
                "plain session, or one that somebody else owns."
            )
        return transaction

    def _own_transaction(self, wanted_by: str) -> Transaction:
        """Return the transaction that this scope may end."""
        transaction = self._transaction
        begins_anew = (  # commit() has failed
            transaction is not None
            and self._state is ScopeState.OPEN
            and transaction.state is ScopeState.ABORTED
            and wanted_by == "abort"
        )
        if transaction is None or not begins_anew:
            transaction = self._open_transaction(wanted_by)
        if self._joined or transaction.joined_by:
            raise PropagationError(
                f"{wanted_by}() would end the transaction of several blocks: one that has joined "
                "the scope is open. Only the owner ends a transaction, after those: let an "
                "error leave the block, or call set_rollback_only()."
            )
        return transaction

    def _is_plain_session(self) -> bool:
        channel = self._channel
        return channel is not None and self.state is ScopeState.OPEN and not channel.in_transaction

    def _is_ending_in_background(self) -> bool:
        transaction = self._transaction
        left = self._state is ScopeState.ENDED
        return left and transaction is not None and transaction.state not in OUTCOMES


def tell_enclosing(error: BaseException) -> None:
    """Let the enclosing scopes know that an error is the outcome of another transaction.

    Its labels say what may be done about that one; run again, they would fail as well.
    """
    for channel in enclosing(past_outside=True) if is_transient(error) else ():
        if channel.scope is not None and channel.scope._transaction is not None:
            channel.scope._transaction.foreign.append(error)
