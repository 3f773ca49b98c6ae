"""Build the wheel and the sdist, and check them outside the source tree.

Run by the ``wheel`` environment of tox; pytest does not collect this file.
"""

from __future__ import annotations

import configparser
import email.message
import email.parser
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "beanie_session_scope"

IMPORT_CHECK = f"""
import importlib.metadata, pathlib, sys
import {PACKAGE} as package
location = pathlib.Path(package.__file__).resolve()
assert location.is_relative_to(pathlib.Path(sys.prefix).resolve()), location
for name in package.__all__:
    getattr(package, name)
version = importlib.metadata.version("{PACKAGE}")
assert getattr(package, "__version__", version) == version, package.__version__
print("imported", "{PACKAGE}", version, "with Beanie", importlib.metadata.version("beanie"))
"""


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command; fail when it does."""
    subprocess.run([str(part) for part in command], cwd=cwd, check=True, stdin=subprocess.DEVNULL)


def package_files() -> set[str]:
    """What the tree holds of the package, and a release therefore must."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / PACKAGE).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def check_names(what: str, actual: set[str], expected: set[str]) -> None:
    """Fail, naming the differences, unless both sets of file names are equal."""
    problems = [f"  missing:    {name}" for name in sorted(expected - actual)]
    problems += [f"  unexpected: {name}" for name in sorted(actual - expected)]
    if problems:
        sys.exit("\n".join([f"{what} holds the wrong files:", *problems]))
    print(f"{what}: {len(actual)} files, as expected")


def check_wheel(path: Path) -> email.message.Message:
    """The wheel holds the package, its licence and nothing else; return its metadata."""
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(metadata_name).decode())
        info = PurePosixPath(metadata_name).parent
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
    expected = {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }
    check_names(path.name, names, package_files() | {f"{info}/{name}" for name in expected})
    if licence != (ROOT / "LICENSE").read_text(encoding="utf-8"):
        sys.exit("the wheel's LICENSE differs from the tree's")
    return metadata


def check_sdist(path: Path) -> None:
    """The sdist holds what the wheel is built from and nothing else."""
    with tarfile.open(path) as archive:
        names = {
            PurePosixPath(member.name).relative_to(path.name.removesuffix(".tar.gz")).as_posix()
            for member in archive.getmembers()
            if member.isfile()
        }
    names = {name for name in names if not name.startswith(f"{PACKAGE}.egg-info/")}
    expected = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    check_names(path.name, names, package_files() | expected)


def check_metadata(metadata: email.message.Message) -> None:
    """The metadata agrees with the files of the tree that repeat a part of it."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    lines = tox["testenv:floor-beanie{1,2}"]["deps"].split("\n")
    pins = [Requirement(line[9:]) for line in lines if line.startswith("beanie1: ")]
    (pinned,) = (str(pin.specifier).removeprefix("==") for pin in pins if pin.name == "beanie")
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    runtime = {
        requirement.name: str(requirement.specifier)
        for requirement in requirements
        if requirement.marker is None
    }
    if set(runtime) != {"beanie", "pydantic"}:
        sys.exit(f"unexpected run-time requirements: {runtime}")
    if runtime["beanie"] != f">={pinned}":
        sys.exit(f"setup.cfg wants beanie{runtime['beanie']}, tox.ini's floor is {pinned}")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if str(metadata.get_payload()).strip() != readme.strip():
        sys.exit("the long description is not the README")


def check_install(wheel: Path, folder: Path) -> None:
    """The wheel can be installed into an empty environment, and imported there."""
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=folder)
    run(python, "-m", "pip", "check", cwd=folder)
    run(python, "-I", "-W", "error", "-c", IMPORT_CHECK, cwd=folder)


def main() -> None:
    """Build, look and install."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The wheel is built from the sdist, so that the sdist is known to be complete.
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        (sdist,) = (folder / "dist").glob("*.tar.gz")
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=folder)
        check_sdist(sdist)
        check_metadata(check_wheel(wheel))
        check_install(wheel, folder)


if __name__ == "__main__":
    main()
