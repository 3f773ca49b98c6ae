"""Make a server fail commands on purpose, with its `failCommand` fail point."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from ._errors import ReplicaSetError
from ._group import enter_in_thread
from ._server import Member

_NAME = "failCommand"
_TIMEOUT_SECONDS = 10.0


class FailPoint:
    """Make one server fail some commands inside a `with` or `async with` block.

    Made by `ReplicaSet.fail_point`. It is turned off at the end of the block, however that ends.
    """

    def __init__(self, find_member: Callable[[], Member], settings: Mapping[str, Any]) -> None:
        """Describe the fail point without turning it on.

        Args:
            find_member: Finds the server on entry (Callable[[], Member]).
            settings: `mode` and `data` of the server's command (Mapping[str, Any]).
        """
        self._find_member = find_member
        self._settings = settings
        self._member: Member | None = None

    def __repr__(self) -> str:
        """Show what the server is told.

        Returns:
            A short description (str).
        """
        return f"<FailPoint {dict(self._settings)}>"

    @property
    def member(self) -> Member:
        """Return the server on which the fail point is, or was last, on.

        Returns:
            A member of the set (Member).

        Raises:
            ReplicaSetError: If it has not been turned on yet.
        """
        if self._member is None:
            raise ReplicaSetError(f"{self!r} has not been turned on; use it in a `with` block.")
        return self._member

    def __enter__(self) -> FailPoint:
        """Turn the fail point on.

        Returns:
            This object (FailPoint).

        Raises:
            ReplicaSetError: If there is no server to turn it on, or that server has one on.
        """
        member = self._find_member()
        # The server has a single failCommand: the second would silently replace the first.
        if member._fail_point is not None:
            raise ReplicaSetError(
                f"{member!r} has a fail point on already: {member._fail_point!r}. A server can "
                "have only one at a time; leave its block first, or name all commands in it."
            )
        member._command({"configureFailPoint": _NAME, **self._settings}, _TIMEOUT_SECONDS)
        member._fail_point = self
        self._member = member
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Turn the fail point off; if the server is paused, as soon as it is resumed."""
        member = self.member
        if member.paused:
            member._on_resume.append(self._turn_off)
        else:
            self._turn_off()

    async def __aenter__(self) -> FailPoint:
        """Turn the fail point on without blocking the event loop.

        Returns:
            This object (FailPoint).
        """
        await enter_in_thread(self.__enter__, self._turn_off)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Turn the fail point off without blocking the event loop."""
        await asyncio.to_thread(self.__exit__, kind, error, traceback)

    def _turn_off(self) -> None:
        member = self.member
        # A server that has been restarted meanwhile has forgotten it.
        if member._fail_point is not self:
            return
        member._fail_point = None
        try:
            member._command({"configureFailPoint": _NAME, "mode": "off"}, _TIMEOUT_SECONDS)
        except ReplicaSetError:
            if member.alive:
                raise


def fail_point_settings(
    commands: Sequence[str],
    *,
    error_code: int | None,
    error_labels: Sequence[str] | None,
    close_connection: bool,
    block_ms: int | None,
    write_concern_error: Mapping[str, Any] | None,
    times: int | None,
    app_name: str | None,
) -> dict[str, Any]:
    """Check the arguments of `ReplicaSet.fail_point` and translate them for the server.

    Args:
        commands: See `ReplicaSet.fail_point`, as for all of these.
        error_code: See there.
        error_labels: See there.
        close_connection: See there.
        block_ms: See there.
        write_concern_error: See there.
        times: See there.
        app_name: See there.

    Returns:
        `mode` and `data` for `configureFailPoint` (dict[str, Any]).

    Raises:
        ValueError: If an argument makes no sense.
    """
    _check_commands(commands)
    _check_positive(error_code=error_code, block_ms=block_ms, times=times)
    _check_labels(error_labels, error_code is not None or write_concern_error is not None)
    _check_outcome(error_code is not None, close_connection, write_concern_error, block_ms)
    given: dict[str, Any] = {
        "failCommands": list(commands),
        "errorCode": error_code,
        "errorLabels": None if error_labels is None else list(error_labels),
        "closeConnection": close_connection or None,
        "blockConnection": None if block_ms is None else True,
        "blockTimeMS": block_ms,
        "writeConcernError": write_concern_error,
        "appName": app_name,
    }
    data = {name: value for name, value in given.items() if value is not None}
    return {"mode": "alwaysOn" if times is None else {"times": times}, "data": data}


def _check_commands(commands: Sequence[object]) -> None:
    if not commands or not all(isinstance(name, str) and name for name in commands):
        raise ValueError(
            "Name the commands that shall fail, each as an argument of its own, as in "
            f'fail_point("insert", "commitTransaction", ...); got {list(commands)!r}.'
        )


def _check_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and (type(number) is not int or number <= 0):
            raise ValueError(f"{name} must be a positive whole number or None, got {number!r}.")


def _check_labels(error_labels: Sequence[str] | None, has_error: bool) -> None:
    if error_labels is None:
        return
    if isinstance(error_labels, str):
        raise ValueError(f"error_labels must be a list of labels, got the str {error_labels!r}.")
    if not has_error:
        raise ValueError("error_labels need an error to stand on: give error_code as well.")


def _check_outcome(
    has_code: bool,
    close_connection: bool,
    write_concern_error: Mapping[str, Any] | None,
    block_ms: int | None,
) -> None:
    if write_concern_error is not None and "code" not in write_concern_error:
        raise ValueError("write_concern_error needs a 'code', as in {'code': 64, 'errmsg': '...'}.")
    outcomes = [has_code, close_connection, write_concern_error is not None]
    if sum(outcomes) > 1:
        raise ValueError(
            "A command can fail in one way only: give one of error_code, close_connection and "
            "write_concern_error."
        )
    if not any(outcomes) and block_ms is None:
        raise ValueError(
            "The fail point has nothing to do: give error_code, close_connection, block_ms or "
            "write_concern_error."
        )
