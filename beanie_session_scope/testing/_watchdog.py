"""Kill the servers of a Python process that has died, and remove their data directory.

This file runs as a program of its own: `python -I -S _watchdog.py DIRECTORY PARENT_PID`. Its
standard input is a pipe from the parent, which writes a line when it has cleaned up by itself. The
kernel closes the pipe however the parent ends, also by SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_POLL_SECONDS = 1.0
_CLEAN_UP_SECONDS = 30.0


def main(directory: str, parent: int) -> None:
    """Wait until the parent is done or dead; in the second case clean up after it.

    Args:
        directory: The directory that holds the data of all the parent's servers (str).
        parent: The process id of the parent (int).
    """
    if not _parent_cleaned_up(parent):
        _kill_servers(directory)
        shutil.rmtree(directory, ignore_errors=True)


def _parent_cleaned_up(parent: int) -> bool:
    while True:
        readable, _, _ = select.select([sys.stdin], [], [], _POLL_SECONDS)
        if readable:
            return bool(os.read(sys.stdin.fileno(), 1))
        # A forked child of the parent may still hold the pipe open after the parent has died.
        if os.getppid() != parent:
            return False


def _kill_servers(directory: str) -> None:
    # A server may be about to appear (the parent died between fork and exec): look twice.
    deadline = time.monotonic() + _CLEAN_UP_SECONDS
    quiet_rounds = 0
    while quiet_rounds < 2 and time.monotonic() < deadline:
        pids = list(_servers(directory))
        quiet_rounds = 0 if pids else quiet_rounds + 1
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _servers(directory: str) -> Iterator[int]:
    # Servers are known by their command line rather than by a noted process id, which the system
    # may have given to some innocent process since.
    for pid, arguments in _from_proc() if _PROC.joinpath("self").exists() else _from_ps():
        if f"--dbpath {directory}/" in arguments:
            yield pid


def _from_proc() -> Iterator[tuple[int, str]]:
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has died since it was listed
            yield int(entry.name), os.fsdecode(line.replace(b"\0", b" "))


def _from_ps() -> Iterator[tuple[int, str]]:
    listing = subprocess.run(
        ["ps", "-axww", "-o", "pid=,command="], capture_output=True, text=True, check=False
    )
    for line in listing.stdout.splitlines():
        pid, _, arguments = line.strip().partition(" ")
        yield int(pid), arguments


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
