"""tox plugin: find the Python interpreters of pyenv and uv, not only those on PATH.

tox loads this file by its name. For every minor version of Python in ``env_list``
it looks for one working interpreter and adds it to what ``--discover`` names, which
comes first.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tox.plugin import impl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tox.config.sets import ConfigSet
    from tox.session.state import State

PROBE = "import sys; print('%s %d.%d' % ((sys.implementation.name,) + sys.version_info[:2]))"


def output_of(*command: str) -> str:
    """The standard output of a command; empty when it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
            text=True,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def newest_first(path: Path) -> list[int]:
    """Sort key of an installation's folder, e.g. ``3.12.1`` or ``cpython-3.12.1-linux-x86_64``."""
    return [-int(number) for number in re.findall(r"\d+", path.name)]


def install_roots() -> Iterator[Path]:
    """The folders that hold one folder per installed Python."""
    pyenv = os.environ.get("PYENV_ROOT") or output_of("pyenv", "root")
    yield (Path(pyenv) if pyenv else Path.home() / ".pyenv") / "versions"
    uv = os.environ.get("UV_PYTHON_INSTALL_DIR") or output_of("uv", "python", "dir")
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    yield Path(uv) if uv else Path(data) / "uv" / "python"


def candidates(name: str, roots: list[Path]) -> Iterator[str]:
    """Paths where an interpreter called e.g. ``python3.12`` may be, the best first."""
    if on_path := shutil.which(name):
        yield on_path
    for root in roots:
        if root.is_dir():
            for install in sorted(root.iterdir(), key=newest_first):
                executable = install / "bin" / name
                if executable.is_file():
                    yield str(executable)


def find_interpreters(versions: list[str]) -> dict[str, str]:
    """The first working CPython of each version, by version."""
    running = "{}.{}".format(*sys.version_info[:2])
    roots = list(install_roots())
    found = {}
    for version in versions:
        if version == running and sys.implementation.name == "cpython":
            found[version] = sys.executable
            continue
        for path in candidates(f"python{version}", roots):
            # A pyenv shim on PATH may exist and still refuse to run.
            if output_of(path, "-c", PROBE) == f"cpython {version}":
                found[version] = path
                break
    return found


@impl
def tox_add_core_config(core_conf: ConfigSet, state: State) -> None:
    """Add the interpreters to those tox tries first."""
    options = state.conf.options
    if not hasattr(options, "discover"):  # a subcommand that needs no interpreter
        return
    env_list = "\n".join(core_conf["env_list"])
    minors = sorted({int(minor) for minor in re.findall(r"\bpy3(\d+)\b", env_list)})
    versions = [f"3.{minor}" for minor in minors]
    found = find_interpreters(versions)
    options.discover = [*options.discover, *found.values()]
    for version in versions:
        logging.debug("Python %s: %s", version, found.get(version, "not found"))
