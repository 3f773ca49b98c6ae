"""G6: after an abort, documents in memory are what they were, so what comes next stores the truth.

Beanie changes documents while it writes them: id, revision, saved states, merged fields. Each of
the cases here went wrong with a session passed by hand.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
from beanie import BulkWriter, DeleteRules, MergeStrategy, WriteRules
from labels import TRANSIENT, labelled
from memory_models import (
    EVERY,
    WITH_REVISION,
    WITH_STATE,
    Both,
    BothParent,
    Counting,
    Eventful,
    GrandParent,
    Neither,
    NeitherParent,
    Previous,
    Soft,
    initialise,
    look,
    scope_of,
    stored,
)

from beanie_session_scope import Rollback, outside_session, run_in_transaction, with_session

Write = Callable[[Any], Awaitable[Any]]

WRITES: dict[str, Write] = {
    "save": lambda document: document.save(),
    "replace": lambda document: document.replace(),
    "set": lambda document: document.set({"n": 7}),
    "inc": lambda document: document.inc({"n": 7}),
    "update": lambda document: document.update({"$set": {"n": 7}}),
}
every_model = pytest.mark.parametrize("model", EVERY)
every_write = pytest.mark.parametrize("write", WRITES)
parents = pytest.mark.parametrize(
    ("parent", "child"), [(NeitherParent, Neither), (BothParent, Both)]
)


@pytest_asyncio.fixture(autouse=True)
async def _classes(database: Any) -> None:
    await initialise(database)


async def aborted(client: Any, *writes: Awaitable[Any]) -> None:
    """Run writes in a scope that aborts."""
    async with scope_of(client):
        for write in writes:
            await write
        raise Rollback


class TestSaveChangesAfterAnAbort:
    @pytest.mark.parametrize("model", WITH_STATE)
    async def test_really_stores(self, client: Any, database: Any, model: Any) -> None:
        document = await model(n=1).insert()
        document.n = 2
        before = look(document)
        await aborted(client, document.save_changes())
        assert look(document) == before
        assert document.is_changed
        async with scope_of(client):
            await document.save_changes()
        assert (await stored(database, document))["n"] == 2

    @pytest.mark.parametrize("model", WITH_STATE)
    async def test_really_stores_outside_any_scope_too(
        self, client: Any, database: Any, model: Any
    ) -> None:
        document = await model(n=1).insert()
        document.n = 2
        await aborted(client, document.save_changes())
        await document.save_changes()
        assert (await stored(database, document))["n"] == 2

    @pytest.mark.parametrize("model", WITH_STATE)
    @every_write
    async def test_stores_what_another_write_did_not(
        self, client: Any, database: Any, model: Any, write: str
    ) -> None:
        document = await model(n=1).insert()
        document.name = "changed"
        await aborted(client, WRITES[write](document))
        await document.save_changes()
        assert (await stored(database, document))["name"] == "changed"

    async def test_knows_the_previous_state_of_before(self, client: Any) -> None:
        document = await Previous(n=1).insert()
        document.n = 2
        await document.save_changes()
        document.n = 3
        await aborted(client, document.save_changes())
        assert document.get_previous_changes() == {"n": 2}
        assert document.get_changes() == {"n": 3}


class TestARevisionAfterAnAbort:
    @pytest.mark.parametrize("model", WITH_REVISION)
    @every_write
    async def test_is_the_stored_one(
        self, client: Any, database: Any, model: Any, write: str
    ) -> None:
        for name, again in WRITES.items():
            document = await model(n=1).insert()
            revision = document.revision_id
            await aborted(client, WRITES[write](document))
            assert document.revision_id == revision
            await again(document)
            found = await stored(database, document)
            assert found["revision_id"] == document.revision_id != revision, name

    @pytest.mark.parametrize("model", WITH_REVISION)
    async def test_goes_on_in_a_scope_that_commits(
        self, client: Any, database: Any, model: Any
    ) -> None:
        document = await model(n=1).insert()
        for write in WRITES.values():
            await aborted(client, write(document))
        async with scope_of(client):
            for write in WRITES.values():
                await write(document)
        assert (await stored(database, document))["revision_id"] == document.revision_id

    async def test_is_that_of_before_the_first_write(self, client: Any, database: Any) -> None:
        document = await Both(n=1).insert()
        before = look(document)
        await aborted(client, *(write(document) for write in WRITES.values()))
        assert look(document) == before
        await document.replace()
        assert (await stored(database, document))["n"] == 1


class TestADocumentInsertedAndAborted:
    @every_model
    async def test_is_what_it_was_before(self, client: Any, model: Any) -> None:
        document = model(name="mine", n=1)
        before = look(document)
        await aborted(client, document.insert())
        assert document.id is None
        assert look(document) == before

    @every_model
    async def test_can_be_inserted_again(self, client: Any, database: Any, model: Any) -> None:
        document = model(n=1)
        await aborted(client, document.insert())
        async with scope_of(client):
            await document.insert()
        assert (await stored(database, document))["n"] == 1
        assert await database[model.get_collection_name()].count_documents({}) == 1

    @every_model
    @pytest.mark.parametrize("write", [*WRITES, "insert"])
    async def test_behaves_as_one_that_was_never_inserted(
        self, client: Any, database: Any, model: Any, write: str
    ) -> None:
        async def outcome(document: Any) -> str:
            try:
                await WRITES.get(write, lambda document: document.insert())(document)
            except Exception as error:
                return type(error).__name__
            assert (await stored(database, document))["n"] == document.n
            return "stored"

        document = model(n=1)
        await aborted(client, document.insert())
        assert await outcome(document) == await outcome(model(n=1))

    @every_model
    async def test_and_written_further_is_what_it_was_before(
        self, client: Any, database: Any, model: Any
    ) -> None:
        document = model(n=1)
        before = look(document)
        await aborted(client, document.insert(), *(write(document) for write in WRITES.values()))
        assert look(document) == before
        await document.insert()
        assert (await stored(database, document))["n"] == 1

    async def test_keeps_an_id_that_it_had_before(self, client: Any, database: Any) -> None:
        first = await Both().insert()
        document = Both(id=first.id, n=2)
        await first.delete()
        await aborted(client, document.insert())
        assert document.id == first.id
        await document.insert()
        assert (await stored(database, document))["n"] == 2


class TestACascadeAfterAnAbort:
    @parents
    @pytest.mark.parametrize("write", ["insert", "save"])
    async def test_leaves_no_ids(self, client: Any, parent: Any, child: Any, write: str) -> None:
        document = parent(one=child(n=1), many=[child(n=2), child(n=3)])
        family = [document, document.one, *document.many]
        before = [look(each) for each in family]
        await aborted(client, getattr(document, write)(link_rule=WriteRules.WRITE))
        assert [each.id for each in family] == [None] * 4
        assert [look(each) for each in family] == before

    @parents
    @pytest.mark.parametrize("write", ["insert", "save"])
    async def test_can_be_written_again_without_a_dangling_reference(
        self, client: Any, database: Any, parent: Any, child: Any, write: str
    ) -> None:
        document = parent(one=child(n=1), many=[child(n=2), child(n=3)])
        await aborted(client, document.insert(link_rule=WriteRules.WRITE))
        await getattr(document, write)(link_rule=WriteRules.WRITE)
        found = await stored(database, document)
        children = {each["_id"] async for each in database[child.get_collection_name()].find()}
        assert {reference.id for reference in (found["one"], *found["many"])} == children
        assert len(children) == 3

    @parents
    async def test_stores_no_reference_to_children_that_are_not_there(
        self, client: Any, database: Any, parent: Any, child: Any
    ) -> None:
        """Beanie refuses to refer to a document without an id, as for one never inserted."""
        document = parent(one=child(n=1))
        await aborted(client, document.insert(link_rule=WriteRules.WRITE))
        with pytest.raises(Exception, match="id"):
            await document.save()
        assert await stored(database, document) is None

    async def test_reaches_the_links_of_links(self, client: Any, database: Any) -> None:
        document = GrandParent(one=BothParent(one=Both(n=1)))
        await aborted(client, document.insert(link_rule=WriteRules.WRITE))
        assert document.id is document.one.id is document.one.one.id is None
        await document.insert(link_rule=WriteRules.WRITE)
        assert (await stored(database, document.one.one))["n"] == 1

    async def test_of_a_replace_and_of_a_save_restores_the_revisions_of_all(
        self, client: Any, database: Any
    ) -> None:
        document = BothParent(one=Both(n=1), many=[Both(n=2)])
        await document.insert(link_rule=WriteRules.WRITE)
        before = [look(each) for each in (document, document.one, *document.many)]
        await aborted(
            client,
            document.replace(link_rule=WriteRules.WRITE),
            document.save(link_rule=WriteRules.WRITE),
        )
        assert [look(each) for each in (document, document.one, *document.many)] == before
        await document.replace(link_rule=WriteRules.WRITE)
        found = await stored(database, document.one)
        assert found["revision_id"] == document.one.revision_id

    async def test_of_a_delete_leaves_all_as_they_were(self, client: Any, database: Any) -> None:
        document = BothParent(one=Both(n=1))
        await document.insert(link_rule=WriteRules.WRITE)
        before = look(document), look(document.one)
        await aborted(client, document.delete(link_rule=DeleteRules.DELETE_LINKS))
        assert (look(document), look(document.one)) == before
        await document.save(link_rule=WriteRules.WRITE)
        assert await stored(database, document.one) is not None


class TestMergedFieldsAfterAnAbort:
    @every_model
    @pytest.mark.parametrize("write", ["inc", "set", "update"])
    async def test_are_not_stored_by_the_next_save(
        self, client: Any, database: Any, model: Any, write: str
    ) -> None:
        document = await model(n=1).insert()
        await aborted(client, WRITES[write](document))
        assert document.n == 1
        await document.save()
        assert (await stored(database, document))["n"] == 1

    async def test_of_what_others_had_stored_are_taken_back_with_the_rest(
        self, client: Any, database: Any
    ) -> None:
        document = await Neither(name="mine", n=1).insert()
        await database["memory_neither"].update_one({}, {"$set": {"name": "theirs"}})
        await aborted(client, document.inc({"n": 1}))
        assert (document.name, document.n) == ("mine", 1)

    async def test_keep_what_the_block_had_set_before_its_first_write(self, client: Any) -> None:
        document = await Neither(n=1).insert()
        async with scope_of(client):
            document.n = 5
            await document.save()
            document.n = 6
            raise Rollback
        assert document.n == 5

    @pytest.mark.parametrize("strategy", ["remote", "local"])
    async def test_of_a_sync_are_taken_back(self, client: Any, strategy: str) -> None:
        document = await Both(n=1).insert()
        other = await Both.get(document.id)
        document.name = "local"
        before = look(document)
        await aborted(
            client, other.set({"n": 5}), document.sync(merge_strategy=MergeStrategy(strategy))
        )
        assert look(document) == before
        await document.save_changes()


class TestOtherWritesAfterAnAbort:
    @every_model
    async def test_a_deleted_document_is_what_it_was(
        self, client: Any, database: Any, model: Any
    ) -> None:
        document = await model(n=1).insert()
        before = look(document)
        await aborted(client, document.delete())
        assert look(document) == before
        await document.set({"n": 2})
        assert (await stored(database, document))["n"] == 2

    async def test_a_soft_deleted_document_is_not_deleted(self, client: Any, database: Any) -> None:
        document = await Soft(n=1).insert()
        before = look(document)
        await aborted(client, document.delete())
        assert not document.is_deleted()
        assert look(document) == before
        await document.save()
        assert (await stored(database, document))["deleted_at"] is None

    async def test_a_hard_deleted_document_is_what_it_was(self, client: Any, database: Any) -> None:
        document = await Soft(n=1).insert()
        before = look(document)
        await aborted(client, document.hard_delete())
        assert look(document) == before
        await document.replace()
        assert await stored(database, document) is not None

    async def test_an_upsert_lets_its_document_be_new_again(
        self, client: Any, database: Any
    ) -> None:
        document = Both(n=1)
        upsert = Both.find_one(Both.n == 9).upsert({"$set": {"n": 5}}, on_insert=document)
        await aborted(client, upsert)
        assert document.id is None and document.revision_id is None
        await document.insert()
        assert (await stored(database, document))["n"] == 1

    async def test_event_actions_are_taken_back(self, client: Any, database: Any) -> None:
        document = Eventful(name="mine")
        before, events = look(document), document.events
        await aborted(client, document.insert(), document.save(), document.delete())
        assert look(document) == before
        assert document.events is events == []
        await document.insert()
        assert (await stored(database, document))["events"] == ["before"]

    async def test_a_document_that_was_created_in_the_scope_is_new_again(
        self, client: Any, database: Any
    ) -> None:
        async with scope_of(client):
            document = await Both(n=1).insert()
            await document.inc({"n": 1})
            found = await Both.get(document.id)
            assert found is not None
            await found.inc({"n": 1})
            raise Rollback
        assert (document.id, document.n) == (None, 1)
        assert found.n == 2, "it was read so"
        await document.insert()
        assert (await stored(database, document))["n"] == 1

    async def test_what_is_written_outside_the_scope_is_not_taken_back(
        self, client: Any, database: Any
    ) -> None:
        document = await Both(n=1).insert()
        async with scope_of(client):
            with outside_session(Both):
                await document.inc({"n": 1})
            raise Rollback
        assert document.n == 2
        await document.save()
        assert (await stored(database, document))["n"] == 2


class TestAMethodThatASubclassOverrides:
    async def test_is_part_of_the_write(self, client: Any, database: Any) -> None:
        document = await Counting().insert()
        attempts = []

        async def save() -> None:
            attempts.append(document.n)
            await document.save()
            if len(attempts) < 3:
                raise labelled(TRANSIENT)

        await aborted(client, document.save(), document.save())
        assert document.n == 1
        await run_in_transaction(save, client=client, collections=[Counting])
        assert attempts == [1, 1, 1]
        assert document.n == (await stored(database, document))["n"] == 2

    async def test_is_undone_with_an_insert(self, client: Any) -> None:
        document = Counting()
        await aborted(client, document.insert())
        assert (document.id, document.n) == (None, 0)


class TestABulkWriterThatIsAborted:
    @staticmethod
    async def _fill(writer: Any, documents: list[Any], new: Any) -> None:
        replaced, updated, changed = documents
        await Both.insert_one(new, bulk_writer=writer)
        await replaced.replace(bulk_writer=writer)
        await updated.set({"n": 7}, bulk_writer=writer)
        changed.n = 8
        await changed.save_changes(bulk_writer=writer)

    @pytest.mark.parametrize("committed", [True, False])
    async def test_leaves_documents_as_they_were(
        self, client: Any, database: Any, committed: bool
    ) -> None:
        documents = [await Both(n=n).insert() for n in range(3)]
        new = Both(n=9)
        before = [look(each) for each in (*documents, new)]
        async with scope_of(client):
            writer = BulkWriter()
            await self._fill(writer, documents, new)
            if committed:
                await writer.commit()
            raise Rollback
        before[2]["fields"]["n"] = 8  # what the block itself had set before it wrote
        assert [look(each) for each in (*documents, new)] == before
        for each in documents:
            await each.save()
        await new.insert()
        assert await database["memory_both"].count_documents({}) == 4

    async def test_on_the_session_of_a_scope_that_binds_no_class_does_too(
        self, client: Any
    ) -> None:
        documents = [await Both(n=n).insert() for n in range(3)]
        async with with_session(client=client, collections=[]) as session:
            async with BulkWriter(session=session) as writer:
                await self._fill(writer, documents, Both())
            raise Rollback
        for each in documents:
            await each.replace()

    async def test_by_replace_many_does_too(self, client: Any, database: Any) -> None:
        documents = [await Both(n=n).insert() for n in range(3)]
        before = [look(each) for each in documents]
        await aborted(client, Both.replace_many(documents))
        assert [look(each) for each in documents] == before
        await Both.replace_many(documents)
        for each in documents:
            assert (await stored(database, each))["revision_id"] == each.revision_id
