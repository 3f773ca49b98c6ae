"""Real MongoDB servers for tests: start them, break them, and leave nothing behind.

`ReplicaSet` runs a temporary replica set, `StandaloneServer` a server without one.
`find_mongod` tells which server program they run.
"""

from __future__ import annotations

from ._errors import (
    MongodNotFoundError,
    PortTakenError,
    ReplicaSetError,
    ServerCommandError,
    ServerStartError,
)
from ._fail_point import FailPoint
from ._find import find_mongod
from ._replica_set import ReplicaSet
from ._server import Member
from ._standalone import StandaloneServer

__all__ = [
    "FailPoint",
    "Member",
    "MongodNotFoundError",
    "PortTakenError",
    "ReplicaSet",
    "ReplicaSetError",
    "ServerCommandError",
    "ServerStartError",
    "StandaloneServer",
    "find_mongod",
]
