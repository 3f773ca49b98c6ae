"""The life cycle that a replica set and a standalone server have in common."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TypeVar

from ._errors import PortTakenError, ReplicaSetError
from ._find import find_mongod
from ._sandbox import Sandbox
from ._server import HOST, Launch, Member

_PORT_ATTEMPTS = 5
_TEST_COMMANDS = "enableTestCommands"
# All of these save time or space only: journaling and every promise of the server stay as they are.
_FAST = (
    *("--bind_ip", HOST, "--nounixsocket", "--quiet", "--wiredTigerCacheSizeGB", "0.25"),
    *("--wiredTigerEngineConfigString", "log=(prealloc=false,file_max=16MB)"),
)
_PARAMETERS: Mapping[str, object] = {"diagnosticDataCollectionEnabled": False}

GroupT = TypeVar("GroupT", bound="ServerGroup")


class ServerGroup:
    """Start some servers together and stop them together."""

    def __init__(
        self,
        ports: Sequence[int | None],
        arguments: Sequence[str],
        set_parameters: Mapping[str, object] | None,
        start_timeout: float,
    ) -> None:
        """Describe the servers without starting them.

        Args:
            ports: A port for each server (Sequence[int | None]); None has a free one chosen.
            arguments: Further command line arguments (Sequence[str]).
            set_parameters: Further server parameters (Mapping[str, object] | None).
            start_timeout: How long starting may take, in seconds (float).

        Raises:
            ValueError: If an argument makes no sense.
        """
        if start_timeout <= 0:
            raise ValueError(f"start_timeout must be positive, got {start_timeout!r} (seconds).")
        self._ports = tuple(_checked_ports(ports))
        self._arguments = (*_FAST, *arguments, *_parameter_arguments(set_parameters or {}))
        self._start_timeout = start_timeout
        self._lock = threading.RLock()
        self._run: _Run | None = None
        self._finalizer: Callable[[], object] | None = None

    def start(self) -> None:
        """Start the servers and return when they can be used.

        Raises:
            ReplicaSetError: If they are running already, or can't be started; nothing is left
                running or on disk then. The message says why and shows the server's log.
        """
        with self._lock:
            if self._run is not None:
                raise ReplicaSetError(f"{self!r} has been started already; stop() it first.")
            with ExitStack() as undo:
                run = _Run(self._arguments)
                undo.callback(run.close)
                deadline = time.monotonic() + self._start_timeout
                run.launch(self._ports, deadline)
                self._prepare(run.members, deadline)
                undo.pop_all()
            self._run = run
            # Covers a forgotten stop() when the interpreter exits normally; the watchdog covers
            # every other end.
            self._finalizer = weakref.finalize(self, run.close)

    def stop(self) -> None:
        """Kill the servers and remove their data; do nothing if they are not running."""
        with self._lock:
            if self._finalizer is not None:
                self._finalizer()
            self._run = self._finalizer = None

    def __enter__(self: GroupT) -> GroupT:
        """Start the servers.

        Returns:
            This object.
        """
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the servers."""
        self.stop()

    async def __aenter__(self: GroupT) -> GroupT:
        """Start the servers without blocking the event loop.

        Returns:
            This object.
        """
        await enter_in_thread(self.start, self.stop)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the servers without blocking the event loop."""
        await asyncio.to_thread(self.stop)

    def _prepare(self, members: Sequence[Member], deadline: float) -> None:
        """Make running servers usable."""

    def _members(self) -> tuple[Member, ...]:
        run = self._run
        if run is None:
            raise ReplicaSetError(f"{self!r} is not running; start() it or use it in a `with`.")
        return tuple(run.members)


class _Run:
    """Own the processes and the directory between one start and the next stop."""

    def __init__(self, arguments: tuple[str, ...]) -> None:
        if os.name != "posix":
            raise ReplicaSetError("Test servers need a POSIX system, for its process signals.")
        mongod = find_mongod()
        self.members: list[Member] = []
        self._sandbox = Sandbox()
        self._launch = Launch(mongod, self._sandbox.path, arguments)

    def launch(self, ports: Sequence[int | None], deadline: float) -> None:
        chosen = [port or free for port, free in zip(ports, free_ports(len(ports)), strict=True)]
        for number, port in enumerate(chosen):
            self.members.append(Member(self._launch, number, port))
            self.members[-1]._spawn()
        for member, fixed in zip(self.members, ports, strict=True):
            _settle(member, 1 if fixed else _PORT_ATTEMPTS, deadline)

    def close(self) -> None:
        # A forked child has copies of these objects, but the servers belong to its parent.
        if self._sandbox.is_ours:
            for member in self.members:
                member._kill()
            self._sandbox.remove()
        else:
            for member in self.members:
                member._disown()
            self._sandbox.disown()


async def enter_in_thread(enter: Callable[[], object], leave: Callable[[], object]) -> None:
    """Run the blocking entry of a context manager in a thread, undoing it if cancelled.

    Args:
        enter: What to run (Callable[[], object]).
        leave: What undoes it (Callable[[], object]); run if this task is cancelled meanwhile,
            since the thread can't be.
    """
    entering = asyncio.ensure_future(asyncio.to_thread(enter))
    try:
        await asyncio.shield(entering)
    except asyncio.CancelledError:
        await asyncio.wait([entering])
        if entering.exception() is None:
            await asyncio.to_thread(leave)
        raise


def free_ports(count: int) -> list[int]:
    """Find free TCP ports on the loopback address.

    Args:
        count: How many (int).

    Returns:
        Different port numbers (list[int]); another process may still be quicker to use one.
    """
    with ExitStack() as stack:
        # All stay open until the last is known, so that no port is found twice.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def _settle(member: Member, attempts: int, deadline: float) -> None:
    while True:
        attempts -= 1
        try:
            return member._await_listening(max(deadline - time.monotonic(), 0.0))
        except PortTakenError:
            if not attempts:
                raise
        # Someone was quicker to use the free port that had been found.
        [member._port] = free_ports(1)
        member._spawn()


def _checked_ports(ports: Sequence[int | None]) -> Sequence[int | None]:
    fixed = [port for port in ports if port is not None]
    if not all(0 < port < 65536 for port in fixed) or len(set(fixed)) != len(fixed):
        raise ValueError(f"Ports must be different numbers from 1 to 65535, got {fixed!r}.")
    return ports


def _parameter_arguments(set_parameters: Mapping[str, object]) -> list[str]:
    if _TEST_COMMANDS in set_parameters:
        raise ValueError(f"{_TEST_COMMANDS} is always on (fail points need it); leave it out.")
    merged = {**_PARAMETERS, **set_parameters, _TEST_COMMANDS: 1}
    pairs = [("--setParameter", f"{name}={_spelled(value)}") for name, value in merged.items()]
    return [word for pair in pairs for word in pair]


def _spelled(value: object) -> str:
    # The server reads booleans and documents as JSON, but strings bare.
    return value if isinstance(value, str) else json.dumps(value)
