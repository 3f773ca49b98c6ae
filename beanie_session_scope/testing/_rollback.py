"""A scope around a test that is always rolled back, and what the test can ask it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from inspect import isawaitable
from typing import Any, TypeAlias

from beanie_session_scope import (
    HookError,
    PropagationError,
    Rollback,
    ScopeObserver,
    SessionScope,
    SessionScopeError,
    SessionScopeMixin,
    observe,
    with_session,
)

Hook: TypeAlias = "Callable[[], Awaitable[object] | object]"


class SessionScopeRollback:
    """What the fixture `session_scope_rollback` gives: the scope that the test runs in.

    Attributes:
        scope: The scope (SessionScope); code under test that opens its own has joined it.
    """

    def __init__(self, scope: SessionScope, allow_requires_new: bool) -> None:
        """Take over a scope that is open.

        Args:
            scope: The scope (SessionScope).
            allow_requires_new: Whether independent scopes may be opened (bool).
        """
        self.scope = scope
        self._guard = _Guard(scope, allow_requires_new)

    def __repr__(self) -> str:
        """Show the state of the scope.

        Returns:
            A short description (str).
        """
        return f"<SessionScopeRollback {self.scope!r}>"

    @property
    def session(self) -> Any:
        """Return the driver's session, to pass to what does not know the scope.

        Returns:
            Motor's or PyMongo's session.
        """
        return self.scope.session

    @property
    def commit_hooks(self) -> list[Hook]:
        """List the `on_commit` hooks that a commit would run now, in their order.

        Returns:
            The functions that were registered (list); none once a block has failed, because then
            the transaction could only be rolled back.
        """
        return [] if self.scope.rollback_only else list(self.scope.hooks.after_commit)

    async def run_commit_hooks(self) -> None:
        """Run what a commit would run: the `before_commit` hooks, then those of `on_commit`.

        All of the latter run, first in first out, also those that they register; each runs once.
        They run inside the scope of the test, and see what it wrote.

        Raises:
            SessionScopeError: If a block has failed, so that there could be no commit.
            BaseException: What a `before_commit` hook raises; there could be no commit then.
            HookError: If `on_commit` hooks failed.
        """
        if self.scope.rollback_only:
            raise SessionScopeError(
                "The on_commit hooks can't be run: a block that had joined the scope of the test "
                "has failed. MongoDB has no savepoints, so the transaction of the test is one "
                "that could only be rolled back. Test the failure in a test of its own."
            )
        await self._run_before_commit()
        errors = [e for hook in self._taken() if (e := await _error_of(hook)) is not None]
        if errors:
            raise HookError(
                f"{len(errors)} on_commit hooks failed: "
                f"{', '.join(type(error).__name__ for error in errors)}.",
                True,
                errors,
            ) from errors[0]

    async def _run_before_commit(self) -> None:
        hooks = self.scope.hooks.before_commit
        while due := [hook for hook in hooks if hook != self._guard.veto]:
            hooks.remove(due[0])
            try:
                await _call(due[0])
            except BaseException as error:
                self.scope.set_rollback_only(f"a before_commit hook raised {type(error).__name__}")
                raise

    def _taken(self) -> Iterator[Hook]:
        while hooks := self.scope.hooks.after_commit:
            yield hooks.pop(0)


class _Guard(ScopeObserver):
    """Sees to it that nothing is committed while the test runs."""

    def __init__(self, scope: SessionScope, allow_requires_new: bool) -> None:
        self._scope = scope
        self._allow = allow_requires_new
        scope.before_commit(self.veto)

    def scope_entering(self, scope: SessionScope) -> None:
        if scope.client is self._scope.client and not self._allow:
            raise PropagationError(
                "This scope would be independent of the one that session_scope_rollback has "
                "opened around the test, so what it commits would stay: it was opened with "
                'propagation="requires_new", under outside_session(), or by a task that was '
                "started before the fixture. Where that is meant, and the test cleans up after "
                "itself, mark it: @pytest.mark.session_scope(allow_requires_new=True)."
            )

    def transaction_started(self, scope: SessionScope) -> None:
        if scope is self._scope:  # after its abort(), with new hooks
            scope.before_commit(self.veto)

    def veto(self) -> None:
        raise PropagationError(
            "commit() would end the transaction that session_scope_rollback rolls back after the "
            "test, and what it commits would stay. Open a scope in the code under test, which "
            "joins that of the test, or test this code without the fixture."
        )


@asynccontextmanager
async def rolled_back(
    client: Any,
    collections: Iterable[type[SessionScopeMixin]] | None,
    allow_requires_new: bool,
) -> AsyncIterator[tuple[SessionScopeRollback, dict[ContextVar[Any], Any]]]:
    """Open a scope that ends in a rollback, however the block is left.

    Args:
        client: As for `with_session`.
        collections: As for `with_session`.
        allow_requires_new: Whether independent scopes may be opened inside (bool).

    Yields:
        The scope for the test, and the context variables that opening it has changed
        (tuple[SessionScopeRollback, dict]).

    Raises:
        SessionScopeError: If the scope can't be opened; or, on leaving, if the transaction was
            ended by hand, so that not everything is rolled back.
    """
    before = copy_context()
    scope = with_session(client=client, collections=collections)
    try:
        async with scope:
            rollback = SessionScopeRollback(scope, allow_requires_new)
            stop = observe(rollback._guard)
            try:
                yield rollback, _changed(before, copy_context())
            finally:
                stop()
                # They tell code that its transaction has failed, and that is not so.
                with suppress(SessionScopeError):
                    scope.hooks.after_abort.clear()
            raise Rollback
    except Rollback:  # quiet only where there was something to roll back
        raise SessionScopeError(
            "session_scope_rollback could not roll back: the test, or what it tests, has committed "
            "or aborted the transaction by hand, on the driver's session. If it has committed, its "
            "writes have stayed in the database."
        ) from None


def _changed(before: Context, after: Context) -> dict[ContextVar[Any], Any]:
    missing = object()
    return {var: after[var] for var in after if before.get(var, missing) is not after[var]}


@contextmanager
def holding(values: dict[ContextVar[Any], Any]) -> Iterator[None]:
    """Let context variables have other values, for the length of a block.

    Args:
        values: The variables and their values (dict[ContextVar, Any]).
    """
    tokens = [(var, var.set(value)) for var, value in values.items()]
    try:
        yield
    finally:
        for var, token in reversed(tokens):
            var.reset(token)


async def _call(hook: Hook) -> None:
    result = hook()
    if isawaitable(result):
        await result


async def _error_of(hook: Hook) -> BaseException | None:
    try:
        await _call(hook)
    except Exception as error:
        return error
    return None
