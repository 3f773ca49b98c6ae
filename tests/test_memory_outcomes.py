"""G6, outcome by outcome: when documents are taken back, and when they are not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import pytest_asyncio
from clients import kill_sessions
from labels import UNKNOWN
from memory_models import Both, Neither, Soft, initialise, look, scope_of, stored
from models import Cached
from pymongo.errors import DuplicateKeyError, OperationFailure
from pymongo.write_concern import WriteConcern
from wire import FailPoint, open_transactions

from beanie_session_scope import (
    CommitUnknownError,
    Rollback,
    ScopeState,
    TransactionAbortedError,
    UnexpectedRollbackError,
    bind_session,
    outside_session,
    with_session,
)
from beanie_session_scope.drivers import DRIVER


@pytest_asyncio.fixture(autouse=True)
async def _classes(database: Any) -> None:
    await initialise(database)


async def write(document: Any, new: Any) -> None:
    await document.inc({"n": 1})
    await document.replace()
    await new.insert()


class TestEveryAbort:
    @pytest.mark.parametrize("error", [KeyError, SystemExit, asyncio.CancelledError, Rollback])
    async def test_by_an_exception_takes_documents_back(
        self, client: Any, error: type[BaseException]
    ) -> None:
        document, new = await Both(n=1).insert(), Both(n=1)
        before = look(document), look(new)
        try:
            async with scope_of(client):
                await write(document, new)
                raise error
        except (KeyError, SystemExit, asyncio.CancelledError):
            pass
        assert (look(document), look(new)) == before

    async def test_by_a_cancellation_in_flight_takes_documents_back(
        self, client: Any, fail_point: FailPoint, server_uri: str
    ) -> None:
        document, new = await Both(n=1).insert(), Both(n=1)
        before = look(document), look(new)
        writing = asyncio.Event()

        async def work() -> None:
            async with scope_of(client):
                await document.replace()
                writing.set()
                await new.insert()

        with fail_point("insert", block_ms=150, times=1):
            task = asyncio.ensure_future(work())
            await writing.wait()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (look(document), look(new)) == before
        assert open_transactions(server_uri) == 0
        await document.replace()

    async def test_because_of_a_commit_that_was_refused_takes_documents_back(
        self, client: Any, fail_point: FailPoint
    ) -> None:
        document, new = await Both(n=1).insert(), Both(n=1)
        before = look(document), look(new)
        with fail_point("commitTransaction", error_code=251, times=1):
            with pytest.raises(OperationFailure):
                async with (scope := scope_of(client)):
                    await write(document, new)
        assert scope.state is ScopeState.ABORTED
        assert (look(document), look(new)) == before

    async def test_of_a_transaction_that_was_gone_takes_documents_back(self, client: Any) -> None:
        document, new = await Both(n=1).insert(), Both(n=1)
        before = look(document), look(new)
        with pytest.raises(TransactionAbortedError):
            async with scope_of(client):
                await write(document, new)
                with pytest.raises(DuplicateKeyError):
                    await Both(id=document.id).insert()
        assert (look(document), look(new)) == before
        await write(document, new)

    async def test_of_a_scope_that_was_rollback_only_takes_documents_back(
        self, client: Any
    ) -> None:
        document, new = await Both(n=1).insert(), Both(n=1)
        before = look(document), look(new)
        with pytest.raises(UnexpectedRollbackError):
            async with (scope := scope_of(client)):
                await write(document, new)
                scope.set_rollback_only("it is wrong")
        assert (look(document), look(new)) == before

    async def test_by_hand_on_the_drivers_session_is_nobodys_but_the_callers(
        self, client: Any
    ) -> None:
        """The scope is told nothing of it, and has no outcome."""
        document = await Both(n=1).insert()
        async with (scope := scope_of(client)) as session:
            await document.inc({"n": 1})
            await session.abort_transaction()
        assert scope.state is ScopeState.ENDED
        assert document.n == 2


class TestACommit:
    async def test_keeps_what_was_written(self, client: Any, database: Any) -> None:
        document, new = await Both(n=1).insert(), Both(n=1)
        async with scope_of(client):
            await write(document, new)
        assert (document.n, new.n) == (2, 1)
        for each in (document, new):
            assert (await stored(database, each))["revision_id"] == each.revision_id
            await each.replace()

    async def test_in_the_block_is_what_a_later_abort_goes_back_to(
        self, client: Any, database: Any
    ) -> None:
        document, new = await Both(n=1).insert(), Both(n=1)
        async with (scope := scope_of(client)):
            await write(document, new)
            await scope.commit()
            committed = look(document), look(new)
            await write(document, Both())
            await new.inc({"n": 1})
            raise Rollback
        assert (look(document), look(new)) == committed
        for each in (document, new):
            await each.replace()
            assert (await stored(database, each))["n"] == each.n


class TestAnUnknownCommit:
    @staticmethod
    async def _unknown(client: Any, fail_point: FailPoint, *works: Any) -> Any:
        scope = scope_of(client, timeout=0.05)
        with fail_point("commitTransaction", error_code=64, labels=[UNKNOWN]):
            with pytest.raises(CommitUnknownError) as caught:
                async with scope:
                    for work in works:
                        await work
        return scope, caught.value

    async def test_leaves_documents_as_they_are(self, client: Any, fail_point: FailPoint) -> None:
        document, new = await Both(n=1).insert(), Both(n=1)
        await self._unknown(client, fail_point, write(document, new))
        assert (document.n, new.id is None) == (2, False)

    async def test_names_all_documents_that_were_written_or_tracked(
        self, client: Any, fail_point: FailPoint
    ) -> None:
        document, new, tracked = await Both().insert(), Both(), await Neither().insert()
        scope = scope_of(client, timeout=0.05)
        with fail_point("commitTransaction", error_code=64, labels=[UNKNOWN]):
            with pytest.raises(CommitUnknownError) as caught:
                async with scope:
                    scope.track(tracked)
                    await write(document, new)
                    await Neither.find_one()
        assert [id(each) for each in caught.value.documents] == [
            id(tracked),
            id(document),
            id(new),
        ]

    async def test_that_was_none_is_refreshed_to_what_was_before(
        self, client: Any, database: Any, fail_point: FailPoint, wire: Any
    ) -> None:
        document, new = await Both(n=1).insert(), Both(n=1)
        before = look(document), look(new)
        scope, _ = await self._unknown(client, fail_point, write(document, new))
        await kill_sessions(client, wire)
        await scope.refresh()
        assert look(document)["fields"] == before[0]["fields"]
        assert look(new) == before[1]
        await document.replace()
        await new.insert()

    async def test_that_was_one_is_refreshed_to_what_was_written(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        document, new, gone = await Both(n=1).insert(), Both(n=1), await Soft(n=1).insert()
        # Each commit is done, and answered by: waiting for its replication timed out.
        with fail_point("commitTransaction", write_concern_error=64):
            with pytest.raises(CommitUnknownError):
                async with (scope := scope_of(client, timeout=0.05)):
                    await write(document, new)
                    await gone.delete()
        document.n = new.n = 99
        await database["memory_both"].update_one({"_id": new.id}, {"$set": {"name": "since"}})
        await scope.refresh()
        assert (document.n, new.n, new.name) == (2, 1, "since")
        assert gone.is_deleted(), "a document that is marked as deleted is stored all the same"
        for each in (document, new):
            assert not each.is_changed
            await each.replace()
        assert (await stored(database, document))["n"] == 2

    async def test_refreshes_only_the_documents_that_are_named(
        self, client: Any, fail_point: FailPoint, wire: Any
    ) -> None:
        document, new = await Both(n=1).insert(), Both(n=1)
        scope, error = await self._unknown(client, fail_point, write(document, new))
        await kill_sessions(client, wire)
        assert error.documents == [document, new]
        await scope.refresh(new)
        assert (document.n, new.id) == (2, None)

    async def test_that_could_not_be_satisfied_is_not_taken_for_an_abort(
        self, client: Any, database: Any
    ) -> None:
        """The server commits first, and finds out then that the write concern asks too much."""
        document = Both(n=1)
        with pytest.raises(CommitUnknownError):
            async with (scope := scope_of(client, write_concern=WriteConcern(w=7), timeout=1)):
                await document.insert()
                the_id = document.id
        assert await database["memory_both"].count_documents({"_id": the_id}) == 1
        assert scope.state is ScopeState.UNKNOWN


class TestABlockThatJoined:
    async def test_shares_the_fate_of_its_owners_documents(self, client: Any) -> None:
        document, new = await Both(n=1).insert(), Both(n=1)
        before = look(document), look(new)
        async with scope_of(client):
            async with scope_of(client) as session:
                await write(document, new)
            assert document.n == 2
            assert not session.has_ended
            raise Rollback
        assert (look(document), look(new)) == before

    async def test_that_failed_takes_nothing_back_before_its_owner_does(self, client: Any) -> None:
        document = await Both(n=1).insert()
        with pytest.raises(UnexpectedRollbackError):
            async with scope_of(client):
                with pytest.raises(KeyError):
                    async with scope_of(client):
                        await document.inc({"n": 1})
                        raise KeyError
                assert document.n == 2
        assert document.n == 1

    async def test_tracks_for_its_owner(self, client: Any) -> None:
        document = Both(n=1)
        async with scope_of(client):
            async with (joined := scope_of(client)):
                joined.track(document)
            document.n = 5
            raise Rollback
        assert document.n == 1


class TestAnIndependentScope:
    @pytest.mark.parametrize("inner", ["commit", "abort"])
    @pytest.mark.parametrize("outer", ["commit", "abort"])
    async def test_takes_back_its_own_documents_only(
        self, client: Any, database: Any, outer: str, inner: str
    ) -> None:
        first, second = await Both(n=1).insert(), await Both(n=1).insert()
        async with scope_of(client):
            await first.inc({"n": 1})
            async with scope_of(client, propagation="requires_new"):
                await second.inc({"n": 1})
                if inner == "abort":
                    raise Rollback
            if outer == "abort":
                raise Rollback
        assert first.n == (2 if outer == "commit" else 1)
        assert second.n == (2 if inner == "commit" else 1)
        for each in (first, second):
            assert (await stored(database, each))["n"] == each.n
            await each.replace()

    async def test_that_commits_is_what_the_outer_one_goes_back_to(
        self, client: Any, database: Any
    ) -> None:
        document = await Both(n=1).insert()
        async with (scope := scope_of(client)):
            scope.track(document)
            async with scope_of(client, propagation="requires_new"):
                await document.inc({"n": 1})
            document.n = 99
            raise Rollback
        assert document.n == 2
        await document.replace()
        assert (await stored(database, document))["n"] == 2

    async def test_written_outside_any_scope_is_what_the_outer_one_goes_back_to(
        self, client: Any, database: Any
    ) -> None:
        """What is stored can't be taken back: neither can the document that was stored."""
        document = await Both(n=1).insert()
        async with (scope := scope_of(client)):
            scope.track(document)
            with outside_session():
                await document.inc({"n": 1})
            raise Rollback
        assert document.n == 2
        await document.replace()
        assert (await stored(database, document))["n"] == 2


class TestASessionOfSomebodyElse:
    async def test_leaves_documents_alone(self, client: Any) -> None:
        document = await Both(n=1).insert()
        session = await DRIVER.start_session(client)
        await DRIVER.start_transaction(session)
        with bind_session(session, collections=[Both]):
            await document.inc({"n": 1})
        await session.abort_transaction()
        await session.end_session()
        assert document.n == 2

    async def test_passed_by_hand_to_a_scope_that_owns_it_does_not(self, client: Any) -> None:
        """The scope binds nothing here: what counts is whose session it is."""
        document, new = await Both(n=1).insert(), Both(n=1)
        before = look(document), look(new)
        async with with_session(client=client, collections=[]) as session:
            await new.insert(session=session)
            await document.inc({"n": 1}, session=session)
            await document.replace(False, session)
            document.n = 7
            await document.save_changes(False, session)
            raise Rollback
        assert (look(document), look(new)) == before

    async def test_without_a_transaction_leaves_documents_alone(
        self, client: Any, database: Any
    ) -> None:
        document = await Both(n=1).insert()
        with pytest.raises(KeyError):
            async with scope_of(client, transaction=False):
                await document.inc({"n": 1})
                raise KeyError
        assert document.n == (await stored(database, document))["n"] == 2


class TestTheQueryCache:
    async def test_gets_nothing_of_documents_that_are_taken_back(
        self, client: Any, database: Any
    ) -> None:
        document = await Cached(n=1).insert()
        query = {"_id": document.id}
        assert (await Cached.find_one(query)).n == 1, "the cache is warm"
        async with with_session(client=client, collections=[Cached]):
            await document.inc({"n": 1})
            assert (await Cached.find_one(query)).n == 2
            raise Rollback
        assert document.n == (await Cached.find_one(query)).n == 1

    async def test_is_not_what_a_refresh_reads(self, client: Any, database: Any) -> None:
        document = await Cached(n=1).insert()
        assert await Cached.find_one({"_id": document.id}) is not None, "the cache is warm"
        async with (scope := with_session(client=client, collections=[Cached])):
            await document.inc({"n": 1})
        await database["cached"].update_one({}, {"$set": {"n": 9}})
        await scope.refresh()
        assert document.n == 9
