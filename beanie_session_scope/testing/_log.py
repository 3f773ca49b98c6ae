"""Read the end of a server's log, and tell from it why the server did not start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ._errors import PortTakenError, ServerStartError

_LINE_LENGTH = 300
_EARLIER_ERRORS = 5
_PORT_TAKEN = "address already in use"
_BAD_PARAMETER = ("setparameter", "parsing command line", "unrecognised option", "badvalue:")


def tail(path: Path, lines: int) -> str:
    """Return the last lines of a log in a readable form, after the errors that precede them.

    Args:
        path: The log file (pathlib.Path).
        lines: How many lines at most (int).

    Returns:
        The lines (str), or `(empty)`.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"(can't be read: {error})"
    entries = [_readable(line)[:_LINE_LENGTH] for line in text.splitlines()]
    # A server that gives up logs its whole shutdown after the one line that says why.
    errors = [entry for entry in entries[:-lines] if entry.startswith(("E ", "F "))]
    return "\n".join([*errors[-_EARLIER_ERRORS:], *entries[-lines:]]) or "(empty)"


def start_error(address: str, reason: str, log: str) -> ServerStartError:
    """Make the error for a server that did not start.

    Args:
        address: Where it was to listen (str).
        reason: What was seen from outside (str), as in "mongod {reason}".
        log: The end of the server's log (str).

    Returns:
        The error to raise (ServerStartError), saying the cause and what to do.
    """
    lower = log.lower()
    end = f"The end of the server's log:\n{log or '(empty)'}"
    if _PORT_TAKEN in lower:
        return PortTakenError(
            f"The port is taken: mongod could not listen on {address}, because another process "
            f"does. Choose another port, or leave it out to have a free one chosen. {end}"
        )
    hint = "Check that it is a MongoDB server for this machine (see find_mongod() and MONGOD)."
    if any(word in lower for word in _BAD_PARAMETER):
        hint = "It refused one of its parameters: check set_parameters."
    return ServerStartError(f"mongod for {address} {reason}. {hint} {end}")


def _readable(line: str) -> str:
    try:
        entry: Any = json.loads(line)
        return f"{entry['s']} {entry['c']} {entry['msg']} {json.dumps(entry.get('attr', {}))}"
    except (ValueError, KeyError, TypeError):
        return line  # what is printed before the log opens is plain text
