"""What type checkers make of the public names: checked by mypy and pyright, never run.

Beanie and the two drivers are typed differently, so a class is used as its author would, and
what is asserted is what this library adds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from beanie import Document, UnionDoc, View
from typing_extensions import assert_type

from beanie_session_scope import (
    ClientMismatchError,
    CommitUnknownError,
    HookError,
    ModelNotInitializedError,
    ModelNotScopedError,
    NotAClientError,
    PropagationError,
    Rollback,
    ScopeClosedError,
    ScopeObserver,
    ScopeReusedError,
    ScopeState,
    SessionScope,
    SessionScopeError,
    SessionScopeMixin,
    Token,
    TransactionAbortedError,
    TransactionAttempt,
    TransactionAttempts,
    TransactionExpiredError,
    TransactionsNotSupportedError,
    TransactionTimeoutError,
    UnexpectedRollbackError,
    UnsupportedInTransactionError,
    bind_session,
    collection_of,
    current_scope,
    is_outside,
    observe,
    on_abort,
    on_commit,
    outside_session,
    run_in_transaction,
    transaction_attempts,
    transactional,
    with_session,
)


class Bike(SessionScopeMixin, Document):
    color: str = "red"


class RedBikes(SessionScopeMixin, View):
    color: str


class Vehicle(SessionScopeMixin, UnionDoc):
    pass


async def the_mixin(session: Any) -> None:
    bike = Bike(color="blue")
    assert_type(bike.color, str)
    assert_type(await bike.insert(), Bike)
    assert_type(await Bike.find(Bike.color == "red").to_list(), list[Bike])
    found = await Bike.find_one()
    assert_type(found, Bike | None)
    token = Bike.set_session(session)
    assert_type(token, Token)
    Bike.clear_session(token)
    RedBikes.clear_session()
    Vehicle.clear_session()


async def a_scope(client: Any) -> None:
    scope = with_session(client=client, collections=[Bike, RedBikes, Vehicle])
    assert_type(scope, SessionScope)
    assert_type(await scope, SessionScope)
    with_session(client, (Bike,), propagation="requires_new", timeout=5)
    with_session(collections={Bike}, transaction=False, snapshot=True)
    assert_type(scope.state, ScopeState)
    assert_type(scope.rollback_only, bool)
    assert_type(scope.hooks.after_commit.pop()(), Awaitable[object] | object)
    await scope.refresh(Bike())
    assert_type(scope.on_commit(print), Awaitable[None])
    scope.before_commit(a_hook)
    scope.on_abort(a_hook)
    scope.track(Bike(), Bike())
    scope.set_rollback_only("no stock")
    await scope.commit()
    await scope.abort()


async def a_hook() -> int:
    return 1


async def other_blocks(session: Any) -> None:
    with bind_session(session, [Bike]):
        pass
    with outside_session(Bike, Vehicle):
        pass
    assert_type(current_scope(), SessionScope | None)
    assert_type(current_scope(Bike), SessionScope | None)
    assert_type(is_outside(RedBikes), bool)
    assert_type(collection_of(Bike), Any)
    assert_type(on_commit(a_hook), Awaitable[None])
    on_abort(lambda: None)


async def what_comes_after_a_rollback(client: Any) -> str:
    # The block may swallow a Rollback, so what stands after it can be reached.
    async with with_session(client=client):
        raise Rollback
    return "reached"


async def sell(bike: Bike, price: int = 1) -> str:
    return bike.color * price


async def retrying_forms() -> None:
    assert_type(await run_in_transaction(sell, Bike(), 2, collections=[Bike]), str)
    attempts = transaction_attempts(collections=[Bike], timeout=3, max_commit_time_ms=100)
    assert_type(attempts, TransactionAttempts)
    async for attempt in attempts:
        assert_type(attempt, TransactionAttempt)
        assert_type(attempt.number, int)
        assert_type(attempt.attempts, TransactionAttempts)
        async with attempt:
            pass


@transactional
async def plain(bike: Bike, *, price: int = 1) -> str:
    return await sell(bike, price)


@transactional(collections=[Bike], timeout=3)
async def with_options(bike: Bike, price: int) -> list[str]:
    return [await sell(bike, price)]


class Shop:
    @transactional(collections=[Bike])
    async def sell(self, bike: Bike) -> str:
        return await sell(bike)

    @staticmethod
    @transactional
    async def buy(bike: Bike) -> int:
        return 1


async def decorated_functions_keep_their_types() -> None:
    assert_type(await plain(Bike(), price=2), str)
    assert_type(await with_options(Bike(), 2), list[str])
    assert_type(await Shop().sell(Bike()), str)
    assert_type(await Shop.buy(Bike()), int)
    await plain("bike")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await with_options(Bike())  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


class Watcher(ScopeObserver):
    def scope_left(
        self, scope: SessionScope, error: BaseException | None, retry_in: float | None
    ) -> None:
        assert_type(scope.options.timeout, float)


def an_observer() -> None:
    assert_type(observe(Watcher()), Callable[[], None])


def errors(unknown: CommitUnknownError, hook: HookError) -> None:
    assert_type(unknown.documents, list[Document])
    assert_type(hook.errors, list[BaseException])
    assert_type(hook.committed, bool)
    every: list[type[SessionScopeError]] = [
        ClientMismatchError,
        ModelNotInitializedError,
        ModelNotScopedError,
        NotAClientError,
        PropagationError,
        ScopeClosedError,
        ScopeReusedError,
        TransactionAbortedError,
        TransactionExpiredError,
        TransactionTimeoutError,
        TransactionsNotSupportedError,
        UnexpectedRollbackError,
        UnsupportedInTransactionError,
    ]
    assert_type(every[0]("why").has_error_label("label"), bool)


async def what_is_refused(client: Any) -> None:
    with_session(client, [int])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    with_session(propagation="nested")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    transaction_attempts(snapshot=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def a_dependency(client: Any) -> AsyncIterator[SessionScope]:
    async with (scope := with_session(client=client)):
        yield scope


async def the_exit(scope: SessionScope) -> None:
    assert_type(await scope.__aexit__(None, None, None), bool)
