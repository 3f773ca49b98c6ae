"""A temporary directory for servers, guarded by a watchdog process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_WATCHDOG = Path(__file__).with_name("_watchdog.py")
_DISMISS_SECONDS = 10.0


class Sandbox:
    """Hold a temporary directory that, with its servers, does not outlive this process.

    Attributes:
        path: The directory (pathlib.Path).
    """

    def __init__(self) -> None:
        """Make the directory and start its watchdog.

        Raises:
            OSError: If either can't be done; nothing is left behind then.
        """
        self.path = Path(tempfile.mkdtemp(prefix="beanie-session-scope-"))
        self._owner = os.getpid()
        try:
            self._watchdog = self._start_watchdog()
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    @property
    def is_ours(self) -> bool:
        """Tell whether this process made the directory, rather than a parent that forked it.

        Returns:
            True if so (bool).
        """
        return os.getpid() == self._owner

    def remove(self) -> None:
        """Remove the directory and dismiss the watchdog; the servers must have ended before."""
        shutil.rmtree(self.path, ignore_errors=True)
        try:
            self._watchdog.communicate(b"done\n", timeout=_DISMISS_SECONDS)
        except subprocess.TimeoutExpired:
            self._watchdog.kill()
            self._watchdog.wait()

    def disown(self) -> None:
        """Let go of the watchdog in a forked child, without a word to it."""
        disown(self._watchdog)
        if self._watchdog.stdin is not None:
            self._watchdog.stdin.close()

    def _start_watchdog(self) -> subprocess.Popen[bytes]:
        # Its own session keeps Ctrl-C in the terminal, and signals to our process group, from
        # ending it before its work is done. Python creates the write end of the pipe
        # non-inheritable, so no other program that we start can hold it open.
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WATCHDOG), str(self.path), str(self._owner)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )


def disown(process: subprocess.Popen[bytes]) -> None:
    """Make a forked child's copy of a `Popen` object harmless.

    Args:
        process: The object (subprocess.Popen[bytes]); its process goes on.
    """
    # Without a return code the object would warn, as it goes, that its process still runs.
    process.returncode = 0
