"""`--scope-detect-leaks`: what should be in the transaction, and is not.

A listener sees every command that a driver sends. Where a scope is open and the command works on
the collection of a class with the mixin, it must carry the scope's session. It does not where code
goes past the class: through the driver, through a class without the mixin, or through a class
that the scope does not bind. Such a command commits by itself, or reads what is not there yet.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
from pymongo import monitoring

from beanie_session_scope import (
    ModelNotInitializedError,
    ScopeClosedError,
    ScopeObserver,
    SessionScope,
    SessionScopeMixin,
    collection_of,
    current_scope,
    is_outside,
    observe,
)

from ._call_site import CallSite, call_site, tracked_call_sites

OPTION = "--scope-detect-leaks"
MARKER = "no_detect_leaks"

_WITH_COLLECTION = frozenset(
    {
        "aggregate",
        "count",
        "create",
        "createIndexes",
        "delete",
        "distinct",
        "drop",
        "dropIndexes",
        "find",
        "findAndModify",
        "insert",
        "mapReduce",
        "update",
    }
)
"""The commands whose value is the name of the collection, but for those on its metadata."""

_ADVICE = (
    "These operations are not part of the transaction. Go through the class; or pass the scope's "
    "session to the driver; or name the class in collections=. Where it is meant, write it under "
    f"outside_session(), or mark the test: @pytest.mark.{MARKER}."
)


class Leak(NamedTuple):
    """One kind of finding; equal ones are counted.

    Attributes:
        what: What happened (str).
        where: The line that led there (CallSite), or None where no code of the user did.
    """

    what: str
    where: CallSite | None


class _Listener(monitoring.CommandListener):
    """The listener that PyMongo keeps for good; it asks the detector of the run, if any."""

    def __init__(self) -> None:
        self.detector: LeakDetector | None = None
        self._registered = False

    def register(self) -> None:
        if not self._registered:
            monitoring.register(self)
            self._registered = True

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if self.detector is not None:
            self.detector.check(event)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        """Not of interest."""

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        """Not of interest."""


_LISTENER = _Listener()


class LeakDetector(ScopeObserver):
    """Fails the tests in which operations were outside the scope that was open.

    A plugin of pytest, and an observer of scopes.
    """

    def __init__(self) -> None:
        """Watch every client that is created from now on."""
        self._leaks: list[Leak] = []  # Motor's threads add to it, too
        self._open: list[SessionScope] = []
        self._watching = ExitStack()
        self._before = _LISTENER.detector
        _LISTENER.register()
        _LISTENER.detector = self
        self._watching.callback(observe(self))
        self._watching.enter_context(tracked_call_sites())

    def pytest_unconfigure(self) -> None:
        """Watch no longer."""
        _LISTENER.detector = self._before
        self._watching.close()

    def pytest_report_header(self) -> str:
        """Say that the option is on.

        Returns:
            A line for the head of the report (str).
        """
        return f"beanie_session_scope: operations outside an open scope fail their test ({OPTION})"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fail a test whose fixtures have leaked.

        Args:
            item: The test (pytest.Item).
        """
        return (yield from self._judge(item, "setup"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fail a test that has leaked.

        Args:
            item: The test (pytest.Item).
        """
        return (yield from self._judge(item, "call"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fail a test whose fixtures have leaked when they ended.

        Args:
            item: The test (pytest.Item).
        """
        return (yield from self._judge(item, "teardown"))

    def _judge(self, item: pytest.Item, when: str) -> Generator[None, object, object]:
        try:
            result = yield
        except BaseException:
            if report := self._report(item):
                item.add_report_section(when, "session scope leaks", report)
            raise
        if report := self._report(item):
            pytest.fail(report, pytrace=False)
        return result

    def _report(self, item: pytest.Item) -> str:
        leaks, self._leaks = self._leaks, []
        if not leaks or item.get_closest_marker(MARKER) is not None:
            return ""
        lines = [f"  {_line(leak, count)}" for leak, count in Counter(leaks).items()]
        return "\n".join([f"Outside the open session scope ({OPTION}):", *lines, _ADVICE])

    def scope_entered(self, scope: SessionScope) -> None:
        """Note which transactions there are, and that the commands of a client are seen.

        Args:
            scope: The scope that was entered (SessionScope).
        """
        self._open.append(scope)
        options = getattr(scope.client, "options", None)
        if options is not None and _LISTENER not in options.event_listeners:
            self._note(
                "the client of this scope was created before pytest was configured, so nothing "
                "can be seen of it: create it in a fixture"
            )

    def scope_left(
        self, scope: SessionScope, error: BaseException | None, retry_in: float | None
    ) -> None:
        """Forget a transaction.

        Args:
            scope: The scope that was left (SessionScope).
            error: What ended it (BaseException | None).
            retry_in: When the block is run again, in seconds (float | None).
        """
        self._open = [each for each in self._open if each is not scope]

    def check(self, event: monitoring.CommandStartedEvent) -> None:
        """Note a command that should be in a transaction, and is not.

        Args:
            event: The command (pymongo.monitoring.CommandStartedEvent).
        """
        try:
            for namespace in _namespaces(event):
                leaking = sorted(m.__name__ for m in self._bypassed(event, namespace))
                if leaking:
                    named = f"{event.command_name} on {'.'.join(namespace)}"
                    self._note(f"{named} (class {', '.join(leaking)})")
        except Exception as error:
            # The driver would only print it, and the test would pass.
            last = traceback.extract_tb(error.__traceback__)[-1]
            self._note(f"the detector failed: {type(error).__name__} in {last.name}()")

    def _note(self, what: str) -> None:
        self._leaks.append(Leak(what, call_site()))

    def _bypassed(
        self, event: monitoring.CommandStartedEvent, namespace: tuple[str, str]
    ) -> list[type[SessionScopeMixin]]:
        """Return the classes of a collection whose scope a command has left out."""
        scope = current_scope()
        classes = [(model, client) for model, found, client in _classes() if found == namespace]
        if any(is_outside(model) for model, _ in classes):
            return []
        concerned = []
        for model, client in classes:
            sessions = [_session_of(model)]
            if scope is not None and scope.client is client:
                sessions.append(scope.session)
            if any(session is not None for session in sessions):
                concerned.append(model)
                sessions += [each.session for each in self._open]
                if any(_carries(event, session) for session in sessions if session is not None):
                    return []
        return concerned


def _namespaces(event: monitoring.CommandStartedEvent) -> Iterator[tuple[str, str]]:
    """Yield the databases and collections whose documents a command works on."""
    name, command, database = event.command_name, event.command, event.database_name
    if name in _WITH_COLLECTION and isinstance(command[name], str):
        yield database, command[name]
    elif name == "getMore":
        yield database, command["collection"]
    elif name == "renameCollection":
        yield _split(command[name])
    elif name == "bulkWrite":
        yield from (_split(each["ns"]) for each in command["nsInfo"])


def _split(namespace: str) -> tuple[str, str]:
    database, _, collection = namespace.partition(".")
    return database, collection


def _classes() -> Iterator[tuple[type[SessionScopeMixin], tuple[str, str], Any]]:
    """Yield the initialised classes, each with its database and collection, and its client."""
    for model in _subclasses(SessionScopeMixin):
        try:
            collection = collection_of(model)
        except ModelNotInitializedError:
            continue
        database = collection.database
        yield model, (database.name, collection.name), database.client


def _subclasses(
    of: type[SessionScopeMixin],
) -> Iterator[type[SessionScopeMixin]]:
    found: dict[type[SessionScopeMixin], None] = {}
    waiting = of.__subclasses__()
    while waiting:
        model = waiting.pop()
        if model not in found:
            found[model] = None
            waiting += model.__subclasses__()
    return iter(found)


def _session_of(model: type[SessionScopeMixin]) -> Any:
    try:
        return model.get_session()
    except ScopeClosedError:
        return None  # that scope is over, and no other is open here


def _carries(event: monitoring.CommandStartedEvent, session: Any) -> bool:
    """Tell whether a command belongs to a session, and to its transaction if it has one."""
    if session.has_ended or event.command.get("lsid") != session.session_id:
        return False
    return not session.in_transaction or event.command.get("autocommit") is False


def _line(leak: Leak, count: int) -> str:
    where = "somewhere in a library, in a task or thread of its own"
    if leak.where is not None:
        where = f"{_relative(leak.where.file)}:{leak.where.line} in {leak.where.function}()"
    return f"{where}: {leak.what}{f', {count} times' if count > 1 else ''}"


def _relative(file: str) -> str:
    shorter = os.path.relpath(file)
    return file if shorter.startswith("..") else shorter
