"""The collection that a class with the mixin hands to Beanie, and the cursors it opens.

``BoundCollection`` is a real collection of the driver, in which every public method is
replaced by one that first asks which session its class is bound to. Where the class is
unbound, the driver's own method runs, with the arguments as they came.

``OPERATIONS`` says what each method is. A method that the table does not know is refused
in a scope: a new release of a driver can't leak outside through it.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from enum import Enum, auto
from functools import wraps
from typing import Any

from pymongo.collection import Collection
from pymongo.cursor import Cursor

from .binding import Variable, resolve
from .channel import SessionChannel, channel_of
from .drivers import DRIVER
from .errors import ScopeClosedError, UnsupportedInTransactionError


class Kind(Enum):
    """What a method of a collection or cursor is to a scope."""

    SESSION = auto()  # takes the session, returns a result
    CURSOR = auto()  # takes the session, returns a cursor
    SCHEMA = auto()  # takes the session, but waits for transactions on the collection
    METADATA = auto()  # only reads what describes the collection: runs outside
    REFUSED = auto()  # can't be done in a session or a transaction
    DERIVED = auto()  # gives a view on the same collection
    PLAIN = auto()  # sends nothing to the server
    CHAIN = auto()  # a cursor's option: changes the cursor and returns it


OPERATIONS: dict[str, Kind] = {
    **dict.fromkeys(
        (
            "bulk_write",
            "count_documents",
            "delete_many",
            "delete_one",
            "distinct",
            "find_one",
            "find_one_and_delete",
            "find_one_and_replace",
            "find_one_and_update",
            "insert_many",
            "insert_one",
            "replace_one",
            "update_many",
            "update_one",
        ),
        Kind.SESSION,
    ),
    **dict.fromkeys(("aggregate", "find"), Kind.CURSOR),
    **dict.fromkeys(
        (
            "create_index",
            "create_indexes",
            "create_search_index",
            "create_search_indexes",
            "drop",
            "drop_index",
            "drop_indexes",
            "drop_search_index",
            "rename",
            "update_search_index",
        ),
        Kind.SCHEMA,
    ),
    **dict.fromkeys(
        ("index_information", "list_indexes", "list_search_indexes", "options"), Kind.METADATA
    ),
    # Change streams and the count command are refused by the server in a transaction;
    # Motor's raw batches and the estimated count take no session at all.
    **dict.fromkeys(
        ("aggregate_raw_batches", "estimated_document_count", "find_raw_batches", "watch"),
        Kind.REFUSED,
    ),
    "with_options": Kind.DERIVED,
    **dict.fromkeys(
        (
            "codec_options",
            "database",
            "full_name",
            "get_io_loop",
            "name",
            "next",
            "read_concern",
            "read_preference",
            "wrap",
            "write_concern",
        ),
        Kind.PLAIN,
    ),
}

CURSOR_OPERATIONS: dict[str, Kind] = {
    **dict.fromkeys(("distinct", "next", "to_list", "try_next"), Kind.SESSION),
    **dict.fromkeys(
        (
            "allow_disk_use",
            "batch_size",
            "collation",
            "comment",
            "hint",
            "limit",
            "max",
            "max_await_time_ms",
            "max_scan",
            "max_time_ms",
            "min",
            "remove_option",
            "skip",
            "sort",
            "where",
        ),
        Kind.CHAIN,
    ),
    "clone": Kind.DERIVED,
    # The server explains nothing in a transaction; the others are callback interfaces that
    # Motor deprecated, or leave no way to tell when their command runs.
    **dict.fromkeys(
        ("add_option", "each", "explain", "fetch_next", "next_object", "rewind"), Kind.REFUSED
    ),
    **dict.fromkeys(
        (
            "address",
            "alive",
            "collection",
            "cursor_id",
            "get_io_loop",
            "retrieved",
            "session",
        ),
        Kind.PLAIN,
    ),
    "close": Kind.PLAIN,
}

_WHY_REFUSED = {
    "estimated_document_count": "it reads the collection's statistics, which no transaction "
    "sees: use count_documents({}), or call it under outside_session()",
    "watch": "a change stream shows what was committed: open it under outside_session()",
    "explain": "the server explains no operation of a transaction: run it under outside_session()",
    "rewind": "call the query again for a new cursor",
}


def refuse(name: str) -> UnsupportedInTransactionError:
    """Make the error for a method that can't run in a scope."""
    if OPERATIONS.get(name) is Kind.SCHEMA:
        why = (
            "it would wait for the transaction that waits for it. Run it before the scope, or after"
        )
    else:
        why = _WHY_REFUSED.get(
            name, "it can't carry the session. Run it under outside_session() if that is meant"
        )
    return UnsupportedInTransactionError(f"{name}() can't run inside a session scope: {why}.")


class BoundCursor:
    """A cursor of the driver that was opened in a scope, and ends with it.

    Documents that the driver has already fetched are handed out at the driver's own
    speed; every command goes through the session's channel.
    """

    __slots__ = ("_channel", "_cursor", "_epoch", "_fetched", "_next", "_running")

    def __init__(self, channel: SessionChannel, cursor: Any) -> None:
        self._channel = channel
        # A query that waits for its turn belongs to the transaction in which it runs first.
        self._epoch: int | None = None
        self._cursor = cursor
        self._next = cursor.__anext__
        self._fetched = 0  # how many documents the driver can give without a command
        self._running = ""

    def __aiter__(self) -> AsyncIterator[Any]:
        """Return the cursor itself, as the driver's cursors do."""
        return self

    def __anext__(self) -> Any:
        """Return the next document; from the driver's buffer while it lasts.

        Raises:
            ScopeClosedError: If the scope is over.
        """
        if self._fetched and self._channel.epoch == self._epoch:
            self._fetched -= 1
            return self._next()
        return self._fetch()

    next = __anext__

    async def _fetch(self) -> Any:
        document = await self._channel.run(BoundCursor._start, self, ("__anext__",))
        if self._running == "__anext__":
            self._fetched = DRIVER.buffered(self._cursor)
        return document

    def _start(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Start a method of the driver's cursor, under the lock.

        What it leaves in the buffer is counted only while nothing else has started since:
        ``to_list`` may be emptying the buffer by then.
        """
        if self._epoch is None:
            self._epoch = self._channel.epoch
        if self._channel.epoch != self._epoch:
            raise ScopeClosedError(
                "This cursor was opened in a transaction that its scope has ended since, with "
                "commit() or abort(): open another one for the transaction that came after it."
            )
        self._fetched = 0
        self._running = name
        return getattr(self._cursor, name)(*args, **kwargs)

    async def __aenter__(self) -> BoundCursor:
        """Return the cursor itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the cursor."""
        await self.close()

    async def close(self) -> None:
        """Close the cursor on the server, which does that itself when the transaction ends."""
        if self._channel.usable and self._epoch in (None, self._channel.epoch):
            await self._channel.run(type(self._cursor).close, self._cursor)

    def __getattr__(self, name: str) -> Any:
        """Return what the driver's cursor calls by this name, made to keep to the scope."""
        kind = CURSOR_OPERATIONS.get(name, Kind.REFUSED)
        # A refused one is not even looked at: Motor has a property that sends a command.
        if kind is Kind.REFUSED and hasattr(type(self._cursor), name):
            raise refuse(name)
        value = getattr(self._cursor, name)
        if kind is Kind.SESSION:
            return self._through_channel(name)
        if kind is Kind.CHAIN:
            return self._chained(value)
        if kind is Kind.DERIVED:
            return lambda: BoundCursor(self._channel, value())
        return value

    def _through_channel(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._channel.run(
            BoundCursor._start, self, (name, *args), kwargs
        )

    def _chained(self, method: Callable[..., Any]) -> Callable[..., BoundCursor]:
        def chained(*args: Any, **kwargs: Any) -> BoundCursor:
            method(*args, **kwargs)
            return self

        return chained


def _session_position(name: str) -> int:
    """Return where among a method's positional arguments the session stands."""
    if name in ("find", "find_one"):
        # They hand their positional arguments on to the cursor, after the collection.
        return list(inspect.signature(Cursor).parameters).index("session") - 1
    return list(inspect.signature(getattr(Collection, name)).parameters).index("session") - 1


def _prepare(
    variables: tuple[Variable, ...], position: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[SessionChannel | None, tuple[Any, ...]]:
    """Find the channel of a call, and put its session among the arguments.

    An explicit session wins. ``None`` is none: Beanie passes it whenever the caller gave
    no session, now and then as a positional argument.
    """
    explicit = kwargs.get("session") if len(args) <= position else args[position]
    if explicit is not None:
        return channel_of(explicit), args
    channel = resolve(variables)
    if channel is None:
        return None, args
    if len(args) <= position:
        kwargs["session"] = channel.session
    else:
        args = (*args[:position], channel.session, *args[position + 1 :])
    return channel, args


def _session_operation(name: str, driver_method: Callable[..., Any]) -> Callable[..., Any]:
    position = _session_position(name)

    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        channel, args = _prepare(self._scope_variables, position, args, kwargs)
        if channel is None:
            return driver_method(self._scope_plain, *args, **kwargs)
        return channel.run(driver_method, self._scope_plain, args, kwargs)

    return operation


def _schema_operation(name: str, driver_method: Callable[..., Any]) -> Callable[..., Any]:
    position = _session_position(name)

    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        channel, args = _prepare(self._scope_variables, position, args, kwargs)
        if channel is None:
            return driver_method(self._scope_plain, *args, **kwargs)
        if channel.in_transaction:
            raise refuse(name)
        return channel.run(driver_method, self._scope_plain, args, kwargs)

    return operation


def _cursor_operation(name: str, driver_method: Callable[..., Any]) -> Callable[..., Any]:
    position = _session_position(name)
    awaited = name == "aggregate" and DRIVER.aggregate_is_awaited

    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        channel, args = _prepare(self._scope_variables, position, args, kwargs)
        if channel is None:
            return driver_method(self._scope_plain, *args, **kwargs)
        if awaited:
            return _awaited_cursor(channel, driver_method, self._scope_plain, args, kwargs)
        return BoundCursor(channel, driver_method(self._scope_plain, *args, **kwargs))

    return operation


async def _awaited_cursor(
    channel: SessionChannel,
    driver_method: Callable[..., Any],
    plain: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> BoundCursor:
    cursor = BoundCursor(channel, await channel.run(driver_method, plain, args, kwargs))
    cursor._epoch = channel.epoch
    return cursor


def _metadata_operation(name: str, driver_method: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        return driver_method(self._scope_plain, *args, **kwargs)

    return operation


def _refused_operation(name: str, driver_method: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        if resolve(self._scope_variables) is not None:
            raise refuse(name)
        return driver_method(self._scope_plain, *args, **kwargs)

    return operation


def _derived_operation(name: str, driver_method: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        return bind_collection(
            driver_method(self._scope_plain, *args, **kwargs), self._scope_variables
        )

    return operation


_MAKERS: dict[Kind, Callable[[str, Callable[..., Any]], Callable[..., Any]]] = {
    Kind.SESSION: _session_operation,
    Kind.CURSOR: _cursor_operation,
    Kind.SCHEMA: _schema_operation,
    Kind.METADATA: _metadata_operation,
    Kind.REFUSED: _refused_operation,
    Kind.DERIVED: _derived_operation,
}


def _bound_class(driver_class: type[Any]) -> type[Any]:
    """Derive the bound collection from the driver's, method by method of the table."""
    namespace: dict[str, Any] = {"__doc__": "A collection whose operations know their scope."}
    for name, method in inspect.getmembers(driver_class, inspect.isfunction):
        kind = OPERATIONS.get(name, Kind.REFUSED)
        if not name.startswith("_") and kind is not Kind.PLAIN:
            namespace[name] = wraps(method)(_MAKERS[kind](name, method))
    return type("BoundCollection", (driver_class,), namespace)


BoundCollection: type[Any] = _bound_class(DRIVER.collection_class)


def bind_collection(plain: Any, variables: tuple[Variable, ...]) -> Any:
    """Make the bound collection of a class.

    Args:
        plain: The driver's collection.
        variables: The variables of the class and its parents, nearest first.

    Returns:
        A ``BoundCollection`` that equals the driver's collection.
    """
    bound = object.__new__(BoundCollection)
    bound.__dict__.update(plain.__dict__)
    bound.__dict__.update(_scope_plain=plain, _scope_variables=variables)
    return bound
