"""The blocks that bind classes: ``with_session``, ``bind_session`` and ``outside_session``.

Which classes does a block bind? Those that are named, and with them every class with the
mixin that

* is stored in the same MongoDB collection (parents, siblings, union members), because it
  can write the same documents, and outside the transaction that would block until the
  server ends the transaction; or
* is a subclass, because binding a parent binds it; or
* is a view of one of these collections, because it would not see what the scope wrote; or
* is linked from one of them, because Beanie follows links on its own (``Link.fetch``,
  ``fetch_links``, ``link_rule``) and passes no session along.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from .binding import SCOPE, Block, Variable, innermost, resolve
from .channel import borrow
from .drivers import DRIVER, Client, Session
from .errors import (
    ClientMismatchError,
    ModelNotInitializedError,
    ModelNotScopedError,
    NotAClientError,
)
from .mixin import (
    SessionScopeMixin,
    check_session,
    fingerprint,
    linked_classes,
    models,
    plain_collection,
    view_source,
)
from .scope import Propagation, ScopeOptions, SessionScope

Models = Iterable[type[SessionScopeMixin]]
_Planned: TypeAlias = "tuple[Client, list[Variable]]"


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
        (model,) = check_models([model])
        channel = resolve(model._scope_variables)
    return None if channel is None else channel.scope


def check_models(collections: Models) -> list[type[SessionScopeMixin]]:
    """Return the classes as a list.

    Raises:
        ModelNotScopedError: If something among them is no class with the mixin.
    """
    if isinstance(collections, (str, type)) or not isinstance(collections, Iterable):
        raise ModelNotScopedError(
            f"collections must be an iterable of classes, and is {_describe(collections)}: "
            "write collections=[Bike]."
        )
    named = list(collections)
    for model in named:
        if not isinstance(model, type):
            raise ModelNotScopedError(
                f"collections must hold classes, and holds {_describe(model)}: name the class "
                "itself, as in collections=[Bike]."
            )
        if not issubclass(model, SessionScopeMixin):
            raise ModelNotScopedError(
                f"{model.__name__} has no SessionScopeMixin, so it can't be bound to a session: "
                f"declare it as class {model.__name__}(SessionScopeMixin, Document)."
            )
    return named


def _describe(thing: object) -> str:
    # Never its repr: that of a document shows what is in it.
    return thing.__name__ if isinstance(thing, type) else f"a {type(thing).__name__} object"


def plan(client: Client | None, named: list[type[SessionScopeMixin]] | None) -> _Planned:
    """Decide on the client of a scope and the variables that it binds.

    Args:
        client: The client, where one was given.
        named: The classes, where any were named.

    Returns:
        The client, and the variables of every class to bind.
    """
    if client is not None and not isinstance(client, DRIVER.client_class):
        raise NotAClientError(
            f"client must be a {DRIVER.client_class.__name__} of {DRIVER.name}, the driver that "
            f"the installed Beanie uses, and is {_describe(client)}."
        )
    every = list(dict.fromkeys([*models(), *(named or ())]))
    now = fingerprint(every)
    if now is None:
        return _plan(client, named, every)
    if len(now) != len(_planned_for) or not all(map(operator.is_, now, _planned_for)):
        _plans.clear()
        _planned_for[:] = now
    key = (id(client), None if named is None else tuple(named))
    if key not in _plans:
        _plans[key] = _plan(client, named, every)
    return _plans[key]


# Planning looks at every class. What was planned holds until a class comes or goes, or is
# initialised anew. (A client that is gone can't lend its id to another one meanwhile: the
# plan refers to it.)
_plans: dict[tuple[int, tuple[type[SessionScopeMixin], ...] | None], _Planned] = {}
_planned_for: list[object] = []


def _plan(
    client: Client | None,
    named: list[type[SessionScopeMixin]] | None,
    every: list[type[SessionScopeMixin]],
) -> _Planned:
    stored = {m: c for m in every if (c := plain_collection(m)) is not None}
    for model in named or ():
        if model not in stored:
            raise ModelNotInitializedError(
                f"{model.__name__} is not initialised: list it in document_models of "
                "init_beanie(), and await that before the scope is entered."
            )
    wanted = list(stored) if named is None else named
    client = _only_client(client, {m: stored[m].database.client for m in wanted}, named is None)
    here = {m: _namespace(c) for m, c in stored.items() if c.database.client is client}
    return client, [m._scope_variable for m in _together(wanted, here)]


def _only_client(
    client: Client | None, clients: dict[type[SessionScopeMixin], Client], anyone: bool
) -> Client:
    """Return the one client of the scope, or raise where there is none or more than one."""
    distinct = list({id(each): each for each in clients.values()}.values())
    if client is None:
        if len(distinct) != 1:
            raise ClientMismatchError(
                f"with_session() was given no client, and its classes have {len(distinct)}: "
                "pass client=, and classes that init_beanie initialised on that client."
            )
        return distinct[0]
    for model, other in clients.items():
        if other is not client and not anyone:
            raise ClientMismatchError(
                f"{model.__name__} was initialised on another client than the one of this "
                "scope, and a session works with its own client only: pass the client whose "
                "database went to init_beanie()."
            )
    return client


def _namespace(collection: Any) -> tuple[str, str]:
    return collection.database.name, collection.name


def _together(
    wanted: list[type[SessionScopeMixin]], here: dict[type[SessionScopeMixin], tuple[str, str]]
) -> list[type[SessionScopeMixin]]:
    """Add the classes that must be bound together with the wanted ones."""
    stored_in: dict[tuple[str, str], list[type[SessionScopeMixin]]] = {}
    for model, namespace in here.items():
        stored_in.setdefault(namespace, []).append(model)
    together: dict[type[SessionScopeMixin], None] = {}
    waiting = [model for model in wanted if model in here]
    while waiting:
        model = waiting.pop()
        if model not in together:
            together[model] = None
            database, name = here[model]
            waiting += stored_in[here[model]]
            waiting += [m for m in here if issubclass(m, model)]
            waiting += [m for m in linked_classes(model) if m in here]
            waiting += [m for m, n in here.items() if n[0] == database and view_source(m) == name]
    return list(together)
