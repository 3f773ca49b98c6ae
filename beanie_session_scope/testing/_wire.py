"""Send one command to one server, over a socket of its own.

A `MongoClient` would do, but it brings background threads, connection pools, a handshake that
fail points can hit, and warnings after a fork. This is a single OP_MSG and its reply.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, TypeVar

import bson

from ._errors import ServerCommandError

_OP_MSG = 2013
_HEADER = struct.Struct("<iiii")
# Four bytes of flags and one of section kind stand between the header and the document.
_PREAMBLE = struct.Struct("<IB")
_POLL_SECONDS = 0.01

T = TypeVar("T")


def run_command(
    address: tuple[str, int], command: Mapping[str, Any], timeout: float
) -> dict[str, Any]:
    """Run a command on the `admin` database of one server.

    Args:
        address: Host and port (tuple[str, int]).
        command: The command, its name first (Mapping[str, Any]).
        timeout: How long each network step may take, in seconds (float).

    Returns:
        The server's reply (dict[str, Any]).

    Raises:
        OSError: If the server can't be reached, hangs up or is too slow.
        ServerCommandError: If the server answers with an error.
    """
    body = bson.encode({**command, "$db": "admin"})
    length = _HEADER.size + _PREAMBLE.size + len(body)
    with socket.create_connection(address, timeout) as connection:
        connection.sendall(_HEADER.pack(length, 1, 0, _OP_MSG) + _PREAMBLE.pack(0, 0) + body)
        with connection.makefile("rb") as stream:
            reply = _read_reply(stream)
    _raise_for_error(reply, next(iter(command)), address)
    return reply


def wait_for(probe: Callable[[], T | None], timeout: float) -> T | None:
    """Call a probe again and again until it returns something.

    Args:
        probe: What to call (Callable[[], T | None]); None means "not yet".
        timeout: How long to go on, in seconds (float); the probe is called at least once.

    Returns:
        What the probe returned (T), or None when the time is over.
    """
    deadline = time.monotonic() + timeout
    while (found := probe()) is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return found


def _read_reply(stream: BinaryIO) -> dict[str, Any]:
    length = _HEADER.unpack(_read_exactly(stream, _HEADER.size))[0]
    rest = _read_exactly(stream, length - _HEADER.size)
    return bson.decode(rest[_PREAMBLE.size :])


def _read_exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise ConnectionError("The server closed the connection before it had answered.")
    return data


def _raise_for_error(reply: Mapping[str, Any], name: str, address: tuple[str, int]) -> None:
    error = reply if not reply.get("ok") else reply.get("writeConcernError")
    if error:
        code = int(error.get("code", 0))
        reason = error.get("errmsg", "no reason given")
        where = f"{address[0]}:{address[1]}"
        raise ServerCommandError(f"{name} failed on {where}: {reason} (code {code})", code)
