"""What a scope can be told inside its block: to commit or abort, and to go on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from labels import UNKNOWN
from models import Item, scope_of, stored
from pymongo.errors import DuplicateKeyError, OperationFailure
from wire import FailPoint, Wire, lsid, names, open_transactions, outside

from beanie_session_scope import (
    CommitUnknownError,
    PropagationError,
    Rollback,
    ScopeClosedError,
    ScopeState,
    SessionScopeError,
    TransactionAbortedError,
    UnexpectedRollbackError,
    bind_session,
    transaction_attempts,
)
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.mixin import GETTER

ENDINGS = pytest.mark.parametrize("ending", ["commit", "abort"])
COMMAND = {"commit": "commitTransaction", "abort": "abortTransaction"}


class TestCommitAndGoOn:
    async def test_commits_what_was_done_so_far(self, client: Any, database: Any) -> None:
        async with (scope := scope_of(client)):
            await Item(name="a").insert()
            await scope.commit()
            assert await stored(database) == ["a"]
            assert scope.state is ScopeState.OPEN
            await Item(name="b").insert()
            assert await stored(database) == ["a"]
            raise Rollback
        assert await stored(database) == ["a"]

    async def test_goes_on_in_a_new_transaction_of_the_same_session(
        self, client: Any, wire: Wire
    ) -> None:
        with wire.record() as seen:
            async with (scope := scope_of(client)) as session:
                await Item().insert()
                await scope.commit()
                await Item().insert()
                await scope.abort()
                await Item().insert()
                assert scope.session is session
                with wire.record() as so_far:
                    pass
                assert outside([*so_far], session) == []
        assert names(seen) == [
            "insert",
            "commitTransaction",
            "insert",
            "abortTransaction",
            "insert",
            "commitTransaction",
        ]
        assert len({bytes(lsid(event)["id"]) for event in seen}) == 1
        first = seen[0].command["txnNumber"]
        numbers = [event.command["txnNumber"] - first for event in seen]
        assert numbers == [0, 0, 1, 1, 2, 2]
        starts = [event.command.get("startTransaction") for event in seen]
        assert starts == [True, None, True, None, True, None]

    async def test_sends_nothing_where_nothing_was_done(self, client: Any, wire: Wire) -> None:
        with wire.record() as seen:
            async with (scope := scope_of(client)):
                await scope.commit()
                await scope.abort()
                await scope.commit()
        assert seen == []

    async def test_keeps_the_options_of_the_scope(self, client: Any, wire: Wire) -> None:
        with wire.record() as seen:
            async with (scope := scope_of(client, max_commit_time_ms=9_000)):
                for _ in range(2):
                    await Item().insert()
                    await scope.commit()
                await Item().insert()
        commits = [event for event in seen if event.command_name == "commitTransaction"]
        assert [event.command["maxTimeMS"] for event in commits] == [9_000] * 3

    async def test_of_unknown_outcome_is_tried_again(
        self, client: Any, wire: Wire, database: Any, fail_point: FailPoint
    ) -> None:
        with fail_point("commitTransaction", error_code=64, labels=[UNKNOWN], times=2):
            with wire.record() as seen:
                async with (scope := scope_of(client)):
                    await Item(name="a").insert()
                    await scope.commit()
        assert names(seen) == ["insert", *["commitTransaction"] * 3]
        assert await stored(database) == ["a"]

    async def test_is_settled_before_a_cancellation_goes_on(
        self, client: Any, database: Any, fail_point: FailPoint, server_uri: str
    ) -> None:
        async def work() -> None:
            async with scope:
                await Item(name="a").insert()
                await scope.commit()

        scope = scope_of(client)
        with fail_point("commitTransaction", block_ms=150, times=1):
            task = asyncio.ensure_future(work())
            while scope.state is not ScopeState.COMMITTING:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await stored(database) == ["a"]
        assert open_transactions(server_uri) == 0


class TestAbortAndGoOn:
    async def test_takes_back_what_was_done_so_far(self, client: Any, database: Any) -> None:
        async with (scope := scope_of(client)):
            await Item(name="a").insert()
            await scope.abort()
            assert scope.state is ScopeState.OPEN
            await Item(name="b").insert()
        assert await stored(database) == ["b"]

    async def test_starts_afresh_after_an_error_that_was_caught(
        self, client: Any, database: Any
    ) -> None:
        first = await Item(name="first").insert()
        async with (scope := scope_of(client)):
            with pytest.raises(DuplicateKeyError):
                await Item(id=first.id).insert()
            with pytest.raises(TransactionAbortedError):
                await Item.find_one()
            await scope.abort()
            await Item(name="second").insert()
        assert scope.state is ScopeState.COMMITTED
        assert await stored(database) == ["first", "second"]

    async def test_starts_afresh_in_a_scope_that_was_rollback_only(
        self, client: Any, database: Any
    ) -> None:
        async with (scope := scope_of(client)):
            await Item(name="a").insert()
            scope.set_rollback_only("no good")
            await scope.abort()
            assert not scope.rollback_only
            await Item(name="b").insert()
        assert await stored(database) == ["b"]

    async def test_starts_afresh_after_a_joined_block_has_failed(
        self, client: Any, database: Any
    ) -> None:
        async with (scope := scope_of(client)):
            with pytest.raises(KeyError):
                async with scope_of(client):
                    await Item(name="a").insert()
                    raise KeyError
            await scope.abort()
            await Item(name="b").insert()
        assert await stored(database) == ["b"]

    async def test_that_fails_on_the_way_still_starts_afresh(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        with fail_point("abortTransaction", error_code=112, times=1):
            async with (scope := scope_of(client)):
                await Item(name="a").insert()
                await scope.abort()
                await Item(name="b").insert()
        assert await stored(database) == ["b"]

    async def test_of_a_transaction_that_was_ended_by_hand_is_refused(self, client: Any) -> None:
        async with (scope := scope_of(client)) as session:
            await Item().insert()
            await session.commit_transaction()
            for end in (scope.commit, scope.abort):
                with pytest.raises(TransactionAbortedError, match="by hand"):
                    await end()


class TestACommitInTheBlockThatFails:
    async def test_is_over_for_what_comes_next(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        with pytest.raises(TransactionAbortedError):
            async with (scope := scope_of(client)):
                await Item(name="a").insert()
                with fail_point("commitTransaction", error_code=251, times=1):
                    with pytest.raises(OperationFailure):
                        await scope.commit()
                assert scope.state is ScopeState.ABORTED
                with pytest.raises(TransactionAbortedError):
                    await Item(name="b").insert()
        assert await stored(database) == []

    async def test_can_be_followed_by_abort_and_a_new_transaction(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        async with (scope := scope_of(client)):
            await Item(name="a").insert()
            with fail_point("commitTransaction", error_code=251, times=1):
                with pytest.raises(OperationFailure):
                    await scope.commit()
            await scope.abort()
            await Item(name="b").insert()
        assert scope.state is ScopeState.COMMITTED
        assert await stored(database) == ["b"]

    async def test_and_is_made_good_does_not_make_an_attempt_run_again(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        attempts = 0
        with fail_point("commitTransaction", error_code=251, times=1):
            async for attempt in transaction_attempts(client, collections=[Item]):
                async with attempt:
                    attempts += 1
                    await Item(name="a").insert()
                    with pytest.raises(OperationFailure):
                        await attempt.commit()
                    await attempt.abort()
                    await Item(name="b").insert()
        assert attempts == 1
        assert await stored(database) == ["b"]

    async def test_of_a_scope_that_is_rollback_only_says_so(
        self, client: Any, database: Any
    ) -> None:
        async with (scope := scope_of(client)):
            await Item(name="a").insert()
            scope.set_rollback_only("no good")
            with pytest.raises(UnexpectedRollbackError, match="no good"):
                await scope.commit()
            await scope.abort()
            await Item(name="b").insert()
        assert await stored(database) == ["b"]

    async def test_of_a_transaction_that_is_gone_says_so(self, client: Any, database: Any) -> None:
        first = await Item(name="first").insert()
        with pytest.raises(TransactionAbortedError, match="DuplicateKeyError"):
            async with (scope := scope_of(client)):
                with pytest.raises(DuplicateKeyError):
                    await Item(id=first.id).insert()
                with pytest.raises(TransactionAbortedError, match="DuplicateKeyError"):
                    await scope.commit()
        assert await stored(database) == ["first"]


class TestACommitInTheBlockOfUnknownOutcome:
    async def test_is_the_end_of_the_scope(self, client: Any, fail_point: FailPoint) -> None:
        with pytest.raises(CommitUnknownError) as caught:
            async with (scope := scope_of(client, timeout=0.05)):
                document = await Item().insert()
                with fail_point("commitTransaction", error_code=64, labels=[UNKNOWN]):
                    await scope.commit()
        assert scope.state is ScopeState.UNKNOWN
        assert caught.value.documents == [document]

    async def test_that_was_caught_is_no_abort_that_can_be_begun_anew(
        self, client: Any, fail_point: FailPoint
    ) -> None:
        with pytest.raises(CommitUnknownError):
            async with (scope := scope_of(client, timeout=0.05)):
                await Item().insert()
                with fail_point("commitTransaction", error_code=64, labels=[UNKNOWN]):
                    with pytest.raises(CommitUnknownError):
                        await scope.commit()
                for end in (scope.commit, scope.abort):
                    with pytest.raises(ScopeClosedError, match="unknown"):
                        await end()

    async def test_that_was_caught_is_not_called_a_rollback_in_the_end(
        self, client: Any, wire: Wire, fail_point: FailPoint
    ) -> None:
        """Nobody may say of it that nothing was stored, nor that everything was."""
        with pytest.raises(CommitUnknownError):
            async with (scope := scope_of(client, timeout=0.05)):
                await Item().insert()
                with fail_point("commitTransaction", error_code=64, labels=[UNKNOWN]):
                    with pytest.raises(CommitUnknownError):
                        await scope.commit()
                with wire.record() as seen, pytest.raises(SessionScopeError) as refused:
                    await Item().insert()
                assert seen == []
                assert "ended it on the server" not in str(refused.value)
        assert scope.state is ScopeState.UNKNOWN


class TestCursors:
    @ENDINGS
    @pytest.mark.parametrize("batch_size", [2, 100])
    async def test_of_a_transaction_that_was_ended_are_refused(
        self, client: Any, wire: Wire, ending: str, batch_size: int
    ) -> None:
        """Those as well that have documents at hand which the driver could still give."""
        await Item.insert_many([Item() for _ in range(5)])
        async with (scope := scope_of(client)):
            cursor = getattr(Item, GETTER)().find({}, batch_size=batch_size)
            await cursor.next()
            await getattr(scope, ending)()
            with wire.record() as seen:
                with pytest.raises(ScopeClosedError, match="another one"):
                    await cursor.next()
                with pytest.raises(ScopeClosedError, match="another one"):
                    await cursor.to_list(None)
                await cursor.close()
            assert seen == []
            assert await Item.find().count() == 5

    @ENDINGS
    async def test_are_refused_in_the_middle_of_a_loop(self, client: Any, ending: str) -> None:
        await Item.insert_many([Item() for _ in range(5)])
        async with (scope := scope_of(client)):
            with pytest.raises(ScopeClosedError):
                async for _ in Item.find(batch_size=2):
                    await getattr(scope, ending)()


class TestSiblings:
    @ENDINGS
    async def test_wait_while_a_transaction_is_ended(
        self, client: Any, wire: Wire, database: Any, fail_point: FailPoint, ending: str
    ) -> None:
        with fail_point(COMMAND[ending], block_ms=100, times=1), wire.record() as seen:
            async with (scope := scope_of(client)):
                await Item(name="a").insert()
                task = asyncio.ensure_future(getattr(scope, ending)())
                while scope.state is ScopeState.OPEN:
                    await asyncio.sleep(0)
                found = await Item.find().to_list()
                await task
        assert names(seen) == ["insert", COMMAND[ending], "find", "commitTransaction"]
        assert [each.name for each in found] == (["a"] if ending == "commit" else [])

    @ENDINGS
    async def test_in_flight_are_waited_for(
        self, client: Any, wire: Wire, database: Any, fail_point: FailPoint, ending: str
    ) -> None:
        await Item(name="a").insert()
        with fail_point("update", block_ms=100, times=1), wire.record() as seen:
            async with (scope := scope_of(client)):
                update = Item.find_all().update({"$set": {"name": "b"}})
                task = asyncio.gather(update)
                while "update" not in names(wire._events):
                    await asyncio.sleep(0)
                await getattr(scope, ending)()
                assert task.done()
                await task
        assert names(seen)[:2] == ["update", COMMAND[ending]]
        assert await stored(database) == (["b"] if ending == "commit" else ["a"])

    async def test_may_end_it_one_after_the_other(self, client: Any, database: Any) -> None:
        async with (scope := scope_of(client)):
            await Item(name="a").insert()
            await asyncio.gather(scope.commit(), scope.commit(), scope.abort())
            await Item(name="b").insert()
        assert await stored(database) == ["a", "b"]


@ENDINGS
class TestEndingIsRefused:
    async def test_to_a_block_that_joined(self, client: Any, database: Any, ending: str) -> None:
        async with scope_of(client):
            await Item(name="a").insert()
            async with (joined := scope_of(client)):
                with pytest.raises(PropagationError, match="Only the owner"):
                    await getattr(joined, ending)()
        assert await stored(database) == ["a"]

    async def test_while_a_block_that_joined_is_open(
        self, client: Any, database: Any, ending: str
    ) -> None:
        async with (scope := scope_of(client)):
            await Item(name="a").insert()
            async with scope_of(client):
                with pytest.raises(PropagationError, match="Only the owner"):
                    await getattr(scope, ending)()
            await getattr(scope, ending)()
        assert await stored(database) == (["a"] if ending == "commit" else [])

    async def test_without_a_transaction(self, client: Any, ending: str) -> None:
        async with (scope := scope_of(client, transaction=False)):
            with pytest.raises(PropagationError, match="plain session"):
                await getattr(scope, ending)()

    async def test_on_a_session_of_somebody_else(self, client: Any, ending: str) -> None:
        session = await DRIVER.start_session(client)
        await DRIVER.start_transaction(session)
        with bind_session(session, collections=[Item]):
            async with (scope := scope_of(client)):
                with pytest.raises(PropagationError, match="somebody else"):
                    await getattr(scope, ending)()
        await session.abort_transaction()
        await session.end_session()

    async def test_before_the_block_and_after_it(self, client: Any, ending: str) -> None:
        scope = scope_of(client)
        with pytest.raises(ScopeClosedError, match="new"):
            await getattr(scope, ending)()
        async with scope:
            await Item().insert()
        with pytest.raises(ScopeClosedError, match="committed"):
            await getattr(scope, ending)()

    async def test_while_the_block_is_being_left(
        self, client: Any, database: Any, fail_point: FailPoint, ending: str
    ) -> None:
        async def late() -> None:
            while scope.state is ScopeState.OPEN:
                await asyncio.sleep(0)
            await getattr(scope, ending)()

        with fail_point("commitTransaction", block_ms=100, times=1):
            async with (scope := scope_of(client)):
                await Item(name="a").insert()
                task = asyncio.ensure_future(late())
                await asyncio.sleep(0)
            with pytest.raises(ScopeClosedError):
                await task
        assert await stored(database) == ["a"]
