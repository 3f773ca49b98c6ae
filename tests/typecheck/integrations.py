"""What type checkers make of the public names of the integrations; never run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from beanie import Document
from typing_extensions import assert_type

from beanie_session_scope import SessionScope, SessionScopeError, SessionScopeMixin
from beanie_session_scope.asgi import (
    ClientDisconnectedError,
    MiddlewareOptions,
    SessionScopeMiddleware,
)
from beanie_session_scope.migration import (
    CHECKPOINTS,
    SKIP,
    BatchSummary,
    InvalidDocument,
    InvalidDocumentError,
    MigrationError,
    MigrationMismatchError,
    Skip,
    bind_migration,
    migrate_in_batches,
)
from beanie_session_scope.telemetry import SessionScopeInstrumentor
from beanie_session_scope.testing import (
    FailPoint,
    Member,
    MongodNotFoundError,
    PortTakenError,
    ReplicaSet,
    ReplicaSetError,
    ServerCommandError,
    ServerStartError,
    StandaloneServer,
    find_mongod,
)
from beanie_session_scope.testing.plugin import SessionScopeRollback, SharedServer


class Bike(SessionScopeMixin, Document):
    color: str = "red"


async def application(
    scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> None:
    await SessionScopeMiddleware(application, collections=[Bike])(scope, receive, send)


def the_middleware(client: Any, error: ClientDisconnectedError) -> None:
    options: MiddlewareOptions = {"timeout": 5.0, "max_commit_time_ms": 100}
    SessionScopeMiddleware(application, client, **options)
    SessionScopeMiddleware(application, lambda: client, lambda: [Bike], methods=["POST"])
    SessionScopeMiddleware(application, client, should_commit=lambda status, scope: status < 300)
    SessionScopeMiddleware(application, client, snapshot=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    disconnected: OSError = error
    raise disconnected


def in_place(bike: Bike) -> None:
    bike.color = "blue"


async def another(bike: Bike) -> Bike | Skip:
    return SKIP if bike.color == "blue" else bike


async def migrations(invalid: InvalidDocumentError) -> None:
    summary = await migrate_in_batches(Bike, in_place, name="paint", batch_size=10)
    assert_type(summary, BatchSummary)
    assert_type(summary.invalid_documents, list[InvalidDocument])
    await migrate_in_batches(Bike.find(Bike.color == "red"), another, name="paint", dry_run=True)
    await migrate_in_batches(Bike, in_place)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    collection: str = CHECKPOINTS
    assert collection
    assert_type(invalid.document, InvalidDocument)
    kinds: list[type[SessionScopeError]] = [MigrationError, MigrationMismatchError]
    assert kinds
    bind_migration([Bike])


def telemetry() -> None:
    assert_type(SessionScopeInstrumentor().is_instrumented_by_opentelemetry, bool)
    SessionScopeInstrumentor().instrument(tracer_provider=None)
    SessionScopeInstrumentor().uninstrument()


async def servers() -> None:
    async with ReplicaSet(nodes=3) as replica_set:
        assert_type(replica_set.uri, str)
        assert_type(replica_set.members, tuple[Member, ...])
        fail_point = replica_set.fail_point("insert", error_code=112)
        assert_type(fail_point, FailPoint)
    with StandaloneServer() as server:
        assert_type(server.uri, str)
    assert_type(find_mongod(), Path)
    kinds: Iterable[type[Exception]] = [
        MongodNotFoundError,
        PortTakenError,
        ReplicaSetError,
        ServerCommandError,
        ServerStartError,
    ]
    assert kinds


async def test_a_fixture(
    session_scope_rollback: SessionScopeRollback, mongo_replica_set: ReplicaSet | SharedServer
) -> None:
    assert_type(session_scope_rollback.scope, SessionScope)
    assert_type(mongo_replica_set.uri, str)
    await session_scope_rollback.run_commit_hooks()
