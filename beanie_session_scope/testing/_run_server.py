"""One server for a whole test run, whatever number of pytest-xdist workers it has.

The controller of pytest-xdist owns the server, because it outlives every worker. It starts it
when the first worker asks, over an execnet channel that each worker gets with its input.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

from ._errors import ReplicaSetError
from ._replica_set import ReplicaSet

CHANNEL = "beanie_session_scope_server"
"""Where a worker finds its channel in what the controller hands it."""

_URI = "MONGODB_URI"
_SCHEMES = ("mongodb://", "mongodb+srv://")
_ANSWER_SECONDS = 120.0


class SharedServer:
    """A MongoDB server that this process uses and does not own.

    Attributes:
        uri: Its connection string (str).
    """

    def __init__(self, uri: str, owner: str) -> None:
        """Describe the server.

        Args:
            uri: Its connection string (str).
            owner: Who owns it, for messages (str).
        """
        self.uri = uri
        self._owner = owner

    def __repr__(self) -> str:
        """Show who owns it; no connection string.

        Returns:
            A short description (str).
        """
        return f"<SharedServer of {self._owner}>"

    def __getattr__(self, name: str) -> NoReturn:
        """Explain why what a `ReplicaSet` can do is not there.

        Raises:
            AttributeError: Always.
        """
        if hasattr(ReplicaSet, name) and not name.startswith("_"):
            raise AttributeError(
                f"mongo_replica_set has no {name} here: the server belongs to {self._owner}, and "
                "other tests use it too. A test that looks into a server or breaks it starts one "
                "of its own: with ReplicaSet() as replica_set."
            )
        raise AttributeError(name)


class RunServer:
    """The server that the controller owns for its workers, started when one of them asks."""

    def __init__(self) -> None:
        """Start nothing."""
        self._lock = threading.Lock()
        self._replica_set: ReplicaSet | None = None
        self._over = False

    def listen(self, channel: Any) -> None:
        """Answer whoever asks for the server at the other end of a channel.

        Args:
            channel: An execnet channel (execnet.Channel).
        """
        # Called in the thread that reads from that worker: only this worker waits meanwhile.
        channel.setcallback(partial(self._answer, channel))

    def stop(self) -> None:
        """Stop the server, if it was started; from now on none is."""
        with self._lock:
            self._over = True
            if self._replica_set is not None:
                self._replica_set.stop()

    def _answer(self, channel: Any, _: object) -> None:
        try:
            answer = {"uri": self._uri()}
        except Exception as error:
            answer = {"error": str(error)}
        with suppress(OSError):  # the worker has crashed meanwhile
            channel.send(answer)

    def _uri(self) -> str:
        with self._lock:
            if self._over:
                raise ReplicaSetError("The test run is over: no server is started any more.")
            if self._replica_set is None:
                replica_set = ReplicaSet()
                replica_set.start()
                self._replica_set = replica_set
            return self._replica_set.uri


@contextmanager
def server_of_run(workerinput: Mapping[str, Any]) -> Iterator[ReplicaSet | SharedServer]:
    """Give the one server of a test run, for the length of a block.

    Args:
        workerinput: What pytest-xdist hands a worker (Mapping[str, Any]); empty elsewhere.

    Yields:
        The server of `MONGODB_URI` where that is set, the one of the controller in a worker of
        pytest-xdist, or else a replica set of one node, which ends with the block
        (ReplicaSet | SharedServer).

    Raises:
        ValueError: If `MONGODB_URI` is no connection string.
        ReplicaSetError: If the server can't be started.
    """
    if uri := os.environ.get(_URI):
        yield SharedServer(_checked(uri), f"the environment ({_URI})")
    elif CHANNEL in workerinput:
        yield SharedServer(_ask(workerinput[CHANNEL]), "the controller of pytest-xdist")
    else:
        with ReplicaSet() as replica_set:
            yield replica_set


def _checked(uri: str) -> str:
    if not uri.startswith(_SCHEMES):
        # Never the value: it may hold a password.
        raise ValueError(
            f"The environment variable {_URI} is no connection string: it must begin with "
            f"{' or '.join(_SCHEMES)}. Unset it to have a server started."
        )
    return uri


def _ask(channel: Any) -> str:
    channel.send(None)
    try:
        answer = channel.receive(_ANSWER_SECONDS)
    except channel.TimeoutError:
        answer = {"error": f"the controller did not answer within {_ANSWER_SECONDS:g} s"}
    if "error" in answer:
        raise ReplicaSetError(
            f"The server of this test run could not be started: {answer['error']}"
        )
    uri: str = answer["uri"]
    return uri
