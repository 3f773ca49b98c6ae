"""What starts at a bound document stays in its scope, also where it goes on to other classes.

Beanie follows links on its own: it writes linked documents (``link_rule``) and fetches them,
and passes no session on through half of these ways. So the methods that follow links bind
the classes that they reach to the document's session, for as long as they run. A class
that has no mixin can't be bound, and is refused.

Most of these methods change the document in memory as well. Before they do, the journal of the
transaction notes what it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, get_args, get_origin

from beanie import BackLink, DeleteRules, Document, Link, WriteRules
from beanie.odm.registry import DocsRegistry
from pydantic import BaseModel

from .binding import Block, Variable, enclosing, put_outside, resolve
from .channel import WRITING, SessionChannel, borrow, channel_of
from .errors import ModelNotScopedError

FETCHES = ("fetch_all_links", "fetch_link")
WRITES = (
    "delete",
    "hard_delete",
    "insert",
    "replace",
    "save",
    "save_changes",
    "sync",
    "update",
)
FOLLOWING = (WriteRules.WRITE, DeleteRules.DELETE_LINKS)


def link_fields(model: type[Any]) -> dict[str, Any]:
    """Return what Beanie knows of the link fields of a class, by name."""
    return getattr(model, "_link_fields", None) or {}


def linked_classes(model: type[Any]) -> list[type[Any]]:
    """Return the classes that the fields of a class link to."""
    listed = [link.document_class for link in link_fields(model).values()]
    fields = getattr(model, "model_fields", {}).values()
    return [*listed, *(each for field in fields for each in _links_in(field.annotation, set()))]


def _links_in(annotation: Any, seen: set[Any]) -> Iterator[type[Any]]:
    """Yield the classes of links that Beanie does not list: in submodels and containers."""
    arguments = get_args(annotation)
    if get_origin(annotation) in (Link, BackLink):
        target = DocsRegistry.evaluate_fr(arguments[0])
        if isinstance(target, type):
            yield target
        return
    for argument in arguments:
        yield from _links_in(argument, seen)
    # Before Python 3.11 list[int], too, is an instance of type.
    is_class = isinstance(annotation, type) and not arguments
    if is_class and issubclass(annotation, BaseModel) and annotation not in seen:
        seen.add(annotation)
        for field in annotation.model_fields.values():
            yield from _links_in(field.annotation, seen)


def carry_scope(cls: type[Any], *, first: bool) -> None:
    """Let the methods of a document's class know of the scope that they run in.

    Args:
        cls: The class.
        first: Whether none of its parents is one. Of the others only overrides are new.
    """
    for names, wrap in ((FETCHES, _fetching), (WRITES, _writing)):
        for name in names:
            if hasattr(cls, name) if first else iscoroutinefunction(cls.__dict__.get(name)):
                setattr(cls, name, wrap(cls, name))


def _method_below(cls: type[Any], name: str) -> Callable[[Any], Callable[..., Awaitable[Any]]]:
    """Return what finds the method that a wrapper stands in front of."""
    own = cls.__dict__.get(name)
    if own is not None:
        return lambda self: own.__get__(self)
    return lambda self: getattr(super(cls, self), name)


def _writing(cls: type[Any], name: str) -> Callable[..., Awaitable[Any]]:
    """Wrap a method that changes its own document, and those that it links to if asked to."""
    below = _method_below(cls, name)
    signature = inspect.signature(getattr(cls, name))
    positional = name != "update"  # which takes its expressions there, and all else by name

    @wraps(getattr(cls, name))
    async def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments if args and positional else kwargs
        session = given.get("session") or getattr(given.get("bulk_writer"), "session", None)
        channel = resolve(self._scope_variables) if session is None else channel_of(session)
        if channel is not None and channel.closed:
            channel.check_open()  # before anything in the document changes
        call = below(self)
        if given.get("link_rule") in FOLLOWING and (channel or session) is not None:
            with _carried(channel or borrow(session), _to_carry(self, name, _written(self))):
                return await _noted(self, channel, call(*args, **kwargs))
        result = await _noted(self, channel, call(*args, **kwargs))
        _renew(self, channel)
        return result

    return method


async def _noted(document: Any, channel: SessionChannel | None, writing: Awaitable[Any]) -> Any:
    """Write a document, which its transaction may have to put back."""
    journal = None if channel is None else channel.journal
    if channel is None or journal is None or not journal.begin(document):
        return await writing
    epoch, rewinds, failed = channel.epoch, journal.rewinds, True
    outer = WRITING.get()  # of a cascade, which is one write
    WRITING.set(outer if outer is not None and outer[0] is channel else (channel, epoch))
    try:
        result = await writing
        failed = False
        return result
    finally:
        WRITING.set(outer)  # not by a token: this may be closed in another context
        journal.end(document)
        # Either the transaction ended before this could be part of it, or this was part of it,
        # and Beanie has had something left to do to the document after the abort.
        if journal.rewinds != rewinds or (failed and channel.epoch != epoch):
            journal.rewind([document])


def _renew(document: Document, channel: SessionChannel | None) -> None:
    """Let a document stay what it is for the scopes that track it, and did not write it.

    What was written outside any transaction, or in that of an enclosing scope, is not theirs to
    take back. (The scopes around a transaction hear of it when that one commits.)
    """
    for each in enclosing(past_outside=True):
        if each is channel and each.journal is not None:
            return
        if each.journal is not None:
            each.journal.renew([document])


def _fetching(cls: type[Any], name: str) -> Callable[..., Awaitable[Any]]:
    """Wrap a method that reads the documents that its own links to."""
    below = _method_below(cls, name)
    signature = inspect.signature(getattr(cls, name))

    @wraps(getattr(cls, name))
    async def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        channel = resolve(self._scope_variables)
        if channel is None:
            return await below(self)(*args, **kwargs)
        field = signature.bind(self, *args, **kwargs).arguments.get("field")
        with _carried(channel, _to_carry(self, name, _fetched(self, field))):
            return await below(self)(*args, **kwargs)

    return method


def _values(document: Any, field: str) -> list[Any]:
    value = getattr(document, field, None)
    return value if isinstance(value, list) else [value]


def _fetched(document: Any, field: str | None) -> set[type[Any]]:
    """Return the classes that a fetch reads: of one link field, or of all."""
    found: set[type[Any]] = set()
    links = link_fields(type(document))
    for name in links if field is None else [field]:  # which Beanie may not list
        values = _values(document, name)
        found.update(v.document_class for v in values if isinstance(v, Link))
        if name in links and "BACK" in links[name].link_type.name:
            found.add(links[name].document_class)
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


@contextmanager
def _carried(channel: SessionChannel, variables: list[Variable]) -> Iterator[None]:
    block = Block()
    block.enter(variables, channel)
    try:
        yield
    finally:
        block.leave()
