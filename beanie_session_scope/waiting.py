"""Waiting for what must come to its end, in tasks that may be cancelled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from contextvars import Context
from typing import Any, TypeVar

from .log import log, nameof

T = TypeVar("T")

BOUND = 10.0
"""How long clean-up is waited for after a cancellation, where nothing else is asked, in seconds."""


class Uncancelled:
    """Wait for a future, and leave it alone when the waiting task is cancelled.

    What ``asyncio.shield`` is for, without its second future and the turn of the event loop
    that this one costs: it stands on the way of every operation that Motor runs. To a task it
    is a "Future-like object with a ``_asyncio_future_blocking`` attribute" (documentation of
    ``asyncio.isfuture``): the task is woken by the future itself, or by being cancelled.

    Args:
        future: What to wait for.
    """

    __slots__ = ("_asyncio_future_blocking", "_cancelled", "_context", "_future", "_wake")

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self._future = future
        self._asyncio_future_blocking = False
        self._cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait, and return the future's result."""
        if not self._future.done():
            self._asyncio_future_blocking = True
            yield self
        return self._future.result()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop of the future."""
        return self._future.get_loop()

    def add_done_callback(
        self, wake: Callable[..., object], *, context: Context | None = None
    ) -> None:
        """Let the future wake the task."""
        self._wake, self._context = wake, context
        self._future.add_done_callback(wake, context=context)

    def cancel(self, msg: object = None) -> bool:
        """Wake the task with a ``CancelledError``, and nobody else.

        Returns:
            ``False`` where the task is being woken already: it then sees to it itself.
        """
        if self._cancelled or self._future.done():
            return False
        self._cancelled = True
        self._future.remove_done_callback(self._wake)
        loop = self._future.get_loop()
        cancelled: asyncio.Future[None] = loop.create_future()
        cancelled.cancel(msg)
        loop.call_soon(self._wake, cancelled, context=self._context)
        return True


async def settle(
    work: asyncio.Future[T], bound: float = BOUND, *, bounded: bool = False
) -> T | None:
    """Wait for a future to its end, however often the running task is cancelled meanwhile.

    Args:
        work: What must not be left half done.
        bound: How long to wait after the task was cancelled, in seconds. Past it the work
            goes on in the background, which is logged.
        bounded: Whether the bound counts from now on, cancelled or not.

    Returns:
        Its result; ``None`` where it goes on in the background.

    Raises:
        asyncio.CancelledError: If the task was cancelled.
    """
    loop = work.get_loop()
    cancellation: asyncio.CancelledError | None = None
    end = loop.time() + bound if bounded else None
    while not work.done():
        try:
            if end is None:
                await Uncancelled(work)
            elif (remaining := end - loop.time()) > 0:
                await asyncio.wait({work}, timeout=remaining)
            else:
                leave_to_background(work, bound)
                break
        except asyncio.CancelledError as error:
            cancellation = error
            end = end if end is not None else loop.time() + bound
        except Exception:
            break  # the work's own: raised below
    if cancellation is None:
        return work.result() if work.done() else None
    if work.done():
        _log_failure(work)
    raise cancellation


_background: set[asyncio.Future[Any]] = set()


def leave_to_background(work: asyncio.Future[Any], bound: float) -> None:
    """Hold a future that nobody waits for any longer, and log how it ends.

    Args:
        work: The future; the event loop alone would let go of it.
        bound: For how long it was waited for, in seconds.
    """
    log(
        logging.WARNING,
        "background",
        "The server has not answered for %.1f s: the clean-up goes on in the background",
        bound,
        waited=bound,
    )
    _background.add(work)
    work.add_done_callback(_end_in_background)


def _end_in_background(work: asyncio.Future[Any]) -> None:
    _background.discard(work)
    if work.cancelled() or work.exception() is not None:
        _log_failure(work)
    else:
        log(logging.INFO, "background.done", "The clean-up in the background is done")


def _log_failure(work: asyncio.Future[Any]) -> None:
    error = asyncio.CancelledError() if work.cancelled() else work.exception()
    if error is not None:
        # No traceback: the message of a driver error can hold the contents of documents.
        name = nameof(error)
        log(
            logging.ERROR,
            "cleanup.failed",
            "What a cancelled task had begun failed: %s",
            name,
            error=name,
        )


async def insist(begin: Callable[[], Awaitable[T]], bound: float = BOUND) -> T:
    """Run a step of a clean-up to its end, also when the loop is shut down meanwhile.

    ``asyncio.run`` cancels *every* task when its main one is done, then waits for them. That
    reaches a clean-up which is already protected from the task that asked for it.

    Args:
        begin: Starts the step. It is called again where a cancellation has ended it half-way,
            so it must be one that can be repeated.
        bound: How long to go on after a cancellation, in seconds.

    Returns:
        The step's result.

    Raises:
        asyncio.TimeoutError: If the bound is past.
    """
    work = begin()
    try:
        return await (Uncancelled(work) if isinstance(work, asyncio.Future) else work)
    except asyncio.CancelledError:
        end = asyncio.get_running_loop().time() + bound
    while True:
        # What goes on by itself (Motor's threads do) is waited for, not begun again.
        if not isinstance(work, asyncio.Future) or work.done():
            work = begin()
        waiting = asyncio.shield(work) if isinstance(work, asyncio.Future) else work
        with suppress(asyncio.CancelledError):
            return await asyncio.wait_for(waiting, end - asyncio.get_running_loop().time())
