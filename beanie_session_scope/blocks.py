"""The blocks that bind classes: ``with_session``, ``bind_session`` and ``outside_session``."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

from .binding import SCOPE, Block, innermost, put_outside, resolve
from .channel import borrow
from .drivers import Client, Session
from .errors import PropagationError
from .hooks import Hook, check_hook, run_now
from .mixin import SessionScopeMixin, check_session, models
from .options import Propagation, ScopeOptions
from .plan import Models, check_model, check_models, plan
from .scope import SessionScope
from .waiting import BOUND


def with_session(
    client: Client | None = None,
    collections: Models | None = None,
    *,
    propagation: Propagation = "required",
    transaction: bool = True,
    read_concern: Any = None,
    write_concern: Any = None,
    read_preference: Any = None,
    max_commit_time_ms: int | None = None,
    causal_consistency: bool | None = None,
    snapshot: bool = False,
    timeout: float = 120.0,
    cleanup_timeout: float = BOUND,
) -> SessionScope:
    """Open a session and a transaction in which every operation of some classes runs.

    Leaving the block normally commits; any exception aborts, and propagates. ``raise
    Rollback`` aborts quietly. Nothing is sent to the server on entry.

    Args:
        client: The client: Motor's ``AsyncIOMotorClient`` with Beanie 1.x, PyMongo's
            ``AsyncMongoClient`` with 2.x. Left out, it is the client of ``collections``.
        collections: The classes to bind. Each is bound together with every other class with
            the mixin that is stored in the same MongoDB collection or linked from it.
            ``None`` binds all that are initialised on the client; ``[]`` binds none.
        propagation: ``"required"`` joins the innermost open scope on the same client in this
            context, or starts one; ``"requires_new"`` starts an independent one;
            ``"mandatory"`` raises where there is none to join; ``"never"`` raises where there
            is one. A joined block neither commits nor aborts; if it fails, the scope that it
            joined can only be rolled back.
        transaction: ``False`` opens a session without a transaction.
        read_concern: ``pymongo.read_concern.ReadConcern`` of the transaction.
        write_concern: ``pymongo.write_concern.WriteConcern`` of the transaction.
        read_preference: Of the transaction; MongoDB allows only the primary, the default here.
        max_commit_time_ms: How long the commit may run on the server, in milliseconds.
        causal_consistency: Of the session; the driver's default is ``True``.
        snapshot: Whether all reads see one point in time; needs ``transaction=False``.
        timeout: How long a commit whose outcome is unknown is tried again, in seconds.
        cleanup_timeout: How long the block's end waits for a server that does not answer, where
            an exception leaves the block or the task is cancelled, in seconds. Past it the
            clean-up goes on in the background.

    Returns:
        A scope, to be entered once with ``async with``; entering it gives the driver's
        session. All that these arguments can be refused for is refused then or before,
        with nothing bound:

    Raises:
        ModelNotScopedError: If something in ``collections`` is no class with the mixin.
        ModelNotInitializedError: If ``init_beanie`` has not initialised one of them.
        ClientMismatchError: If one of them belongs to another client, or no client is given
            and none can be told from them.
        NotAClientError: If ``client`` is no client of the driver that Beanie uses.
        PropagationError: If ``propagation`` forbids it, or the scope to join runs with
            other options.
        ValueError: If two options exclude each other.
    """
    options = ScopeOptions(
        propagation=propagation,
        transaction=transaction,
        read_concern=read_concern,
        write_concern=write_concern,
        read_preference=read_preference,
        max_commit_time_ms=max_commit_time_ms,
        causal_consistency=causal_consistency,
        snapshot=snapshot,
        timeout=timeout,
        cleanup_timeout=cleanup_timeout,
    )
    named = None if collections is None else check_models(collections)
    return SessionScope(lambda: plan(client, named), options)


@contextmanager
def bind_session(session: Session, collections: Models | None = None) -> Iterator[Session]:
    """Bind classes to a session that somebody else owns, for the length of a block.

    The session is neither committed, aborted nor ended here. Beanie's migrations, for one,
    hand such a session in.

    Args:
        session: A session of the driver that Beanie uses.
        collections: As for ``with_session``.

    Yields:
        The session.

    Raises:
        NotAClientError: If ``session`` is no session of that driver.
        SessionScopeError: As ``with_session`` raises for ``collections``.
    """
    named = None if collections is None else check_models(collections)
    _, variables = plan(check_session(session).client, named)
    block = Block()
    block.enter([SCOPE, *variables], borrow(session))
    try:
        yield session
    finally:
        block.leave()


@contextmanager
def outside_session(*classes: type[SessionScopeMixin]) -> Iterator[None]:
    """Run classes outside any scope for the length of a block, also in tasks created there.

    Args:
        classes: The classes, each with its subclasses; none named means all, and that no
            scope is in force.

    Raises:
        ModelNotScopedError: If one of them is no class with the mixin.
    """
    named = tuple(check_models(classes))
    outside = [m._scope_variable for m in models() if not named or issubclass(m, named)]
    block = Block()
    block.enter(outside if named else [SCOPE, *outside], None)
    try:
        yield
    finally:
        block.leave()


def current_scope(model: type[SessionScopeMixin] | None = None) -> SessionScope | None:
    """Return the scope in force here and now.

    Args:
        model: A class with the mixin: the scope that its operations run in. Left out, the
            innermost open scope.

    Returns:
        The scope that owns the session, or ``None``: there is no scope, or the session was
        bound by hand.

    Raises:
        ModelNotScopedError: If ``model`` is no class with the mixin.
        ScopeClosedError: If ``model`` is bound to a scope that is over.
    """
    if model is None:
        channel = innermost()
    else:
        channel = resolve(check_model(model)._scope_variables)
    return None if channel is None else channel.scope


def is_outside(model: type[SessionScopeMixin]) -> bool:
    """Tell whether a class was put outside any scope on purpose.

    That is done by ``outside_session``, and by ``clear_session()`` inside a scope.

    Args:
        model: A class with the mixin.

    Returns:
        ``False`` also where the class is in no scope because none binds it.

    Raises:
        ModelNotScopedError: If ``model`` is no class with the mixin.
    """
    return put_outside(check_model(model)._scope_variables)


def on_commit(hook: Hook) -> Awaitable[None]:
    """Let a function run after the transaction in force was committed, and the classes unbound.

    Hooks run in the order in which they were registered, all of them. Outside any scope, or in
    one with ``transaction=False``, the function is run at once: a coroutine function in a task,
    which the awaitable that is returned waits for.

    Args:
        hook: A function without arguments, or a coroutine function.

    Returns:
        An awaitable; it need not be awaited.

    Raises:
        TypeError: If it can't be called.
        PropagationError: If the transaction in force was not opened by ``with_session()``.
    """
    scope = _hooked_scope("on_commit")
    return run_now(hook) if scope is None else scope.on_commit(hook)


def on_abort(hook: Hook) -> None:
    """Let a function run after the transaction in force was aborted, and the classes unbound.

    Outside any scope nothing can be aborted, and the function is not run.

    Args:
        hook: A function without arguments, or a coroutine function.

    Raises:
        TypeError: If it can't be called.
        PropagationError: If the transaction in force was not opened by ``with_session()``.
    """
    scope = _hooked_scope("on_abort")
    if scope is None:
        check_hook(hook)
    else:
        scope.on_abort(hook)


def _hooked_scope(wanted_by: str) -> SessionScope | None:
    channel = resolve((SCOPE,))
    if channel is not None and channel.closed:
        channel.check_open()  # the outcome may be known: a hook would never hear of it
    if channel is None or (channel.scope is None and not channel.in_transaction):
        return None
    if channel.scope is None:
        raise PropagationError(
            f"{wanted_by}() needs a transaction that with_session() owns, to be told how it ends, "
            "and somebody else owns the session here: do it where that one commits."
        )
    return channel.scope
