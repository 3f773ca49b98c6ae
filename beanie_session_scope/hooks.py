"""What runs before a commit, and after the outcome of a transaction is settled."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Generator
from typing import Any, TypeAlias

from .log import log, nameof

Hook: TypeAlias = "Callable[[], Awaitable[object] | object]"
"""A function without arguments, or a coroutine function."""


class Hooks:
    """The hooks of one transaction, each list first in first out."""

    __slots__ = ("after_abort", "after_commit", "before_commit")

    def __init__(self) -> None:
        self.before_commit: list[Hook] = []
        self.after_commit: list[Hook] = []
        self.after_abort: list[Hook] = []

    def __bool__(self) -> bool:
        """Tell whether there are any."""
        return bool(self.before_commit or self.after_commit or self.after_abort)

    async def run_before_commit(self) -> None:
        """Run the hooks that may still veto, those included that they add.

        Raises:
            BaseException: What a hook raises; those after it don't run.
        """
        while self.before_commit:
            await call(self.before_commit.pop(0))


def check_hook(hook: Hook) -> Hook:
    """Return the hook.

    Raises:
        TypeError: If it can't be called.
    """
    if not callable(hook):
        raise TypeError(
            f"A hook must be a function without arguments, and this is a {type(hook).__name__}: "
            "pass the function itself, not what it returns."
        )
    return hook


async def call(hook: Hook) -> None:
    """Call a hook, and await what it returns where that is awaitable."""
    result = hook()
    if inspect.isawaitable(result):
        await result


async def run_all(hooks: list[Hook]) -> list[BaseException]:
    """Run every hook, also after one that failed or was cancelled.

    Returns:
        What they raised.
    """
    failed: list[BaseException] = []
    for hook in hooks:
        try:
            await call(hook)
        except (Exception, asyncio.CancelledError) as error:
            failed.append(error)
    return failed


def failures(errors: list[BaseException]) -> str:
    """Name what hooks raised, for a message."""
    return ", ".join(map(nameof, errors))


class _Done:
    """An awaitable without anything to wait for."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


DONE: Awaitable[None] = _Done()

_running: set[asyncio.Future[Any]] = set()


def run_now(hook: Hook) -> Awaitable[None]:
    """Run a hook at once: a function here and now, a coroutine function in a task.

    Returns:
        An awaitable that ends when the hook has.

    Raises:
        TypeError: If it can't be called.
        Exception: What a function raises.
    """
    result: Any = check_hook(hook)()
    if not inspect.isawaitable(result):
        return DONE
    task = asyncio.ensure_future(result)
    _running.add(task)  # asyncio itself holds its tasks only weakly
    task.add_done_callback(_ended)
    return task


def _ended(task: asyncio.Future[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        name = nameof(error)
        log(logging.ERROR, "hooks.failed", "A hook that ran at once failed: %s", name, errors=1)
