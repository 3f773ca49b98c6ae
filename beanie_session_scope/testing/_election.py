"""The configuration of a replica set, and waiting for what its members agree on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ._errors import ServerStartError
from ._server import Member
from ._wire import wait_for

HEARTBEATS_PER_TIMEOUT = 6
_REPLY_SECONDS = 10.0


def config_for(name: str, members: Sequence[Member], election_timeout_ms: int) -> dict[str, Any]:
    """Write the configuration of a replica set with equal members.

    Args:
        name: The name of the set (str).
        members: All its members (Sequence[Member]).
        election_timeout_ms: How long a primary may be silent, in milliseconds (int).

    Returns:
        The argument of `replSetInitiate` (dict[str, Any]).
    """
    return {
        "_id": name,
        "members": [{"_id": number, "host": m.address} for number, m in enumerate(members)],
        "settings": {
            "electionTimeoutMillis": election_timeout_ms,
            "heartbeatIntervalMillis": election_timeout_ms // HEARTBEATS_PER_TIMEOUT,
        },
    }


def primary_of(members: Sequence[Member]) -> Member | None:
    """Ask each member once whether it is the primary.

    Args:
        members: The members to ask (Sequence[Member]).

    Returns:
        The primary (Member), or None.
    """
    roles = [(member._role(), member) for member in members]
    claims = [(role, member) for role, member in roles if role.get("isWritablePrimary")]
    # A primary that was cut off may not know yet that it was voted out: the last election counts.
    newest = max(claims, key=lambda claim: claim[0]["electionId"], default=None)
    return None if newest is None else newest[1]


def await_ready(members: Sequence[Member], deadline: float) -> None:
    """Wait until each member is either primary or secondary.

    Args:
        members: The members to wait for (Sequence[Member]).
        deadline: When to give up, in seconds of `time.monotonic` (float).

    Raises:
        ServerStartError: If one is not ready by then, or has ended.
    """
    waiting = list(members)

    def probe() -> bool | None:
        waiting[:] = [member for member in waiting if not _is_ready(member)]
        return None if waiting and all(member.alive for member in waiting) else True

    wait_for(probe, deadline - time.monotonic())
    if waiting:
        state = "is not ready in time" if waiting[0].alive else "ended before it was ready"
        raise ServerStartError(
            f"{waiting[0]!r} {state}: it is neither primary nor secondary. "
            f"The end of the server's log:\n{waiting[0].log_tail()}"
        )


def _is_ready(member: Member) -> bool:
    role = member._role()
    return bool(role.get("isWritablePrimary") or role.get("secondary"))


def await_replication(members: Sequence[Member], deadline: float) -> None:
    """Wait until each member has replicated a write of the primary.

    Args:
        members: All the members of the set (Sequence[Member]).
        deadline: When to give up, in seconds of `time.monotonic` (float).

    Raises:
        ReplicaSetError: If that has not happened by then.
    """
    # Only a member that has replicated a write of the new primary can be elected after it: a test
    # may kill the primary at once.
    remaining = max(deadline - time.monotonic(), 1.0)
    primary = wait_for(lambda: primary_of(members), remaining)
    if primary is None:
        raise ServerStartError(f"No member of {list(members)} became primary in time.")
    concern = {"w": len(members), "wtimeout": int(remaining * 1000)}
    note = {"appendOplogNote": 1, "data": {"ready": True}, "writeConcern": concern}
    primary._command(note, remaining + _REPLY_SECONDS)
