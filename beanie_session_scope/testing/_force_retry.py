"""`--scope-force-retry`: every transaction that may be run again is run again.

MongoDB asks for that rarely on a developer's machine, so code that must not run twice passes its
tests. Here the first attempt of every retrying form fails just before its commit, with the error
of a write conflict, and is rolled back on the server.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import pytest
from pymongo.errors import OperationFailure

from beanie_session_scope import ScopeObserver, SessionScope, TransactionAttempt, observe

OPTION = "--scope-force-retry"
MARKER = "no_force_retry"

_WRITE_CONFLICT = 112  # the server's code of that name
_TRANSIENT = "TransientTransactionError"


class ForceRetry(ScopeObserver):
    """Fails first attempts, and tells in the report of a failed test how many there were.

    A plugin of pytest, and an observer of scopes.
    """

    def __init__(self) -> None:
        """Start with no test running."""
        self._item: pytest.Item | None = None
        self._forced = 0
        self._stop: Callable[[], None] = observe(self)

    def pytest_unconfigure(self) -> None:
        """Let transactions be."""
        self._stop()

    def pytest_report_header(self) -> str:
        """Say that the option is on.

        Returns:
            A line for the head of the report (str).
        """
        return f"beanie_session_scope: every first attempt of a transaction fails ({OPTION})"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Know which test runs.

        Args:
            item: The test (pytest.Item).
        """
        self._item, self._forced = item, 0
        try:
            return (yield)
        finally:
            self._item = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Say in the report of a test how many attempts have failed here.

        Args:
            item: The test (pytest.Item).
        """
        try:
            return (yield)
        finally:
            if self._forced:
                item.add_report_section(
                    "call",
                    "session scope",
                    f"{OPTION} made the first attempt of {self._forced} transactions fail; each "
                    "was rolled back, and run again.",
                )

    def transaction_started(self, scope: SessionScope) -> None:
        """Let a first attempt fail; also after an ``abort()`` in it, which drops the hooks.

        Args:
            scope: The scope whose transaction begins (SessionScope).
        """
        spared = self._item is not None and self._item.get_closest_marker(MARKER) is not None
        if not spared and isinstance(scope, TransactionAttempt) and scope.number == 1:
            self._fail_at_commit(scope)

    def _fail_at_commit(self, scope: SessionScope) -> None:
        def fail() -> None:
            if scope.hooks.before_commit:  # the user's come first: they belong to the attempt
                scope.before_commit(fail)
                return
            self._forced += 1
            raise OperationFailure(
                f"simulated by {OPTION}: the transaction met a write conflict",
                _WRITE_CONFLICT,
                {"errorLabels": [_TRANSIENT], "codeName": "WriteConflict"},
            )

        scope.before_commit(fail)
