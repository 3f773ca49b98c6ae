"""Which classes does a block bind, and on which client?

Those that are named, and with them every class with the mixin that

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
from collections.abc import Iterable
from typing import Any, TypeAlias

from .binding import Variable
from .cascade import linked_classes
from .drivers import DRIVER, Client
from .errors import (
    ClientMismatchError,
    ModelNotInitializedError,
    ModelNotScopedError,
    NotAClientError,
)
from .mixin import (
    GETTER,
    Model,
    SessionScopeMixin,
    fingerprint,
    models,
    plain_collection,
    view_source,
)

Models: TypeAlias = "Iterable[type[SessionScopeMixin]]"
_Planned: TypeAlias = "tuple[Client, list[Variable]]"


def check_models(collections: Models) -> list[Model]:
    """Return the classes as a list.

    Raises:
        ModelNotScopedError: If something among them is no class with the mixin.
    """
    if isinstance(collections, (str, type)) or not isinstance(collections, Iterable):
        raise ModelNotScopedError(
            f"collections must be an iterable of classes, and is {_describe(collections)}: "
            "write collections=[Bike]."
        )
    return [check_model(model) for model in collections]


def check_model(model: object) -> Model:
    """Return a class with the mixin.

    Raises:
        ModelNotScopedError: If it is none.
    """
    if not isinstance(model, type):
        raise ModelNotScopedError(
            f"A class is needed here, and {_describe(model)} was given: name the class itself, "
            "such as Bike."
        )
    if not issubclass(model, SessionScopeMixin):
        raise ModelNotScopedError(
            f"{model.__name__} has no SessionScopeMixin, so it can't be bound to a session: "
            f"declare it as class {model.__name__}(SessionScopeMixin, Document)."
        )
    return model


def collection_of(model: type[SessionScopeMixin]) -> Any:
    """Return the driver's collection of a class, whichever Beanie is installed.

    It is what ``get_pymongo_collection()`` of Beanie 2 and ``get_motor_collection()`` of Beanie 1
    return: what is done with it runs in the scope that the class is in.

    Args:
        model: A class with the mixin.

    Returns:
        The collection, an instance of the driver's class.

    Raises:
        ModelNotScopedError: If ``model`` is no class with the mixin.
        ModelNotInitializedError: If ``init_beanie`` has not initialised it.
    """
    if plain_collection(check_model(model)) is None:
        raise _not_initialized(model)
    return getattr(model, GETTER)()


def _not_initialized(model: Model) -> ModelNotInitializedError:
    return ModelNotInitializedError(
        f"{model.__name__} is not initialised: list it in document_models of init_beanie(), and "
        "await that first."
    )


def _describe(thing: object) -> str:
    # Never its repr: that of a document shows what is in it.
    return thing.__name__ if isinstance(thing, type) else f"a {type(thing).__name__} object"


def plan(client: Client | None, named: list[Model] | None) -> _Planned:
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
_plans: dict[tuple[int, tuple[Model, ...] | None], _Planned] = {}
_planned_for: list[object] = []


def _plan(
    client: Client | None,
    named: list[Model] | None,
    every: list[Model],
) -> _Planned:
    stored = {m: c for m in every if (c := plain_collection(m)) is not None}
    for model in named or ():
        if model not in stored:
            raise _not_initialized(model)
    wanted = list(stored) if named is None else named
    client = _only_client(client, {m: stored[m].database.client for m in wanted}, named is None)
    here = {m: _namespace(c) for m, c in stored.items() if c.database.client is client}
    return client, [m._scope_variable for m in _together(wanted, here)]


def _only_client(client: Client | None, clients: dict[Model, Client], anyone: bool) -> Client:
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


def _together(wanted: list[Model], here: dict[Model, tuple[str, str]]) -> list[Model]:
    """Add the classes that must be bound together with the wanted ones."""
    stored_in: dict[tuple[str, str], list[Model]] = {}
    for model, namespace in here.items():
        stored_in.setdefault(namespace, []).append(model)
    together: dict[Model, None] = {}
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
