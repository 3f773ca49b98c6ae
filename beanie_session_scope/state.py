"""Where a scope is in its life, and which way it can go from there.

::

    NEW -> OPEN -> COMMITTING -> COMMITTED
                       |------> ABORTED      the server refused the commit
                       |------> UNKNOWN      the outcome can't be known
                -> ABORTING  -> ABORTED
                -> ENDED                     no transaction, or one that was ended by hand

``SessionScope.commit()`` and ``abort()`` go on with a new transaction: from COMMITTED or
ABORTED back to OPEN.
"""

from __future__ import annotations

from enum import Enum


class ScopeState(Enum):
    """Where a scope is in its life."""

    NEW = "new"
    OPEN = "open"
    COMMITTING = "committing"
    COMMITTED = "committed"
    ABORTING = "aborting"
    ABORTED = "aborted"
    UNKNOWN = "unknown"
    ENDED = "ended"

    # A member equals itself alone, and the hash of Enum is a Python function: it would be the
    # slowest part of a move.
    __hash__ = object.__hash__


TRANSITIONS: dict[ScopeState, frozenset[ScopeState]] = {
    ScopeState.NEW: frozenset({ScopeState.OPEN}),
    ScopeState.OPEN: frozenset({ScopeState.COMMITTING, ScopeState.ABORTING, ScopeState.ENDED}),
    ScopeState.COMMITTING: frozenset(
        {ScopeState.COMMITTED, ScopeState.ABORTED, ScopeState.UNKNOWN}
    ),
    ScopeState.ABORTING: frozenset({ScopeState.ABORTED}),
    ScopeState.COMMITTED: frozenset({ScopeState.OPEN}),
    ScopeState.ABORTED: frozenset({ScopeState.OPEN}),
    ScopeState.UNKNOWN: frozenset(),
    ScopeState.ENDED: frozenset(),
}


OUTCOMES = frozenset(
    {ScopeState.COMMITTED, ScopeState.ABORTED, ScopeState.UNKNOWN, ScopeState.ENDED}
)
"""How a transaction ends."""


def check_move(before: ScopeState, after: ScopeState) -> ScopeState:
    """Return the state after a move.

    Raises:
        RuntimeError: If there is no such move.
    """
    if after not in TRANSITIONS[before]:
        raise RuntimeError(f"A scope can't go from {before.value} to {after.value}.")
    return after
