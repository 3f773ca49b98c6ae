"""All that differs between Motor (Beanie 1.x) and PyMongo Async (Beanie 2.x).

Nothing else in the package asks which driver is in use. ``DRIVER`` is the one that the
installed Beanie talks to.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar, TypeAlias

from beanie import Document
from pymongo.errors import ConnectionFailure

Client: TypeAlias = Any
"""A client of the installed driver: ``AsyncMongoClient``, or Motor's ``AsyncIOMotorClient``."""

Session: TypeAlias = Any
"""A session of the installed driver, as its ``start_session`` returns it."""


class Driver(ABC):
    """What the package needs of a driver."""

    name: ClassVar[str]
    client_class: type[Any]
    session_class: type[Any]
    collection_class: type[Any]
    cursor_classes: tuple[type[Any], ...]

    outlives_cancellation: ClassVar[bool]
    """Whether a command goes on after the task that waits for it was cancelled."""

    aggregate_is_awaited: ClassVar[bool]
    """Whether ``aggregate`` is a coroutine function that returns the cursor."""

    @abstractmethod
    async def start_session(self, client: Client, **options: Any) -> Session:
        """Start a session; sends nothing to the server."""

    @abstractmethod
    async def start_transaction(self, session: Session, **options: Any) -> None:
        """Start a transaction; sends nothing, the first operation opens it on the server."""

    @abstractmethod
    async def end_session(self, session: Session) -> None:
        """End a session; sends nothing where its transaction has ended."""

    def kill_session(self, client: Client, session_id: Any) -> Awaitable[Any]:
        """Let the server end whatever it runs for a session, its transaction included.

        MongoDB manual, ``killSessions``: a user may kill sessions of its own.
        """
        return client.admin.command("killSessions", [session_id])  # type: ignore[no-any-return]

    def commits_sent(self, session: Session) -> int:
        """Return how often the driver has sent the commit, which it does twice if it must."""
        transaction = getattr(getattr(session, "delegate", session), "_transaction", None)
        return int(getattr(transaction, "attempt", 1))

    @contextmanager
    def noting_lost_abort(self, session: Session) -> Iterator[list[ConnectionFailure]]:
        """Note why an abort did not reach the server, which the drivers keep to themselves.

        They ignore every error of ``abortTransaction``, as the *transactions* specification has
        it. But a single lost connection makes PyMongo pause its pool for a moment, so that the
        aborts of many other transactions are not even sent, and these stay open.

        Args:
            session: The session, whose transaction is aborted in the block.

        Yields:
            The errors.
        """
        inner: Any = getattr(session, "delegate", session)
        noted: list[ConnectionFailure] = []
        finish = getattr(inner, "_finish_transaction_with_retry", None)
        if finish is None:  # tests/test_lost_connections.py fails then, and nothing else
            yield noted
            return
        inner._finish_transaction_with_retry = self._noting(finish, noted)
        try:
            yield noted
        finally:
            del inner._finish_transaction_with_retry  # the method of the class is there again

    @abstractmethod
    def _noting(self, finish: Callable[[str], Any], noted: list[ConnectionFailure]) -> Any:
        """Return a method that does what another one does, and notes lost connections."""

    @abstractmethod
    def buffered(self, cursor: Any) -> int:
        """Return how many documents a cursor can give without a command."""


class PyMongoAsync(Driver):
    """PyMongo's own asyncio API, which Beanie 2.x uses."""

    name = "PyMongo Async"
    outlives_cancellation = False
    aggregate_is_awaited = True

    def __init__(self) -> None:
        pymongo = import_module("pymongo.asynchronous")
        cursors = import_module("pymongo.asynchronous.cursor")
        command_cursors = import_module("pymongo.asynchronous.command_cursor")
        self.client_class = import_module(f"{pymongo.__name__}.mongo_client").AsyncMongoClient
        self.session_class = import_module(f"{pymongo.__name__}.client_session").AsyncClientSession
        self.collection_class = import_module(f"{pymongo.__name__}.collection").AsyncCollection
        self.cursor_classes = (cursors.AsyncCursor, command_cursors.AsyncCommandCursor)

    async def start_session(self, client: Client, **options: Any) -> Session:
        """Start a session; ``start_session`` is a plain function here."""
        return client.start_session(**options)

    async def start_transaction(self, session: Session, **options: Any) -> None:
        """Start a transaction; ``start_transaction`` is a coroutine function here."""
        await session.start_transaction(**options)

    async def end_session(self, session: Session) -> None:
        """End the session."""
        await session.end_session()

    def _noting(self, finish: Callable[[str], Any], noted: list[ConnectionFailure]) -> Any:
        async def noting(command: str) -> Any:
            try:
                return await finish(command)
            except ConnectionFailure as error:
                noted.append(error)
                raise

        return noting

    def buffered(self, cursor: Any) -> int:
        """Return the length of the buffer; 0, which is always safe, where there is none."""
        try:
            return len(cursor._data)
        except AttributeError:
            return 0


class Motor(Driver):
    """Motor, which Beanie 1.x uses: PyMongo's blocking API in a thread pool."""

    name = "Motor"
    # The thread can't be stopped: it works on after its future was cancelled.
    outlives_cancellation = True
    aggregate_is_awaited = False

    def __init__(self) -> None:
        motor = import_module("motor.motor_asyncio")
        self.client_class = motor.AsyncIOMotorClient
        self.session_class = motor.AsyncIOMotorClientSession
        self.collection_class = motor.AsyncIOMotorCollection
        self.cursor_classes = (
            motor.AsyncIOMotorCursor,
            motor.AsyncIOMotorCommandCursor,
            motor.AsyncIOMotorLatentCommandCursor,
        )

    async def start_session(self, client: Client, **options: Any) -> Session:
        """Start a session; ``start_session`` is a coroutine function here."""
        starting = asyncio.ensure_future(client.start_session(**options))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread goes on, and older PyMongo takes a session from its pool there.
            starting.add_done_callback(_end_unused)
            raise

    async def start_transaction(self, session: Session, **options: Any) -> None:
        """Start a transaction; ``start_transaction`` is a plain function here."""
        session.start_transaction(**options)

    async def end_session(self, session: Session) -> None:
        """End the session; in a thread only where that sends a command, an abort."""
        if session.in_transaction:
            await session.end_session()
        else:
            session.delegate.end_session()

    def _noting(self, finish: Callable[[str], Any], noted: list[ConnectionFailure]) -> Any:
        def noting(command: str) -> Any:
            try:
                return finish(command)
            except ConnectionFailure as error:
                noted.append(error)
                raise

        return noting

    def buffered(self, cursor: Any) -> int:
        """Return the length of the delegate's buffer, which older PyMongo calls otherwise."""
        try:
            return len(cursor.delegate._data)
        except AttributeError:
            return int(cursor._buffer_size())


def _end_unused(starting: asyncio.Future[Session]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().delegate.end_session()


DRIVER: Driver = PyMongoAsync() if hasattr(Document, "get_pymongo_collection") else Motor()
