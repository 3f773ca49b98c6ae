"""A plugin for pytest: a server for the run, a rollback for each test, and two kinds of scrutiny.

Installed with the package. It works with pytest-asyncio and with the plugin of anyio.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NoReturn, TypeAlias

import pytest

from beanie_session_scope import (
    ClientMismatchError,
    ModelNotInitializedError,
    SessionScopeError,
    SessionScopeMixin,
)

from . import _force_retry, _leaks
from ._errors import ReplicaSetError
from ._replica_set import ReplicaSet
from ._rollback import SessionScopeRollback, holding, rolled_back
from ._run_server import CHANNEL, RunServer, SharedServer, server_of_run

__all__ = ["ReplicaSet", "SessionScopeRollback", "SharedServer"]

MARKER = "session_scope"
_MARKERS = {
    f"{MARKER}(collections=None, allow_requires_new=False)": "how session_scope_rollback opens the "
    "scope of this test: which classes it binds, and whether independent scopes, whose writes "
    "stay, may be opened.",
    _force_retry.MARKER: f"leave this test's transactions alone under {_force_retry.OPTION}.",
    _leaks.MARKER: f"let this test work outside its scopes under {_leaks.OPTION}.",
}
_HAS_PYTEST_ASYNCIO = find_spec("pytest_asyncio") is not None
_ARGUMENTS = {"allow_requires_new", "collections"}
_LEAKS_OPTION = "scope_detect_leaks"
_PLAN = "_session_scope_plan"
_ON_ANYIO = "_session_scope_on_anyio"
_ON_ASYNCIO = "_session_scope_on_asyncio_{}"

_RUN_SERVER = pytest.StashKey[RunServer]()

_Opened: TypeAlias = "tuple[SessionScopeRollback, dict[Any, Any]]"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options.

    Args:
        parser: pytest's (pytest.Parser).
    """
    group = parser.getgroup("beanie_session_scope")
    group.addoption(
        _force_retry.OPTION,
        action="store_true",
        help="Let the first attempt of every retrying form (run_in_transaction, @transactional, "
        "transaction_attempts) fail at its commit: finds what is not safe to run again.",
    )
    group.addoption(
        _leaks.OPTION,
        action="store_true",
        dest=_LEAKS_OPTION,
        help="Fail tests in which the collection of a class with the mixin was used outside the "
        "scope that was open, and say where.",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Watch the clients that a conftest.py creates, too.

    Args:
        early_config: pytest's configuration, before it is complete (pytest.Config).
    """
    if getattr(early_config.known_args_namespace, _LEAKS_OPTION, False):
        _watch(early_config)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and what the options ask for.

    Args:
        config: pytest's configuration (pytest.Config).
    """
    for name, meaning in _MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if config.getoption(_LEAKS_OPTION):
        _watch(config)
    if config.getoption(_force_retry.OPTION):
        config.pluginmanager.register(_force_retry.ForceRetry(), _force_retry.OPTION)


def _watch(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin(_leaks.OPTION):
        config.pluginmanager.register(_leaks.LeakDetector(), _leaks.OPTION)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a worker of pytest-xdist the way to the controller's server.

    Args:
        node: The worker (xdist.workermanage.WorkerController).
    """
    channel = node.gateway.newchannel()
    node.config.stash.setdefault(_RUN_SERVER, RunServer()).listen(channel)
    node.workerinput[CHANNEL] = channel


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the server of the workers.

    Args:
        config: pytest's configuration (pytest.Config).
    """
    if _RUN_SERVER in config.stash:
        config.stash[_RUN_SERVER].stop()


@pytest.fixture(scope="session")
def mongo_replica_set(pytestconfig: pytest.Config) -> Iterator[ReplicaSet | SharedServer]:
    """Give the MongoDB server of the test run: one, started when a test first asks for it.

    Args:
        pytestconfig: pytest's configuration (pytest.Config).

    Yields:
        A `ReplicaSet` of one node. In workers of pytest-xdist, which share one, and where the
        environment variable `MONGODB_URI` names a server, an object that has its `uri` alone.
    """
    with ExitStack() as stack:
        try:
            server = stack.enter_context(server_of_run(getattr(pytestconfig, "workerinput", {})))
        except (ReplicaSetError, ValueError) as error:
            _refuse(str(error))
        yield server


def _refuse(why: str) -> NoReturn:
    """End a fixture with a message alone: a traceback would show the values in its frames."""
    pytest.fail(why, pytrace=False)


@pytest.fixture
def session_scope_client() -> Any:
    """Say which client `session_scope_rollback` uses; to be overridden.

    Returns:
        `None`: the one on which the classes are initialised. An override returns the client,
        and asks for the fixture that calls `init_beanie`, so that this comes first.
    """
    return None


@pytest.fixture
def session_scope_collections() -> Iterable[type[SessionScopeMixin]] | None:
    """Say which classes `session_scope_rollback` binds; to be overridden.

    Returns:
        `None`: all that are initialised on the client.
    """
    return None


@dataclass
class _Plan:
    """What the scope of a test is to be, and what was wrong when it ended."""

    client: Any
    collections: Iterable[type[SessionScopeMixin]] | None
    allow_requires_new: bool
    failure: SessionScopeError | None = None


@pytest.fixture(name=_PLAN)
def _plan(
    request: pytest.FixtureRequest,
    session_scope_client: Any,
    session_scope_collections: Iterable[type[SessionScopeMixin]] | None,
) -> Iterator[_Plan]:
    marked = _marked(request.node)
    plan = _Plan(
        session_scope_client,
        marked.get("collections", session_scope_collections),
        marked.get("allow_requires_new", False),
    )
    yield plan
    # Raised by the fixture that opened the scope, it would keep pytest-asyncio from restoring
    # the context variables.
    if plan.failure is not None:
        raise plan.failure


@pytest.fixture
def session_scope_rollback(request: pytest.FixtureRequest) -> Iterator[SessionScopeRollback]:
    """Run the test, and the fixtures after this one, in a scope that is always rolled back.

    Args:
        request: pytest's (pytest.FixtureRequest).

    Yields:
        The scope, and the hooks that a commit would run (SessionScopeRollback).
    """
    rollback, variables = request.getfixturevalue(_opening_fixture(request))
    # Where the plugin that runs the test gives every fixture a context of its own, what was bound
    # in one would be lost. All these contexts are copies of this one.
    with holding(variables):
        yield rollback


def _marked(item: pytest.Item) -> dict[str, Any]:
    """Return what the marker of a test says; the nearest of several counts."""
    marker = item.get_closest_marker(MARKER)
    if marker is None:
        return {}
    allow = marker.kwargs.get("allow_requires_new", False)
    if marker.args or set(marker.kwargs) - _ARGUMENTS or not isinstance(allow, bool):
        _refuse(
            f"{item.nodeid}: write @pytest.mark.{MARKER}(collections=[Bike]) or "
            f"@pytest.mark.{MARKER}(allow_requires_new=True); it takes nothing else."
        )
    return dict(marker.kwargs)


def _opening_fixture(request: pytest.FixtureRequest) -> str:
    """Name the fixture that opens the scope on the event loop of the test."""
    item = request.node
    test = getattr(request.function, "hypothesis", request.function)
    if not inspect.iscoroutinefunction(getattr(test, "inner_test", test)):
        _refuse(f"{item.nodeid}: session_scope_rollback is for async tests, and this one is none.")
    if "anyio_backend" in request.fixturenames:
        backend = request.getfixturevalue("anyio_backend_name")
        if backend != "asyncio":
            _refuse(
                f"{item.nodeid}: Beanie and its drivers run on asyncio, and this test runs on "
                f"{backend}: let a fixture anyio_backend return 'asyncio'."
            )
        return _ON_ANYIO
    marker = item.get_closest_marker("asyncio")
    if marker is None or not _HAS_PYTEST_ASYNCIO:
        _refuse(
            f"{item.nodeid}: no plugin runs this async test. Mark it @pytest.mark.asyncio (with "
            "pytest-asyncio) or @pytest.mark.anyio."
        )
    return _ON_ASYNCIO.format(_loop_scope(marker, request.config))


def _loop_scope(marker: pytest.Mark, config: pytest.Config) -> str:
    """Return for how long the event loop of a test of pytest-asyncio lives."""
    own = marker.kwargs.get("loop_scope") or marker.kwargs.get("scope")
    if own is not None:
        return str(own)
    try:
        return str(config.getini("asyncio_default_test_loop_scope") or "function")
    except (KeyError, ValueError):  # older releases have no such setting
        return "function"


@asynccontextmanager
async def _opened(plan: _Plan) -> AsyncIterator[_Opened]:
    scope = rolled_back(plan.client, plan.collections, plan.allow_requires_new)
    try:
        opened = await scope.__aenter__()
    except (ClientMismatchError, ModelNotInitializedError) as error:
        raise type(error)(
            f"session_scope_rollback: {error.args[0]} In a conftest.py, override the fixture "
            "session_scope_client: let it return the client, and ask for the fixture that calls "
            "init_beanie, which has to come first."
        ) from error
    try:
        yield opened
    finally:
        try:
            await scope.__aexit__(None, None, None)
        except SessionScopeError as error:
            plan.failure = error


@pytest.fixture(name=_ON_ANYIO)
async def _opened_on_anyio(_session_scope_plan: _Plan) -> AsyncIterator[_Opened]:
    async with _opened(_session_scope_plan) as opened:
        yield opened


def _opened_on_asyncio(loop_scope: Any) -> Any:
    """Make the fixture for tests whose event loop lives that long."""
    import pytest_asyncio

    @pytest_asyncio.fixture(name=_ON_ASYNCIO.format(loop_scope), loop_scope=loop_scope)
    async def opened_on_asyncio(_session_scope_plan: _Plan) -> AsyncIterator[_Opened]:
        async with _opened(_session_scope_plan) as opened:
            yield opened

    return opened_on_asyncio


if _HAS_PYTEST_ASYNCIO:
    for _each in ("function", "class", "module", "package", "session"):
        globals()[f"_opened_on_asyncio_{_each}"] = _opened_on_asyncio(_each)
