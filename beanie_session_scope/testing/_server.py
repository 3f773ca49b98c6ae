"""One `mongod` process: its command line, its life, its log."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._errors import ReplicaSetError
from ._log import start_error, tail
from ._sandbox import disown
from ._wire import run_command, wait_for

HOST = "127.0.0.1"
_PROBE_SECONDS = 1.0
_READY = b"waiting for connections"


@dataclass(frozen=True)
class Launch:
    """Say how to start the servers of one group.

    Attributes:
        mongod: The program (pathlib.Path).
        directory: Where data and logs go (pathlib.Path).
        arguments: Command line arguments that all the servers share (tuple[str, ...]).
    """

    mongod: Path
    directory: Path
    arguments: tuple[str, ...]


class Member:
    """Stand for one server of a `ReplicaSet`, through all its restarts.

    Members are made by the set; kill, restart, pause and resume them with the set's methods.
    """

    def __init__(self, launch: Launch, number: int, port: int) -> None:
        """Describe a server without starting it.

        Args:
            launch: How to start it (Launch).
            number: Its index in its group (int).
            port: The port to listen on (int).
        """
        self._launch = launch
        self._number = number
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._launches = 0
        self._paused = False
        self._on_resume: list[Callable[[], None]] = []
        self._fail_point: object | None = None

    def __repr__(self) -> str:
        """Show the address and whether the process runs.

        Returns:
            A short description (str).
        """
        state = "paused" if self.paused else "alive" if self.alive else "not running"
        return f"<Member {self.address} {state}>"

    @property
    def host(self) -> str:
        """Return the loopback address that the server listens on.

        Returns:
            An IPv4 address (str).
        """
        return HOST

    @property
    def port(self) -> int:
        """Return the TCP port that the server listens on; a restart keeps it.

        Returns:
            A port number (int).
        """
        return self._port

    @property
    def address(self) -> str:
        """Return host and port, written as the replica set's configuration does.

        Returns:
            For example ``127.0.0.1:27017`` (str).
        """
        return f"{HOST}:{self._port}"

    @property
    def uri(self) -> str:
        """Return a connection string for this server alone, whatever its role in the set.

        Returns:
            A ``mongodb://`` URI with `directConnection=true` (str).
        """
        return f"mongodb://{self.address}/?directConnection=true"

    @property
    def pid(self) -> int:
        """Return the id of the current process, or of the last one if the server is dead.

        Returns:
            A process id (int).

        Raises:
            ReplicaSetError: If the server was never started.
        """
        return self._started().pid

    @property
    def alive(self) -> bool:
        """Tell whether the process exists; a paused one does.

        Returns:
            True if so (bool).
        """
        return self._process is not None and self._process.poll() is None

    @property
    def paused(self) -> bool:
        """Tell whether the server is stopped by `ReplicaSet.pause`.

        Returns:
            True if so (bool).
        """
        return self._paused and self.alive

    def log_tail(self, lines: int = 20) -> str:
        """Return the end of the log of the server's current or last process.

        Args:
            lines: How many lines at most (int).

        Returns:
            The lines, shortened and made readable (str).
        """
        return tail(self._log_path, lines)

    # What follows is for this package only.

    @property
    def _log_path(self) -> Path:
        return self._launch.directory / f"member{self._number}.{self._launches}.log"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ReplicaSetError(f"The server on {self.address} was never started.")
        return self._process

    def _spawn(self) -> None:
        data = self._launch.directory / f"member{self._number}"
        data.mkdir(exist_ok=True)
        # A log per process: an old one would look as if the new process were ready.
        self._launches += 1
        self._paused, self._fail_point, self._on_resume = False, None, []
        command = [str(self._launch.mongod), "--dbpath", str(data), "--port", str(self._port)]
        with self._log_path.open("wb") as log:
            try:
                self._process = self._popen([*command, *self._launch.arguments], log.fileno())
            except OSError as error:
                raise start_error(self.address, f"could not be run: {error}", "") from error

    @staticmethod
    def _popen(command: list[str], log: int) -> subprocess.Popen[bytes]:
        # Its own session keeps Ctrl-C in the terminal from ending it before the test's clean-up.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _await_listening(self, timeout: float) -> None:
        # The server's own log is asked, not the port: someone else may be listening on that.
        process = self._started()

        def probe() -> bool | None:
            ended = process.poll() is not None
            return False if ended else self._is_listening() or None

        if wait_for(probe, timeout):
            return
        reason = f"did not accept connections within {timeout:.1f} s"
        if process.poll() is not None:
            reason = f"ended with exit code {process.returncode} before it accepted connections"
        raise start_error(self.address, reason, self.log_tail())

    def _is_listening(self) -> bool:
        return _READY in self._log_path.read_bytes().lower()

    def _signal(self, number: int) -> None:
        # The process leads a group of its own, so that a wrapper script's children are reached.
        process = self._started()
        if process.poll() is None:
            os.killpg(process.pid, number)

    def _kill(self) -> None:
        if self._process is not None:  # it is None if the program could not be run
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _disown(self) -> None:
        if self._process is not None:
            disown(self._process)

    def _pause(self) -> None:
        if self._paused:
            return  # it would not stop again, and the wait below would never end
        self._signal(signal.SIGSTOP)
        # The signal takes effect a little later: without this, one more command might be served.
        os.waitpid(self.pid, os.WUNTRACED)
        self._paused = True

    def _resume(self) -> None:
        self._signal(signal.SIGCONT)
        self._paused = False
        while self._on_resume:
            self._on_resume.pop()()

    def _command(self, command: dict[str, Any], timeout: float) -> dict[str, Any]:
        try:
            return run_command((HOST, self._port), command, timeout)
        except OSError as error:
            name = next(iter(command))
            raise ReplicaSetError(
                f"{name} could not be run on {self!r}: {error!r}. "
                f"The end of the server's log:\n{self.log_tail()}"
            ) from error

    def _role(self) -> dict[str, Any]:
        # serverStatus reports what `hello` does, and does not use up a fail point on `hello`.
        if not self.alive or self._paused:
            return {}
        command = {"serverStatus": 1, "metrics": 0, "wiredTiger": 0, "tcmalloc": 0, "locks": 0}
        try:
            reply = run_command((HOST, self._port), command, _PROBE_SECONDS)
        except (OSError, ReplicaSetError):
            return {}
        role = reply.get("repl")
        return role if isinstance(role, dict) else {}
