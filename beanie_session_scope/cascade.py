"""What starts at a bound document stays in its scope, also where it goes on to other classes.

Beanie follows links on its own: it writes linked documents (``link_rule``) and fetches them,
and passes no session on through half of these ways. So the methods that follow links bind
the classes that they reach to the document's session, for as long as they run. A class
that has no mixin can't be bound, and is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from beanie import DeleteRules, Document, Link, WriteRules

from .binding import Block, Variable, put_outside, resolve
from .channel import SessionChannel, borrow
from .errors import ModelNotScopedError

FETCHES = ("fetch_all_links", "fetch_link")
CASCADES = ("delete", "hard_delete", "insert", "replace", "save")
FOLLOWING = (WriteRules.WRITE, DeleteRules.DELETE_LINKS)


def link_fields(model: type[Any]) -> dict[str, Any]:
    """Return what Beanie knows of the link fields of a class, by name."""
    return getattr(model, "_link_fields", None) or {}


def linked_classes(model: type[Any]) -> list[type[Any]]:
    """Return the classes that the link fields of a class point to."""
    return [link.document_class for link in link_fields(model).values()]


def carry_links(cls: type[Any]) -> None:
    """Let the methods of a class that follow links take the linked classes along."""
    for name in (*FETCHES, *CASCADES):
        if hasattr(cls, name):
            setattr(cls, name, _carrying(cls, name))


def _carrying(cls: type[Any], name: str) -> Callable[..., Awaitable[Any]]:
    """Wrap a method of a document so that it takes the linked documents into its scope."""
    own = cls.__dict__.get(name)
    signature = inspect.signature(getattr(cls, name))
    always = name in FETCHES

    @wraps(getattr(cls, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        call = own.__get__(self) if own is not None else getattr(super(cls, self), name)
        if always or args or "link_rule" in kwargs:
            given = signature.bind(self, *args, **kwargs).arguments
            if always or given.get("link_rule") in FOLLOWING:
                session = given.get("session")
                variables = self._scope_variables
                channel = resolve(variables) if session is None else borrow(session)
                if channel is not None:
                    targets = _fetched(self, given.get("field")) if always else _written(self)
                    return _carried(channel, _to_carry(self, name, targets), call, args, kwargs)
        return call(*args, **kwargs)  # type: ignore[no-any-return]

    return method


def _values(document: Any, field: str) -> list[Any]:
    value = getattr(document, field, None)
    return value if isinstance(value, list) else [value]


def _fetched(document: Any, field: str | None) -> set[type[Any]]:
    """Return the classes that a fetch reads: of one link field, or of all."""
    found: set[type[Any]] = set()
    for name, link in link_fields(type(document)).items():
        if field is None or field == name:
            values = _values(document, name)
            found.update(v.document_class for v in values if isinstance(v, Link))
            if "BACK" in link.link_type.name:
                found.add(link.document_class)
    return found


def _written(document: Any) -> set[type[Any]]:
    """Return the classes of the linked documents that are in memory."""
    return {
        type(value)
        for name in link_fields(type(document))
        for value in _values(document, name)
        if isinstance(value, Document)
    }


def _to_carry(document: Any, name: str, targets: set[type[Any]]) -> list[Variable]:
    """Return the variables to bind, so that a method of a bound document stays in its scope."""
    for target in targets:
        if not hasattr(target, "_scope_variables"):
            raise ModelNotScopedError(
                f"{type(document).__name__}.{name}() would also use {target.__name__}, which "
                "has no SessionScopeMixin, so that part would run outside the transaction. "
                f"Add the mixin: class {target.__name__}(SessionScopeMixin, Document)."
            )
    return [
        target._scope_variable for target in targets if not put_outside(target._scope_variables)
    ]


async def _carried(
    channel: SessionChannel,
    variables: list[Variable],
    call: Callable[..., Awaitable[Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    block = Block()
    block.enter(variables, channel)
    try:
        return await call(*args, **kwargs)
    finally:
        block.leave()
