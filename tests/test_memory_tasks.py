"""G6 among tasks: documents that several write, and documents that nobody holds any longer."""

from __future__ import annotations

import asyncio
import gc
from typing import Any
from uuid import uuid4
from weakref import ref

import pytest
import pytest_asyncio
from beanie import WriteRules
from beanie.exceptions import RevisionIdWasChanged
from memory_models import Both, BothParent, Eventful, initialise, look, scope_of, stored
from pymongo.errors import DuplicateKeyError
from wire import FailPoint, Wire, names

from beanie_session_scope import (
    Rollback,
    ScopeClosedError,
    ScopeState,
    SessionScopeError,
)


@pytest_asyncio.fixture(autouse=True)
async def _classes(database: Any) -> None:
    await initialise(database)


def check_refused(results: list[Any]) -> None:
    """Check that whatever was not done was refused by the scope."""
    refused = [each for each in results if isinstance(each, BaseException)]
    assert all(isinstance(each, SessionScopeError) for each in refused), refused


async def check_memory(database: Any, *documents: Any) -> None:
    """Check that documents are new, or what is stored of them."""
    for each in documents:
        found = await stored(database, each)
        assert (found is None) is (each.id is None)
        assert found is None or found["revision_id"] == each.revision_id


class Pause:
    """What an event action waits for, when it has said that it was reached."""

    def __init__(self) -> None:
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await self.go_on.wait()


@pytest.mark.timeout(30)
class TestConcurrentTasks:
    async def test_of_which_one_fails_leave_no_document_changed(
        self, client: Any, database: Any
    ) -> None:
        documents = [await Both(n=1).insert() for _ in range(5)]
        new = [Both(n=1) for _ in range(5)]
        before = [look(each) for each in (*documents, *new)]

        async def fail() -> None:
            await documents[0].inc({"n": 1})
            raise KeyError

        with pytest.raises(KeyError):
            async with scope_of(client):
                tasks = [
                    asyncio.ensure_future(work)
                    for work in (
                        *(each.replace() for each in documents[1:]),
                        *(each.insert() for each in new),
                        fail(),
                    )
                ]
                await asyncio.gather(*tasks)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [look(each) for each in (*documents, *new)] == before
        for each in documents:
            await each.replace()

    async def test_that_share_a_document_leave_it_as_it_was(
        self, client: Any, database: Any
    ) -> None:
        document = await Both(n=0).insert()
        before = look(document)
        async with scope_of(client):
            await asyncio.gather(
                *(document.update({"$inc": {"n": 1}}, ignore_revision=True) for _ in range(5))
            )
            assert document.n == 5
            raise Rollback
        assert look(document) == before

    async def test_that_write_while_the_abort_is_under_way_change_nothing(
        self, client: Any, fail_point: FailPoint
    ) -> None:
        first, late = await Both(n=1).insert(), await Both(n=1).insert()
        before = look(late)

        async def sibling() -> None:
            while scope.state is ScopeState.OPEN:
                await asyncio.sleep(0)
            await late.replace()

        with fail_point("abortTransaction", block_ms=100, times=1):
            async with (scope := scope_of(client)):
                await first.inc({"n": 1})
                task = asyncio.ensure_future(sibling())
                await asyncio.sleep(0)
                raise Rollback
        with pytest.raises(ScopeClosedError):
            await task
        assert look(late) == before
        await late.replace()

    async def test_that_are_in_an_event_action_when_the_abort_comes_change_nothing_more(
        self, client: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What Beanie does to a document when it has been written comes after the action."""
        document = await Eventful(name="a").insert()
        document.name = "B"
        before = look(document)
        pause = Pause()
        monkeypatch.setattr(Eventful, "pause", pause)
        async with scope_of(client):
            task = asyncio.ensure_future(document.save())
            await pause.reached.wait()
            raise Rollback
        pause.go_on.set()
        await asyncio.gather(task, return_exceptions=True)
        assert look(document) == before
        assert document.is_changed

    @pytest.mark.parametrize("ending", ["commit", "abort"])
    async def test_whose_write_waits_for_an_end_in_the_block_are_taken_back_with_the_next(
        self, client: Any, database: Any, fail_point: FailPoint, ending: str
    ) -> None:
        command = {"commit": "commitTransaction", "abort": "abortTransaction"}[ending]
        document, new = await Both(n=1).insert(), Both(n=1)
        before = look(document), look(new)
        with fail_point(command, block_ms=100, times=1):
            async with (scope := scope_of(client)):
                await Both(n=5).insert()
                task = asyncio.ensure_future(getattr(scope, ending)())
                while scope.state is ScopeState.OPEN:
                    await asyncio.sleep(0)
                await asyncio.gather(document.replace(), new.insert(), return_exceptions=True)
                await task
                raise Rollback
        assert (look(document), look(new)) == before
        await document.replace()
        await new.insert()

    @pytest.mark.parametrize("ending", ["commit", "abort"])
    async def test_whose_write_begins_while_an_end_in_the_block_waits_its_turn_know_what_is_stored(
        self, client: Any, database: Any, wire: Wire, fail_point: FailPoint, ending: str
    ) -> None:
        document, new = await Both(n=1).insert(), Both(n=1)
        with fail_point("find", block_ms=100, times=1):
            async with (scope := scope_of(client)):
                await document.inc({"n": 1})
                first = asyncio.ensure_future(Both.find_one())
                while "find" not in names(wire._events):
                    await asyncio.sleep(0)
                end = asyncio.ensure_future(getattr(scope, ending)())
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                assert scope.state is ScopeState.OPEN, "it waits for the first operation"
                works = first, end, document.replace(), new.insert()
                check_refused(await asyncio.gather(*works, return_exceptions=True))
        assert document.n == (2 if ending == "commit" else 1)
        await check_memory(database, document, new)
        await document.replace()

    @pytest.mark.parametrize("ending", ["commit", "abort"])
    @pytest.mark.parametrize("write", ["insert", "save", "replace"])
    async def test_whose_cascade_is_cut_in_two_by_an_end_in_the_block_know_what_is_stored(
        self,
        client: Any,
        database: Any,
        wire: Wire,
        fail_point: FailPoint,
        ending: str,
        write: str,
    ) -> None:
        """The child was written in the transaction that was ended, its parent not yet."""
        parent = BothParent(one=Both(n=1))
        if write != "insert":
            await parent.insert(link_rule=WriteRules.WRITE)
        command = "update" if write == "replace" else "findAndModify"
        already = names(wire._events).count(command)
        with fail_point(command, block_ms=100, times=1):
            async with (scope := scope_of(client)):
                task = asyncio.ensure_future(getattr(parent, write)(link_rule=WriteRules.WRITE))
                while names(wire._events).count(command) == already:
                    await asyncio.sleep(0)
                ends = asyncio.gather(getattr(scope, ending)(), task, return_exceptions=True)
                check_refused(await ends)
        await check_memory(database, parent, parent.one)
        for found in await database["memory_both_parent"].find().to_list(None):
            child = await database["memory_both"].find_one({"_id": found["one"].id})
            assert child is not None, "a dangling reference"

    @pytest.mark.parametrize("ending", ["commit", "abort"])
    async def test_that_are_in_an_event_action_at_an_end_in_the_block_know_what_is_stored(
        self, client: Any, database: Any, monkeypatch: pytest.MonkeyPatch, ending: str
    ) -> None:
        """The document is stored by then, or not, and Beanie goes on changing it."""
        document = Eventful()
        before = look(document)
        pause = Pause()
        monkeypatch.setattr(Eventful, "pause", pause)
        async with (scope := scope_of(client)):
            task = asyncio.ensure_future(document.insert())
            await pause.reached.wait()
            await asyncio.gather(getattr(scope, ending)(), return_exceptions=True)
            pause.go_on.set()
            await asyncio.gather(task, return_exceptions=True)
            raise Rollback
        await check_memory(database, document)
        if ending == "abort":
            assert look(document) == before

    async def test_that_are_in_an_event_action_at_an_abort_in_the_block_change_nothing_more(
        self, client: Any, database: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was saved is not, though the block goes on and commits what comes then."""
        document = await Eventful(name="a").insert()
        document.name = "B"
        before = look(document)
        pause = Pause()
        monkeypatch.setattr(Eventful, "pause", pause)
        async with (scope := scope_of(client)):
            task = asyncio.ensure_future(document.save())
            await pause.reached.wait()
            await asyncio.gather(scope.abort(), return_exceptions=True)
            pause.go_on.set()
            await asyncio.gather(task, return_exceptions=True)
            await Both().insert()
        monkeypatch.setattr(Eventful, "pause", None)
        assert look(document) == before
        await document.save_changes()
        assert (await stored(database, document))["name"] == "B"

    @pytest.mark.parametrize("ending", ["commit", "abort"])
    async def test_can_end_a_transaction_when_a_write_has_failed(
        self, client: Any, database: Any, ending: str
    ) -> None:
        document = await Both(n=1).insert()
        async with (scope := scope_of(client)):
            with pytest.raises(RevisionIdWasChanged):
                await Both(id=document.id, revision_id=uuid4()).replace()
            await getattr(scope, ending)()
            await document.inc({"n": 1})
        assert (await stored(database, document))["n"] == 2

    async def test_may_end_a_transaction_from_an_event_action(
        self, client: Any, database: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        document = Eventful()
        async with (scope := scope_of(client)):
            monkeypatch.setattr(Eventful, "pause", scope.commit)
            await asyncio.gather(document.insert(), return_exceptions=True)
            raise Rollback
        await check_memory(database, document)


class TestAScopeThatIsOver:
    @pytest.mark.parametrize("ending", ["commit", "abort", "failure"])
    async def test_keeps_no_document_alive(self, client: Any, ending: str) -> None:
        first = await Both(n=1).insert()

        async def inherited() -> None:
            await over.wait()

        async def work() -> ref[Any]:
            document = Both(id=first.id if ending == "failure" else None)
            async with scope_of(client):
                tasks.append(asyncio.ensure_future(inherited()))
                await asyncio.sleep(0)
                await document.insert()
                if ending == "abort":
                    raise Rollback
            return ref(document)

        async def failing() -> ref[Any]:
            kept: list[ref[Any]] = []
            try:
                async with scope_of(client):
                    tasks.append(asyncio.ensure_future(inherited()))
                    await asyncio.sleep(0)
                    document = Both(id=first.id)
                    kept.append(ref(document))
                    await document.insert()
            except DuplicateKeyError:
                pass
            return kept[0]

        over, tasks = asyncio.Event(), []  # type: ignore[var-annotated]
        reference = await (failing if ending == "failure" else work)()
        gc.collect()
        try:
            assert not tasks[0].done(), "it inherited the scope, and still runs"
            assert reference() is None
        finally:
            over.set()
            await asyncio.gather(*tasks)
