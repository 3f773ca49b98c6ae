"""How the package hangs together: imports go one way, and what is not public stays inside."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import beanie_session_scope

PACKAGE = Path(beanie_session_scope.__file__).parent
LAYERS = (
    "errors",
    "log",
    "observers",
    "drivers",
    "waiting",
    "deadline",
    "lifetime",
    "memory",
    "hooks",
    "channel",
    "binding",
    "options",
    "state",
    "outcome",
    "transaction",
    "scope",
    "collection",
    "cascade",
    "mixin",
    "plan",
    "blocks",
    "retry",
    "__init__",
)
INTEGRATIONS = ("asgi", "migration", "telemetry", "testing")


def imported(file: Path) -> set[str]:
    """Return the modules of the package that a file imports when it is imported itself."""
    found = set()
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found.add(node.module or "__init__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            found.add((node.module or "").removeprefix(PACKAGE.name).lstrip(".") or "__init__")
    return found


def test_every_module_has_a_layer() -> None:
    modules = {file.stem for file in PACKAGE.glob("*.py")}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert modules | packages == {*LAYERS, *INTEGRATIONS}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_module_imports_only_those_below_it(layer: str) -> None:
    assert imported(PACKAGE / f"{layer}.py") <= set(LAYERS[: LAYERS.index(layer)])


@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_an_integration_imports_only_what_is_public(integration: str) -> None:
    files = [*(PACKAGE / integration).glob("*.py"), *PACKAGE.glob(f"{integration}.py")]
    own = {file.stem for file in files} - {integration} | {"__init__"}
    assert files
    for file in files:
        assert imported(file) <= own


def test_only_the_driver_layer_and_one_place_ask_which_beanie_is_installed() -> None:
    asking = {
        file.stem for file in PACKAGE.rglob("*.py") if 'hasattr(Document, "get_' in file.read_text()
    }
    assert asking == {"drivers", "mixin"}


def test_all_public_names_are_there() -> None:
    assert sorted(beanie_session_scope.__all__) == beanie_session_scope.__all__
    for name in beanie_session_scope.__all__:
        assert getattr(beanie_session_scope, name).__doc__


@pytest.mark.parametrize(
    ("module", "file"),
    [
        (PACKAGE.name, "public_api"),
        *((f"{PACKAGE.name}.{each}", "integrations") for each in INTEGRATIONS),
        (f"{PACKAGE.name}.testing.plugin", "integrations"),
    ],
)
def test_the_types_of_every_public_name_are_checked(module: str, file: str) -> None:
    tree = ast.parse((Path(__file__).parent / "typecheck" / f"{file}.py").read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(importlib.import_module(module).__all__) <= used
