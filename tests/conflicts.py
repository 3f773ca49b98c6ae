"""What makes attempts fail, as often as a test wants, and what makes their time be up."""

from __future__ import annotations

from labels import TRANSIENT, labelled


class Conflicts:
    """Lets the first calls of something fail as if they had lost a conflict.

    Attributes:
        calls: How often it was called.
    """

    def __init__(self, times: int = 2) -> None:
        self.calls = 0
        self._times = times

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self._times:
            raise labelled(TRANSIENT)


class Late:
    """A clock that is past the limit from the second time on that it is asked."""

    def __init__(self) -> None:
        self._now = iter([0.0])

    def __call__(self) -> float:
        return next(self._now, 1_000.0)
