"""How many documents go into one transaction."""

from __future__ import annotations

from typing import Any

from pymongo.errors import OperationFailure

from beanie_session_scope import TransactionExpiredError

LONGEST = 5.0
"""How long a batch should take at most, in seconds; less on a server with a low limit."""

SHARE = 0.1
"""The part of the server's limit for transactions that a batch should take at most."""

DEFAULT_LIMIT = 60.0
"""MongoDB's own ``transactionLifetimeLimitSeconds``."""

MOST_BYTES = 16 * 1024 * 1024
"""How much a batch reads at most: what it writes takes up the server's cache until the commit."""

TOO_LARGE = ("TransactionTooLarge", "TransactionTooLargeForCache")
"""The ``codeName`` of what the server says of a transaction that is too large for it."""


class Pace:
    """Finds how many documents can be changed in the time that a batch should take.

    Args:
        most: The number to begin with, and not to exceed.
        limit: The server's limit for transactions, in seconds.

    Attributes:
        size: How many documents the next batch should have.
        target: How long a batch should take at most, in seconds.
        limit: As given.
    """

    def __init__(self, most: int, limit: float) -> None:
        self.size = most
        self.limit = limit
        self.target = min(LONGEST, SHARE * limit)
        self._most = most

    def took(self, seconds: float, documents: int) -> None:
        """Learn from a batch that was committed.

        Args:
            seconds: How long it took.
            documents: How many documents it had.
        """
        if seconds > self.target:
            self.size = max(1, min(self.size - 1, int(documents * self.target / seconds)))
        elif documents >= self.size and seconds < self.target / 2:
            self.size = min(self._most, self.size + self.size // 4 + 1)

    def shrink_after(self, error: BaseException) -> bool:
        """Learn from a batch that failed.

        Returns:
            Whether a smaller one may do better.
        """
        if self.size == 1 or not _is_size_to_blame(error):
            return False
        self.size //= 2
        self._most = self.size  # more would fail again
        return True


def _is_size_to_blame(error: BaseException) -> bool:
    if isinstance(error, OperationFailure):
        return (error.details or {}).get("codeName") in TOO_LARGE
    return isinstance(error, TransactionExpiredError)


LIMIT_PARAMETER = "transactionLifetimeLimitSeconds"


async def lifetime_limit(client: Any) -> float:
    """Return how long a transaction may live, in seconds; the default where one may not ask."""
    try:
        answer = await client.admin.command({"getParameter": 1, LIMIT_PARAMETER: 1})
    except OperationFailure:
        return DEFAULT_LIMIT
    return float(answer[LIMIT_PARAMETER])
