"""G5, the plain forms: what leaving the block means, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
from clients import close
from models import Item, moved_to, scope_of
from pymongo.errors import ConfigurationError, DuplicateKeyError, OperationFailure
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern
from wire import DATABASE, FailPoint, Wire, names, open_transactions

from beanie_session_scope import (
    CommitUnknownError,
    PropagationError,
    Rollback,
    ScopeClosedError,
    ScopeReusedError,
    ScopeState,
    TransactionAbortedError,
    UnexpectedRollbackError,
    bind_session,
    current_scope,
)
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.mixin import GETTER
from beanie_session_scope.state import check_move


class Stop(BaseException):
    """Not an ``Exception``, as ``KeyboardInterrupt`` is not."""


class TestLeavingTheBlock:
    async def test_normally_commits(self, client: Any, database: Any) -> None:
        async with (scope := scope_of(client)):
            await Item().insert()
            assert await database["item"].count_documents({}) == 0
        assert scope.state is ScopeState.COMMITTED
        assert await database["item"].count_documents({}) == 1

    @pytest.mark.parametrize("error", [KeyError, Stop, asyncio.CancelledError])
    async def test_by_an_exception_aborts_and_propagates_it_unchanged(
        self, client: Any, database: Any, error: type[BaseException]
    ) -> None:
        raised = error("mine")
        with pytest.raises(error) as caught:
            async with (scope := scope_of(client)):
                await Item().insert()
                raise raised
        assert caught.value is raised
        assert caught.value.__cause__ is None
        assert scope.state is ScopeState.ABORTED
        assert await database["item"].count_documents({}) == 0

    async def test_by_rollback_aborts_quietly(self, client: Any, database: Any) -> None:
        async with (scope := scope_of(client)):
            await Item().insert()
            raise Rollback
        assert scope.state is ScopeState.ABORTED
        assert await database["item"].count_documents({}) == 0

    async def test_by_rollback_in_a_task_group_aborts_quietly(
        self, client: Any, database: Any
    ) -> None:
        if sys.version_info < (3, 11):  # which has neither groups of tasks nor of exceptions
            return

        async def child() -> None:
            raise Rollback

        async with scope_of(client):
            async with asyncio.TaskGroup() as group:
                await Item().insert()
                group.create_task(child())
        assert await database["item"].count_documents({}) == 0

    async def test_by_return_commits(self, client: Any, database: Any) -> None:
        async def insert() -> str:
            async with scope_of(client):
                await Item().insert()
                return "done"

        assert await insert() == "done"
        assert await database["item"].count_documents({}) == 1

    @pytest.mark.parametrize("ending", ["commit", "abort"])
    async def test_ends_the_session_and_unbinds(self, client: Any, ending: str) -> None:
        async with scope_of(client) as session:
            await Item().insert()
            if ending == "abort":
                raise Rollback
        assert session.has_ended
        assert Item.get_session() is None
        assert current_scope() is None

    async def test_that_caught_an_error_of_the_server_does_not_pass_for_a_commit(
        self, client: Any, database: Any
    ) -> None:
        first = await Item().insert()
        with pytest.raises(TransactionAbortedError, match="DuplicateKeyError") as caught:
            async with scope_of(client):
                await Item(name="lost").insert()
                with pytest.raises(DuplicateKeyError):
                    await Item(id=first.id).insert()
        assert isinstance(caught.value.__cause__, DuplicateKeyError)
        assert caught.value.has_error_label("TransientTransactionError") is False
        assert await database["item"].count_documents({}) == 1

    async def test_no_operation_goes_on_in_a_transaction_that_is_gone(
        self, client: Any, wire: Wire
    ) -> None:
        first = await Item().insert()
        with pytest.raises(TransactionAbortedError, match="DuplicateKeyError"):
            async with scope_of(client):
                with pytest.raises(DuplicateKeyError):
                    await Item(id=first.id).insert()
                with wire.record() as seen:
                    await Item.find_one()
        assert seen == []

    async def test_an_error_of_the_caller_alone_changes_nothing(
        self, client: Any, database: Any
    ) -> None:
        async with scope_of(client):
            with pytest.raises(Exception, match=r"encode|Cannot"):
                await Item.find_one({"n": object()})
            await Item().insert()
        assert await database["item"].count_documents({}) == 1

    @pytest.mark.timeout(20)
    async def test_a_call_that_the_driver_refuses_at_once_holds_no_lock(
        self, client: Any, database: Any
    ) -> None:
        async with scope_of(client):
            for _ in range(2):  # the first operation goes another way than the later ones
                with pytest.raises(TypeError):
                    await getattr(Item, GETTER)().insert_one()
                await Item().insert()
        assert await database["item"].count_documents({}) == 2

    @pytest.mark.parametrize("ending", ["commit_transaction", "abort_transaction"])
    async def test_that_ended_the_transaction_by_hand_is_left_as_it_is(
        self, client: Any, database: Any, ending: str
    ) -> None:
        async with (scope := scope_of(client)) as session:
            await Item().insert()
            await getattr(session, ending)()
            with pytest.raises(TransactionAbortedError, match="by hand"):
                await Item(name="would stay").insert()
        assert scope.state is ScopeState.ENDED
        expected = 1 if ending == "commit_transaction" else 0
        assert await database["item"].count_documents({}) == expected

    async def test_of_a_scope_that_is_rollback_only_raises(
        self, client: Any, database: Any
    ) -> None:
        with pytest.raises(UnexpectedRollbackError, match="because I say so"):
            async with (scope := scope_of(client)):
                await Item().insert()
                scope.set_rollback_only("I say so")
                assert scope.rollback_only
        assert scope.state is ScopeState.ABORTED
        assert await database["item"].count_documents({}) == 0


class TestTheCommit:
    async def test_that_the_server_refuses_propagates(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        with fail_point("commitTransaction", error_code=112, times=1):
            with pytest.raises(OperationFailure) as caught:
                async with (scope := scope_of(client)):
                    await Item().insert()
        assert caught.value.code == 112
        assert scope.state is ScopeState.ABORTED
        assert Item.get_session() is None

    async def test_of_unknown_outcome_is_tried_again(
        self, client: Any, wire: Wire, database: Any, fail_point: FailPoint
    ) -> None:
        label = ["UnknownTransactionCommitResult"]
        with fail_point("commitTransaction", error_code=64, labels=label, times=2):
            with wire.record() as seen:
                async with scope_of(client):
                    await Item().insert()
        assert names(seen) == ["insert", *["commitTransaction"] * 3]
        assert await database["item"].count_documents({}) == 1

    async def test_of_unknown_outcome_says_so_when_time_is_up(
        self, client: Any, fail_point: FailPoint
    ) -> None:
        label = ["UnknownTransactionCommitResult"]
        with fail_point("commitTransaction", error_code=64, labels=label):
            with pytest.raises(CommitUnknownError, match="may be there") as caught:
                async with (scope := scope_of(client, timeout=0.2)):
                    await Item().insert()
        assert scope.state is ScopeState.UNKNOWN
        assert caught.value.has_error_label("UnknownTransactionCommitResult")

    async def test_that_runs_out_of_its_own_time_is_not_tried_again(
        self, client: Any, wire: Wire, fail_point: FailPoint
    ) -> None:
        label = ["UnknownTransactionCommitResult"]
        with fail_point("commitTransaction", error_code=50, labels=label):
            with wire.record() as seen, pytest.raises(CommitUnknownError):
                async with scope_of(client):
                    await Item().insert()
        assert names(seen) == ["insert", "commitTransaction"]

    async def test_is_settled_before_a_cancellation_goes_on(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        async def work() -> None:
            async with scope:
                await Item().insert()
                committing.set()

        scope = scope_of(client)
        committing = asyncio.Event()
        with fail_point("commitTransaction", block_ms=200, times=1):
            task = asyncio.ensure_future(work())
            await committing.wait()
            for _ in range(3):
                await asyncio.sleep(0)
                task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert scope.state is ScopeState.COMMITTED
            assert scope.session.has_ended
        assert await database["item"].count_documents({}) == 1

    async def test_follows_an_operation_that_was_cancelled_in_flight(
        self, client: Any, database: Any, fail_point: FailPoint, server_uri: str
    ) -> None:
        """The first operation opens the transaction: abandoned, it would leave it open."""
        with fail_point("insert", block_ms=200, times=1):
            async with scope_of(client):
                task = asyncio.ensure_future(Item().insert())
                while "insert" not in await self._running(client):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                raise Rollback
        assert open_transactions(server_uri) == 0
        assert await database["item"].count_documents({}) == 0

    async def test_of_a_borrowed_session_follows_a_cancelled_operation_too(
        self, client: Any, database: Any, fail_point: FailPoint, server_uri: str
    ) -> None:
        """Here the owner aborts, on the driver's session, as soon as the block is left."""
        session = await DRIVER.start_session(client)
        await DRIVER.start_transaction(session)

        async def insert() -> None:
            with bind_session(session, collections=[Item]):
                await Item().insert()

        with fail_point("insert", block_ms=200, times=1):
            task = asyncio.ensure_future(insert())
            while "insert" not in await self._running(client):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await session.abort_transaction()
        await session.end_session()
        assert open_transactions(server_uri) == 0
        assert await database["item"].count_documents({}) == 0

    @staticmethod
    async def _running(client: Any) -> set[str]:
        with_options = {"$ownOps": False, "active": True}
        answer = await client.admin.command("currentOp", 1, **with_options)
        return {key for op in answer["inprog"] for key in op.get("command", {})}


class TestAScopeThatIsEnding:
    async def test_is_not_made_rollback_only_by_a_late_joined_block(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        """Its commit is under way: to say then that it was rolled back would be untrue."""
        joined = asyncio.Event()

        async def child() -> None:
            async with scope_of(client):
                joined.set()
                while scope.state is ScopeState.OPEN:
                    await asyncio.sleep(0)
                await Item(name="late").insert()

        with fail_point("commitTransaction", block_ms=200, times=1):
            async with (scope := scope_of(client)):
                await Item().insert()
                task = asyncio.ensure_future(child())
                await joined.wait()
            with pytest.raises(ScopeClosedError):
                await task
        assert scope.state is ScopeState.COMMITTED
        assert await database["item"].count_documents({}) == 1

    async def test_takes_no_set_rollback_only_any_more(self, client: Any) -> None:
        async with (scope := scope_of(client)):
            pass
        with pytest.raises(ScopeClosedError, match="committed"):
            scope.set_rollback_only("too late")

    async def test_knows_the_error_of_an_operation_that_was_cancelled(
        self, client: Any, fail_point: FailPoint
    ) -> None:
        """Its transaction is gone, though nobody was there to be told why."""
        with fail_point("insert", block_ms=100, error_code=112, times=1):
            with pytest.raises(TransactionAbortedError, match="OperationFailure"):
                async with scope_of(client):
                    with pytest.raises(asyncio.TimeoutError):
                        await asyncio.wait_for(Item().insert(), 0.05)

    async def test_shows_the_error_that_left_the_block_and_not_that_of_closing_a_cursor(
        self, client: Any
    ) -> None:
        first = await Item().insert()
        await Item.insert_many([Item() for _ in range(5)])
        with pytest.raises(DuplicateKeyError):
            async with scope_of(client):
                async with getattr(Item, GETTER)().find({}, batch_size=2) as cursor:
                    await cursor.next()
                    await Item(id=first.id).insert()

    async def test_that_could_not_start_is_over(self, client: Any) -> None:
        scope = scope_of(client, write_concern=WriteConcern(w=0))
        with pytest.raises(ConfigurationError):
            await scope.__aenter__()
        assert scope.state is ScopeState.ENDED
        assert Item.get_session() is None

    async def test_can_not_be_left_before_it_was_entered_or_twice(self, client: Any) -> None:
        scope = scope_of(client)
        with pytest.raises(ScopeReusedError):
            await scope.__aexit__(None, None, None)
        async with scope:
            pass
        with pytest.raises(ScopeReusedError):
            await scope.__aexit__(None, None, None)


class TestWhereThereIsNothingToRollBack:
    async def test_rollback_is_not_quiet(self, client: Any, database: Any) -> None:
        with pytest.raises(Rollback):
            async with scope_of(client, transaction=False):
                await Item().insert()
                raise Rollback
        with pytest.raises(Rollback):
            async with scope_of(client) as session:
                await Item().insert()
                await session.commit_transaction()
                raise Rollback
        assert await database["item"].count_documents({}) == 2

    async def test_rollback_only_is_refused(self, client: Any) -> None:
        async with (scope := scope_of(client, transaction=False)):
            with pytest.raises(PropagationError, match="plain session"):
                scope.set_rollback_only("no transaction")

    async def test_a_transaction_by_hand_must_be_ended_by_hand(
        self, client: Any, database: Any
    ) -> None:
        with pytest.raises(UnexpectedRollbackError, match="by hand"):
            async with scope_of(client, transaction=False) as session:
                await DRIVER.start_transaction(session)
                await Item().insert()
        assert await database["item"].count_documents({}) == 0
        async with scope_of(client, transaction=False) as session:
            await DRIVER.start_transaction(session)
            await Item().insert()
            await session.commit_transaction()
        assert await database["item"].count_documents({}) == 1


class TestErrorsOfTheServer:
    async def test_that_share_their_code_with_a_standalone_one_are_not_taken_for_it(
        self, client: Any, database: Any
    ) -> None:
        """Deleting from a capped collection in a transaction has code 20, too."""
        await database.drop_collection("capped")
        capped = await database.create_collection("capped", capped=True, size=4096)
        await capped.insert_one({"name": "x", "n": 1})
        with moved_to(capped), pytest.raises(OperationFailure) as caught:
            async with scope_of(client):
                await Item.find(Item.n == 1).delete()
        assert caught.value.code == 20

    async def test_do_not_carry_documents_into_the_log(
        self, client: Any, caplog: pytest.LogCaptureFixture, fail_point: FailPoint
    ) -> None:
        first = await Item(name="secret").insert()
        session = await DRIVER.start_session(client)
        await DRIVER.start_transaction(session)
        with bind_session(session, collections=[Item]):
            with fail_point("insert", block_ms=100, times=1):
                task = asyncio.ensure_future(Item(id=first.id, name="secret").insert())
                with pytest.raises((asyncio.TimeoutError, asyncio.CancelledError)):
                    await asyncio.wait_for(task, 0.05)
        await session.abort_transaction()
        await session.end_session()
        assert "DuplicateKeyError (code 11000)" in caplog.text
        assert "secret" not in caplog.text
        assert "keyValue" not in caplog.text


class TestOptions:
    async def test_reach_the_server(self, client: Any, wire: Wire) -> None:
        options = {
            "read_concern": ReadConcern("snapshot"),
            "write_concern": WriteConcern("majority", wtimeout=9_000),
            "max_commit_time_ms": 8_000,
        }
        with wire.record() as seen:
            async with scope_of(client, **options):
                await Item().insert()
        insert, commit = (event.command for event in seen)
        assert insert["readConcern"]["level"] == "snapshot"
        assert commit["writeConcern"]["w"] == "majority"
        assert commit["maxTimeMS"] == 8_000

    @pytest.mark.parametrize("mode", ["secondary", "secondaryPreferred", "nearest"])
    async def test_a_client_that_prefers_secondaries_reads_from_the_primary(
        self, server_uri: str, client: Any, mode: str
    ) -> None:
        elsewhere = DRIVER.client_class(server_uri, readPreference=mode)
        try:
            with moved_to(elsewhere[DATABASE]["item"]):
                async with scope_of(elsewhere):
                    await Item.find_one()
        finally:
            await close(elsewhere)

    async def test_a_session_without_a_transaction_is_bound_in_the_same_way(
        self, client: Any, wire: Wire, database: Any
    ) -> None:
        with wire.record() as seen:
            async with (scope := scope_of(client, transaction=False)) as session:
                await Item().insert()
                await Item.find_one()
                lsid = session.session_id
        assert [event.command["lsid"] for event in seen[:2]] == [lsid] * 2
        assert all("autocommit" not in event.command for event in seen)
        assert "afterClusterTime" in seen[1].command["readConcern"], "causal consistency"
        assert scope.state is ScopeState.ENDED
        assert await database["item"].count_documents({}) == 1

    async def test_a_snapshot_does_not_change(self, client: Any, database: Any) -> None:
        await Item().insert()
        async with scope_of(client, transaction=False, snapshot=True):
            assert await Item.find().count() == 1
            await database["item"].insert_one({"name": "later", "n": 1})
            assert await Item.find().count() == 1
        assert await Item.find().count() == 2

    async def test_errors_in_a_session_without_a_transaction_end_nothing(
        self, client: Any, database: Any
    ) -> None:
        first = await Item().insert()
        async with scope_of(client, transaction=False):
            with pytest.raises(DuplicateKeyError):
                await Item(id=first.id).insert()
            await Item().insert()
        assert await database["item"].count_documents({}) == 2


class TestTheScope:
    async def test_may_be_awaited_before_it_is_entered(self, client: Any, database: Any) -> None:
        async with await scope_of(client):
            await Item().insert()
        assert await database["item"].count_documents({}) == 1

    async def test_is_entered_once(self, client: Any) -> None:
        async with (scope := scope_of(client)):
            with pytest.raises(ScopeReusedError):
                await scope.__aenter__()
            assert Item.get_session() is scope.session
        with pytest.raises(ScopeReusedError):
            await scope.__aenter__()

    async def test_tells_its_session_and_client(self, client: Any) -> None:
        scope = scope_of(client)
        assert (scope.session, scope.client, scope.state) == (None, None, ScopeState.NEW)
        async with scope as session:
            assert (scope.session, scope.client) == (session, client)
            assert isinstance(session, DRIVER.session_class)
            assert repr(scope) == "<SessionScope open>"

    def test_moves_only_along_its_states(self) -> None:
        assert check_move(ScopeState.OPEN, ScopeState.ABORTING) is ScopeState.ABORTING
        with pytest.raises(RuntimeError, match="from unknown to open"):
            check_move(ScopeState.UNKNOWN, ScopeState.OPEN)
