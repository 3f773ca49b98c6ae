"""Cancels a task at its k-th suspension, and again at those that follow."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any


class Stepping:
    """A coroutine whose suspensions are counted, and at some of which its task is cancelled.

    Args:
        coroutine: What to run.
        at: The suspension at which to cancel first, from 1; 0 means never.
        times: How often to cancel: at that suspension, and at each one after it.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], at: int, times: int) -> None:
        self._coroutine = coroutine
        self._at = at
        self._left = times
        self.suspensions = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        """Run the coroutine."""
        steps = self._coroutine.__await__()
        resume, value = steps.send, None
        while True:
            try:
                waiting_for = resume(value)
            except StopIteration as end:
                return end.value
            self._suspend()
            try:
                value = yield waiting_for
                resume = steps.send
            except BaseException as error:
                resume, value = steps.throw, error

    def _suspend(self) -> None:
        self.suspensions += 1
        task = asyncio.current_task()
        assert task is not None
        if self._at and self.suspensions >= self._at and self._left:
            self._left -= 1
            task.cancel()  # takes effect at the suspension that comes now


async def run(stepping: Stepping) -> Any:
    """Run it, as a coroutine: what a task is made of."""
    return await stepping
