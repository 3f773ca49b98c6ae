"""A temporary replica set whose members can be made to fail."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ._election import (
    HEARTBEATS_PER_TIMEOUT,
    await_ready,
    await_replication,
    config_for,
    primary_of,
)
from ._errors import ReplicaSetError, ServerCommandError, ServerStartError
from ._fail_point import FailPoint, fail_point_settings
from ._group import ServerGroup
from ._server import Member
from ._wire import wait_for

_NAME = "rs0"
_OPLOG_MB = 64
_MOST_NODES = 7  # of the members of a MongoDB replica set, this many can vote
_ELECTION_TIMEOUT_MS = 1500
_CATCH_UP_SECONDS = 5
_COMMAND_SECONDS = 10.0
_WAIT_SECONDS = 30.0


class ReplicaSet(ServerGroup):
    """Run a temporary replica set of real `mongod` processes on this machine.

    It is a context manager (`with` and `async with`), and has `start()` and `stop()`. The
    processes end, and their data is removed, when the Python process ends, even by SIGKILL.
    """

    def __init__(
        self,
        nodes: int = 1,
        *,
        ports: Sequence[int] | None = None,
        set_parameters: Mapping[str, object] | None = None,
        election_timeout_ms: int = _ELECTION_TIMEOUT_MS,
        start_timeout: float = 30.0,
    ) -> None:
        """Describe the replica set without starting it.

        Args:
            nodes: How many members (int), from 1 to 7.
            ports: A port for each member (Sequence[int] | None); None has free ones chosen.
            set_parameters: Further server parameters by name (Mapping[str, object] | None), such
                as `{"transactionLifetimeLimitSeconds": 5}`.
            election_timeout_ms: How long the others wait for a lost primary before they elect
                another, in milliseconds (int).
            start_timeout: How long starting may take, in seconds (float).

        Raises:
            ValueError: If an argument makes no sense.
        """
        if type(nodes) is not int or not 1 <= nodes <= _MOST_NODES:
            raise ValueError(f"nodes must be a number from 1 to {_MOST_NODES}, got {nodes!r}.")
        if ports is not None and len(ports) != nodes:
            raise ValueError(f"ports must have one port for each of {nodes} nodes, got {ports!r}.")
        if election_timeout_ms < HEARTBEATS_PER_TIMEOUT:
            raise ValueError(f"election_timeout_ms is too short: {election_timeout_ms!r}.")
        arguments = ["--replSet", _NAME, "--oplogSize", str(_OPLOG_MB)]
        chosen: Sequence[int | None] = [None] * nodes if ports is None else ports
        super().__init__(chosen, arguments, set_parameters, start_timeout)
        self._election_timeout_ms = election_timeout_ms

    def __repr__(self) -> str:
        """Show the members.

        Returns:
            A short description (str).
        """
        members = list(self._run.members) if self._run else "not running"
        return f"<ReplicaSet of {len(self._ports)}: {members}>"

    @property
    def members(self) -> tuple[Member, ...]:
        """Return all the members, alive or not, always in the same order.

        Returns:
            The members (tuple[Member, ...]).

        Raises:
            ReplicaSetError: If the replica set is not running.
        """
        return self._members()

    @property
    def uri(self) -> str:
        """Return the connection string, which names all the members and the replica set.

        Returns:
            A ``mongodb://`` URI (str).

        Raises:
            ReplicaSetError: If the replica set is not running.
        """
        seeds = ",".join(member.address for member in self.members)
        return f"mongodb://{seeds}/?replicaSet={_NAME}"

    @property
    def primary(self) -> Member:
        """Return the member that is the primary right now.

        Returns:
            The primary (Member).

        Raises:
            ReplicaSetError: If there is none at the moment, or the set is not running.
        """
        primary = primary_of(self.members)
        if primary is None:
            raise ReplicaSetError(f"{self!r} has no primary now; use wait_for_primary().")
        return primary

    def wait_for_primary(self, timeout: float = _WAIT_SECONDS) -> Member:
        """Wait until some member is the primary and takes writes.

        Args:
            timeout: How long to wait, in seconds (float).

        Returns:
            The primary (Member).

        Raises:
            ReplicaSetError: If there is none when the time is over, or the set is not running.
        """
        members = self.members
        primary = wait_for(lambda: primary_of(members), timeout)
        if primary is None:
            raise ReplicaSetError(
                f"{self!r} had no primary within {timeout:g} s. A primary needs more than half of "
                "the members: restart() or resume() some."
            )
        return primary

    def kill(self, member: Member) -> None:
        """Kill a member with SIGKILL, as a crash would; do nothing if it is dead.

        Args:
            member: A member of this set (Member).

        Raises:
            ValueError: If the member is not of this set.
        """
        self._own(member)._kill()

    def restart(self, member: Member, timeout: float = _WAIT_SECONDS) -> None:
        """Start a killed member again on its port and data, and wait until it has rejoined.

        Args:
            member: A dead member of this set (Member).
            timeout: How long it may take, in seconds (float).

        Raises:
            ReplicaSetError: If the member is alive, or does not start and rejoin in time.
            ValueError: If the member is not of this set.
        """
        if self._own(member).alive:
            raise ReplicaSetError(f"{member!r} is running; kill() it before restart().")
        deadline = time.monotonic() + timeout
        member._spawn()
        member._await_listening(timeout)
        await_ready([member], deadline)

    def pause(self, member: Member) -> None:
        """Freeze a member with SIGSTOP: its port still takes connections, but nothing answers.

        Args:
            member: A live member of this set (Member).

        Raises:
            ReplicaSetError: If the member is dead.
            ValueError: If the member is not of this set.
        """
        self._alive(member)._pause()

    def resume(self, member: Member) -> None:
        """Let a paused member go on with SIGCONT; do nothing if it is not paused.

        Args:
            member: A live member of this set (Member).

        Raises:
            ReplicaSetError: If the member is dead.
            ValueError: If the member is not of this set.
        """
        self._alive(member)._resume()

    def step_down(self, seconds: int = 2) -> Member:
        """Make the primary a secondary; it hands over to another member if one can take over.

        Args:
            seconds: For how long it must not become the primary again (int). In a set of one
                node this is how long there is no primary.

        Returns:
            The member that was the primary (Member).

        Raises:
            ReplicaSetError: If there is no primary, or it refuses.
            ValueError: If `seconds` is not a positive whole number.
        """
        if type(seconds) is not int or seconds <= 0:
            raise ValueError(f"seconds must be a positive whole number, got {seconds!r}.")
        primary = self.wait_for_primary()
        if len(self.members) == 1 or not self._hand_over(primary, seconds):
            # Forced, it does not hand over: the others find out by their election timeout.
            command = {"replSetStepDown": seconds, "secondaryCatchUpPeriodSecs": 0, "force": True}
            primary._command(command, _COMMAND_SECONDS)
        return primary

    def fail_point(
        self,
        *commands: str,
        error_code: int | None = None,
        error_labels: Sequence[str] | None = None,
        close_connection: bool = False,
        block_ms: int | None = None,
        write_concern_error: Mapping[str, Any] | None = None,
        times: int | None = None,
        app_name: str | None = None,
        member: Member | None = None,
    ) -> FailPoint:
        """Describe a fail point: commands that one server shall fail inside a `with` block.

        Args:
            commands: Names of the commands (str), such as `"commitTransaction"`.
            error_code: Answer with this error instead of running the command (int | None).
            error_labels: The error labels of that answer (Sequence[str] | None); None leaves
                them to the server, an empty list removes them.
            close_connection: Close the connection instead of running the command (bool).
            block_ms: Wait before anything else, in milliseconds (int | None).
            write_concern_error: Run the command, then answer with this write concern error
                (Mapping[str, Any] | None); it needs a `code`.
            times: How many commands fail (int | None); None means all inside the block.
            app_name: Fail the commands of clients with this `appName` only (str | None).
            member: The server that fails them (Member | None); None means the one that is the
                primary when the block is entered.

        Returns:
            A context manager for `with` and `async with` (FailPoint).

        Raises:
            ValueError: If the arguments make no sense, or the member is not of this set.
        """
        settings = fail_point_settings(
            commands,
            error_code=error_code,
            error_labels=error_labels,
            close_connection=close_connection,
            block_ms=block_ms,
            write_concern_error=write_concern_error,
            times=times,
            app_name=app_name,
        )
        if member is None:
            return FailPoint(self.wait_for_primary, settings)
        own = self._own(member)
        return FailPoint(lambda: own, settings)

    def _prepare(self, members: Sequence[Member], deadline: float) -> None:
        config = config_for(_NAME, members, self._election_timeout_ms)
        try:
            members[0]._command({"replSetInitiate": config}, _COMMAND_SECONDS)
            await_ready(members, deadline)
            await_replication(members, deadline)
        except ServerStartError:
            raise
        except ReplicaSetError as error:
            raise ServerStartError(f"The replica set could not be set up: {error}") from error

    @staticmethod
    def _hand_over(primary: Member, seconds: int) -> bool:
        patience = min(seconds, _CATCH_UP_SECONDS)
        command = {"replSetStepDown": seconds, "secondaryCatchUpPeriodSecs": patience}
        try:
            primary._command(command, patience + _COMMAND_SECONDS)
        except ServerCommandError:
            return False  # nobody has caught up in that time
        return True

    def _own(self, member: Member) -> Member:
        if not any(member is own for own in self.members):
            raise ValueError(f"{member!r} is not a member of {self!r}.")
        return member

    def _alive(self, member: Member) -> Member:
        if not self._own(member).alive:
            raise ReplicaSetError(f"{member!r} is dead; restart() it first.")
        return member
