"""The forms that run a transaction again: a function, a decorator and a loop.

All are one loop, which follows the MongoDB *convenient API for transactions* specification: the
whole attempt again after an error labelled ``TransientTransactionError``, after a wait that
grows, until the time is up. (A commit of unknown outcome is sent again by the scope itself.)

Inside an open scope on the same client an attempt joins it, and is not run again: only the owner
of a transaction can do that. Documents that were passed in, and those given to ``track``, are
rewound before each new attempt.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import wraps
from types import FunctionType
from typing import Any, ParamSpec, TypedDict, TypeVar, overload

from beanie import Document
from typing_extensions import Unpack

from .binding import enclosing
from .channel import TRANSIENT
from .deadline import Deadline
from .drivers import DRIVER, Client, Session
from .errors import (
    ClientMismatchError,
    NotAClientError,
    ScopeReusedError,
    TransactionTimeoutError,
)
from .log import log, nameof
from .memory import documents_in
from .mixin import check_session
from .options import Propagation, ScopeOptions
from .outcome import is_transient
from .plan import Models, check_models, plan
from .scope import SessionScope, tell_enclosing
from .state import ScopeState
from .waiting import settle

P = ParamSpec("P")
T = TypeVar("T")
AsyncFunction = Callable[P, Coroutine[Any, Any, T]]


class TransactionOptions(TypedDict, total=False):
    """The options of the retrying forms, all as for ``with_session``.

    ``clock`` tells the time in seconds, and ``jitter`` gives the share of the full backoff to
    wait, from 0 to 1: both are for tests.
    """

    propagation: Propagation
    read_concern: Any
    write_concern: Any
    read_preference: Any
    max_commit_time_ms: int | None
    causal_consistency: bool | None
    cleanup_timeout: float
    clock: Callable[[], float]
    jitter: Callable[[], float]


class TransactionAttempt(SessionScope):
    """One attempt of ``transaction_attempts``: a scope, to be entered once.

    Attributes:
        number: Which attempt it is, from 1.
        attempts: What it belongs to: the same for all attempts of one call.
    """

    def __init__(self, attempts: TransactionAttempts, number: int) -> None:
        super().__init__(attempts._plan, attempts._options, attempts._session)
        self.number = number
        self.attempts = attempts
        self._decided: tuple[BaseException, float | None] | None = None

    async def _wait_for_next(self) -> None:
        """Wait until another attempt is due; if that is not to be, this one was the last."""
        try:
            await asyncio.sleep(self._retry_in or 0)
        except BaseException as error:
            self._retry_in = None
            self._tell_left(error)
            await self._run_abort_hooks()
            raise

    async def _run_abort_hooks(self) -> None:
        if self._transaction is not None:
            await settle(asyncio.ensure_future(self._transaction.run_abort_hooks()))

    def _deadline(self) -> Deadline:
        return self.attempts._deadline

    def _will_retry(self, error: BaseException) -> bool:
        if self._state is ScopeState.ENDED:  # it was decided when the block was left
            return self._retry_in is not None
        return self._wait_after(error) is not None

    def _wait_after(self, error: BaseException) -> float | None:
        """Decide, once for each error, how long to wait for another attempt; ``None``: not."""
        if self._decided is None or self._decided[0] is not error:
            wait = None
            if self._may_help(error):
                deadline = self.attempts._deadline
                backoff = deadline.backoff(self.number)
                wait = None if deadline.has_passed(after=backoff) else backoff
            self._decided = (error, wait)
        return self._decided[1]

    def _may_help(self, error: BaseException) -> bool:
        """Tell whether another attempt may help after an error, if there is time."""
        transaction = self._transaction
        if self._joined or transaction is None or transaction.has_committed:
            return False
        if self._given is not None and self._is_ending_in_background():
            return False  # on the session that another attempt would have to use
        own = transaction.failure or transaction.channel.failure
        others = [c.failure for c in enclosing(past_outside=True) if c.failure not in (None, own)]
        return is_transient(error, own, [*transaction.foreign, *filter(None, others)])

    async def _leave(self, exc: BaseException | None) -> bool:
        """Leave the scope, and swallow the error after which another attempt is due.

        Raises:
            TransactionTimeoutError: If one would be due, and the time is up.
            BaseException: What ``SessionScope`` raises.
        """
        try:
            quiet = await super()._leave(exc)
        except BaseException as error:
            decided = self._decided
            if self._is_due_again(error):
                return True
            if decided is not None and decided[0] is not error and decided[1] is not None:
                # Cancelled meanwhile: the hooks were kept back for the next attempt.
                await self._run_abort_hooks()
            self._check_time(error)
            raise
        if quiet or exc is None:
            return quiet
        if self._is_due_again(exc):
            return True
        self._check_time(exc)
        return False

    def _is_due_again(self, error: BaseException) -> bool:
        """Decide whether another attempt follows, and say so."""
        wait = self._retry_in = self._wait_after(error)
        if wait is None:
            return False
        self._decided = None  # the error need not be kept
        name = nameof(error)
        log(
            logging.INFO,
            "retry",
            "Attempt %d of a transaction failed (%s): the next one is due in %.3f s",
            self.number,
            name,
            wait,
            attempt=self.number,
            error=name,
            label=TRANSIENT,
            wait=wait,
        )
        self._tell_left(error)
        return True

    def _check_time(self, error: BaseException) -> None:
        """Raise where only the time was missing for another attempt."""
        if not self._may_help(error):
            return
        late = TransactionTimeoutError(
            f"The transaction was tried {self.number} times, and its time "
            f"(timeout={self.options.timeout:g} s) is up: {nameof(error)} was the last "
            "error. Nothing of it was stored. Look for what writes the same documents."
        )
        tell_enclosing(late)
        raise late from error


class TransactionAttempts:
    """What ``transaction_attempts`` returns: an asynchronous iterator over attempts."""

    def __init__(
        self,
        client: Client | None,
        collections: Models | None,
        session: Session | None,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        **options: Any,
    ) -> None:
        self._options = retry_options(timeout=timeout, **options)
        named = None if collections is None else check_models(collections)
        if session is not None:
            client = _client_of(session, client)
            if options.get("causal_consistency") is not None:
                raise ValueError(
                    "causal_consistency says how a session is started, and session= names one "
                    "that was started already: leave one of the two out."
                )
        self._plan = lambda: plan(client, named)
        self._session = session
        self._clock, self._jitter = clock, jitter
        self._last: TransactionAttempt | None = None

    def __aiter__(self) -> TransactionAttempts:
        """Return the iterator itself.

        Raises:
            ScopeReusedError: If it was used before.
        """
        if self._last is not None:
            raise ScopeReusedError(
                "This transaction_attempts() was used before, and serves for one loop: call it "
                "again for another transaction."
            )
        return self

    async def __anext__(self) -> TransactionAttempt:
        """Return the next attempt, after the wait that is due.

        Raises:
            StopAsyncIteration: If no other attempt is due.
            RuntimeError: If the last one was not entered.
        """
        last, number = self._last, 1
        if last is None:
            self._deadline = Deadline(self._options.timeout, self._clock, self._jitter)
        else:
            if last.state is ScopeState.NEW:
                raise RuntimeError(
                    "An attempt was not entered, so nothing was tried: write "
                    "'async with attempt:' in the loop over transaction_attempts()."
                )
            if last._retry_in is None:
                raise StopAsyncIteration
            await last._wait_for_next()
            number = last.number + 1
        self._last = TransactionAttempt(self, number)
        return self._last


def retry_options(**options: Any) -> ScopeOptions:
    """Return the options of each attempt.

    Raises:
        ValueError: If they can't work.
    """
    checked = ScopeOptions(**options)
    if not checked.transaction:
        raise ValueError(
            "Only a transaction can be run again, and transaction=False asks for none: use "
            "with_session() for a plain session."
        )
    return checked


def _client_of(session: Session, client: Client | None) -> Client:
    theirs = check_session(session).client
    if client is not None and client is not theirs:
        raise ClientMismatchError(
            "session= belongs to another client than client=: leave client= out, or pass the "
            "one that started the session."
        )
    return theirs


def transaction_attempts(
    client: Client | None = None,
    collections: Models | None = None,
    *,
    timeout: float = 120.0,
    session: Session | None = None,
    **options: Unpack[TransactionOptions],
) -> TransactionAttempts:
    """Run a block in a transaction, again while MongoDB says that this may help.

    As in::

        async for attempt in transaction_attempts(collections=[Bike]):
            async with attempt:
                await bike.inc({Bike.sold: 1})

    Args:
        client: As for ``with_session``.
        collections: As for ``with_session``.
        timeout: For how long new attempts are made, and commits of unknown outcome sent
            again, in seconds.
        session: A session to run on, which is not in a transaction; it is not ended. Left out,
            each attempt has one of its own.
        options: As for ``with_session``.

    Returns:
        An asynchronous iterator over attempts. Each is a ``SessionScope``.

    Raises:
        ValueError: If options exclude each other.
        SessionScopeError: As ``with_session`` raises for ``client`` and ``collections``.
        TransactionTimeoutError: If the time is up; raised by leaving the last attempt.
    """
    return TransactionAttempts(client, collections, session, timeout, **options)


async def run_in_transaction(
    fn: Callable[..., Awaitable[T]],
    *args: Any,
    client: Client | None = None,
    collections: Models | None = None,
    timeout: float = 120.0,
    session: Session | None = None,
    **options: Unpack[TransactionOptions],
) -> T:
    """Call a function in a transaction, again while MongoDB says that this may help.

    Args:
        fn: A coroutine function. It may be called several times, so what it does besides
            writing to the database belongs in ``on_commit``.
        args: Its arguments. Documents among them are rewound before each new call.
        client: As for ``with_session``.
        collections: As for ``with_session``.
        timeout: As for ``transaction_attempts``.
        session: As for ``transaction_attempts``.
        options: As for ``with_session``.

    Returns:
        What the last call returned; ``None`` where it raised ``Rollback``.

    Raises:
        TypeError: If ``fn`` is no coroutine function.
        TransactionTimeoutError: If the time is up.
        SessionScopeError: As ``with_session`` raises.
    """
    if not callable(fn):
        raise TypeError(
            f"run_in_transaction() calls a coroutine function, and got a {type(fn).__name__}: "
            "pass the function itself and its arguments, as in run_in_transaction(sell, bike)."
        )
    attempts = TransactionAttempts(client, collections, session, timeout, **options)
    return await _run(attempts, lambda: fn(*args), args)


async def _run(
    attempts: TransactionAttempts, call: Callable[[], Awaitable[T]], values: Iterable[Any]
) -> T:
    documents: list[Document] = list(documents_in(values))
    result: Any = None
    async for attempt in attempts:
        result = None
        async with attempt:
            if documents and attempt._transaction is not None:
                attempt.track(*documents)
            awaitable = call()
            if not inspect.isawaitable(awaitable):
                raise TypeError(
                    "What runs in a transaction must be a coroutine function, and this one "
                    f"returned a {type(awaitable).__name__}: declare it with async def."
                )
            result = await awaitable
    return result  # type: ignore[no-any-return]


@overload  # the client is of any type: two drivers, one of which has no types
def transactional(  # pyright: ignore[reportOverlappingOverload]
    fn: AsyncFunction[P, T], /
) -> AsyncFunction[P, T]: ...
@overload
def transactional(
    client: Client | Callable[[], Client] | None = None,
    collections: Models | None = None,
    *,
    timeout: float = 120.0,
    **options: Unpack[TransactionOptions],
) -> Callable[[Callable[P, T]], Callable[P, T]]: ...
def transactional(
    client: Any = None,
    collections: Models | None = None,
    *,
    timeout: float = 120.0,
    **options: Unpack[TransactionOptions],
) -> Any:
    """Let each call of a coroutine function or method run as ``run_in_transaction`` runs it.

    Args:
        client: As for ``with_session``, or a function that returns it, which is called
            whenever the decorated function is.
        collections: As for ``with_session``.
        timeout: As for ``transaction_attempts``.
        options: As for ``with_session``.

    Returns:
        A decorator that keeps the signature. ``@transactional`` without parentheses works, too.

    Raises:
        TypeError: If what is decorated is no coroutine function, or a function that is to return
            the client is one.
        NotAClientError: If ``client`` is neither a client nor a function.
        SessionScopeError: As ``with_session`` raises for ``collections``.
        ValueError: If options exclude each other.
    """
    named = None if collections is None else check_models(collections)
    TransactionAttempts(None, named, None, timeout, **options)  # refuses what can't work
    if isinstance(client, (classmethod, staticmethod)):
        return _decorated(client, lambda: None, named, timeout, options)
    if inspect.iscoroutinefunction(client):
        if named is not None or options:
            raise TypeError(
                f"client={client.__qualname__} is a coroutine function, and the client is asked "
                "for by a plain one: create the client before, and return it."
            )
        return _decorated(client, lambda: None, named, timeout, options)
    find_client = client
    if client is None or isinstance(client, DRIVER.client_class):
        find_client = lambda: client  # noqa: E731
    elif not callable(client):
        raise NotAClientError(
            f"client must be a {DRIVER.client_class.__name__}, or a function that returns one, "
            f"and is a {type(client).__name__} object."
        )
    return lambda fn: _decorated(fn, find_client, named, timeout, options)


def _decorated(
    fn: Any,
    find_client: Callable[[], Client],
    named: Models | None,
    timeout: float,
    options: TransactionOptions,
) -> Callable[..., Awaitable[Any]]:
    if not inspect.iscoroutinefunction(fn):
        raise TypeError(
            "transactional decorates coroutine functions, and "
            f"{getattr(fn, '__qualname__', type(fn).__name__)} is none: declare it with "
            "async def, and put @transactional below @staticmethod or @classmethod."
        )

    async def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attempts = TransactionAttempts(find_client(), named, None, timeout, **options)
        return await _run(attempts, lambda: fn(*args, **kwargs), (args, kwargs))

    async def run(*args: Any, **kwargs: Any) -> Any:
        return await call(args, kwargs)

    # Frameworks resolve annotations that are strings among the globals of the function they get.
    names = getattr(fn, "__globals__", run.__globals__)
    return wraps(fn)(FunctionType(run.__code__, names, run.__name__, None, run.__closure__))
