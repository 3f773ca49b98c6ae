"""Waiting for what must come to its end, in tasks that may be cancelled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any, TypeVar

logger = logging.getLogger("beanie_session_scope")

T = TypeVar("T")


class Uncancelled:
    """Wait for a future, and leave it alone when the waiting task is cancelled.

    What ``asyncio.shield`` is for, without its second future and the turn of the event loop
    that this one costs: it stands on the way of every operation that Motor runs. To a task it
    is a "Future-like object with a ``_asyncio_future_blocking`` attribute" (documentation of
    ``asyncio.isfuture``): the task is woken by the future itself, or by being cancelled.

    Args:
        future: What to wait for.
    """

    __slots__ = ("_asyncio_future_blocking", "_context", "_future", "_wake")

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self._future = future
        self._asyncio_future_blocking = False

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
            ``False`` where the future has woken the task already, which then sees to it itself.
        """
        if self._future.done():
            return False
        self._future.remove_done_callback(self._wake)
        loop = self._future.get_loop()
        cancelled: asyncio.Future[None] = loop.create_future()
        cancelled.cancel(msg)
        loop.call_soon(self._wake, cancelled, context=self._context)
        return True


async def settle(work: asyncio.Future[T]) -> T:
    """Wait for a future to its end, however often the running task is cancelled meanwhile.

    Args:
        work: What must not be left half done.

    Returns:
        Its result.

    Raises:
        asyncio.CancelledError: If the task was cancelled; only after the work ended.
    """
    cancellation: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await Uncancelled(work)
        except asyncio.CancelledError as error:
            cancellation = error
        except Exception:
            break  # the work's own: raised below
    if cancellation is None:
        return work.result()
    if not work.cancelled() and work.exception() is not None:
        # No traceback: the message of a driver error can hold the contents of documents.
        logger.error("What a cancelled task had begun failed: %s", nameof(work.exception()))
    raise cancellation


def nameof(error: BaseException | None) -> str:
    """Name an error for the log: its class and, of a server error, its code."""
    code = getattr(error, "code", None)
    return type(error).__name__ + ("" if code is None else f" (code {code})")
