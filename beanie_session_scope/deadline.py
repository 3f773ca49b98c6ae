"""How long to go on trying, and how long to wait before trying again.

The rules are those of the MongoDB *convenient API for transactions* specification. The clock
and the jitter can be replaced, so that both can be tested.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

INITIAL_BACKOFF = 0.005
GROWTH = 1.5
LONGEST_BACKOFF = 0.5


class Deadline:
    """A moment up to which something is tried again.

    Args:
        timeout: How far away it is, in seconds.
        clock: Tells the time, in seconds.
        jitter: Gives the share of the full backoff to wait, from 0 to 1.
    """

    __slots__ = ("_clock", "_end", "_jitter")

    def __init__(
        self,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._clock = clock
        self._jitter = jitter
        self._end = clock() + timeout

    def has_passed(self, after: float = 0.0) -> bool:
        """Tell whether the moment is past, or will be after so many seconds."""
        return self._clock() + after >= self._end

    def backoff(self, attempt: int) -> float:
        """Return how long to wait before trying again, in seconds.

        Args:
            attempt: How many attempts have failed.
        """
        full: float = INITIAL_BACKOFF * GROWTH ** min(attempt, 64)
        return self._jitter() * min(full, LONGEST_BACKOFF)
