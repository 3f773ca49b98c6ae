"""``migrate_in_batches``: each document exactly once, whatever comes in between."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import Any

import pytest
import pytest_asyncio
from beanie import init_beanie
from beanie.exceptions import RevisionIdWasChanged
from bson import Decimal128, MaxKey, MinKey, ObjectId
from clients import close, empty
from migration_models import (
    COLLECTIONS,
    MODELS,
    Bike,
    BikeView,
    Car,
    Careful,
    Cat,
    Dog,
    Fleet,
    Lorry,
    NewBike,
    NotInitialised,
    Pets,
    PlainBike,
    Ride,
    Strict,
    Van,
    Vehicle,
)
from pymongo import MongoClient
from pymongo.errors import OperationFailure
from wire import DATABASE, FailPoint, Wire, names, open_transactions

from beanie_session_scope import (
    ModelNotInitializedError,
    ModelNotScopedError,
    PropagationError,
    Rollback,
    TransactionTimeoutError,
    bind_session,
    current_scope,
    on_commit,
    transaction_attempts,
    with_session,
)
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.migration import (
    CHECKPOINTS,
    SKIP,
    InvalidDocumentError,
    MigrationError,
    MigrationMismatchError,
    _run,
    migrate_in_batches,
)

pytestmark = pytest.mark.timeout(30)

NAME = "count the bikes"


@pytest_asyncio.fixture(autouse=True)
async def bikes(client: Any, database: Any) -> AsyncIterator[Any]:
    """The collection of the bikes, empty as those of the other classes are."""
    await init_beanie(database=database, document_models=MODELS)
    await empty(database, *COLLECTIONS)
    yield database["migration_bikes"]
    await database.drop_collection("migration_bike_view")


async def store(collection: Any, documents: Iterable[dict[str, Any]]) -> None:
    await collection.insert_many(list(documents))


async def store_bikes(collection: Any, number: int, **fields: Any) -> None:
    await store(collection, ({"_id": i, "color": "red", "n": 0, **fields} for i in range(number)))


async def read(collection: Any, **filters: Any) -> list[dict[str, Any]]:
    return [each async for each in collection.find(filters).sort("_id", 1)]


async def counts(collection: Any) -> list[int]:
    return [each["n"] for each in await read(collection)]


async def checkpoint(database: Any) -> dict[str, Any]:
    (found,) = await read(database[CHECKPOINTS])
    return found


def add_one(document: Any) -> None:
    """What is done twice leaves a trace."""
    document.n += 1


class Breakdown(Exception):
    """Stops a migration."""


def add_one_until(last: int) -> Any:
    def change(bike: Bike) -> None:
        if bike.id == last:
            raise Breakdown
        add_one(bike)

    return change


class TestBatches:
    async def test_every_document_is_changed_once(self, bikes: Any) -> None:
        await store_bikes(bikes, 25)

        summary = await migrate_in_batches(Bike, add_one, name=NAME, batch_size=10)

        assert await counts(bikes) == [1] * 25
        assert (summary.changed, summary.batches, summary.complete) == (25, 3, True)
        assert (summary.retries, summary.resumed, summary.earlier) == (0, False, 0)

    async def test_a_batch_is_one_transaction_with_its_checkpoint(
        self, bikes: Any, wire: Wire
    ) -> None:
        await store_bikes(bikes, 20)

        with wire.record() as seen:
            await migrate_in_batches(Bike, add_one, name=NAME, batch_size=10)

        inside = [
            event
            for event in seen
            if "txnNumber" in event.command and "autocommit" in event.command
        ]
        assert (
            names(inside)
            == [
                "findAndModify",
                "find",
                "update",
                "update",
                "commitTransaction",
            ]
            * 2
        )
        writes = {"findAndModify", "update", "insert"}
        outside = [event for event in seen if event not in inside]
        assert [e.command_name for e in outside if e.command_name in writes] == [
            "insert",  # the new checkpoint
            "update",  # which is complete
        ]

    async def test_an_asynchronous_change_may_write_elsewhere(
        self, bikes: Any, database: Any
    ) -> None:
        async def change(bike: Bike) -> None:
            await Ride(bike=bike.id).insert()
            if bike.id == 15:
                raise Breakdown

        await store_bikes(bikes, 20)

        with pytest.raises(Breakdown):
            await migrate_in_batches(Bike, change, name=NAME, batch_size=10)

        assert [each["bike"] for each in await read(database["migration_rides"])] == [*range(10)]

    async def test_only_documents_that_match_are_changed(self, bikes: Any) -> None:
        await store(bikes, ({"_id": i, "color": ("red", "blue")[i % 2]} for i in range(10)))

        summary = await migrate_in_batches(
            Bike.find(Bike.color == "red"), add_one, name=NAME, batch_size=2
        )

        assert summary.changed == 5
        assert [each.get("n") for each in await read(bikes)] == [1, None] * 5

    @pytest.mark.parametrize("after", ["blue", "red"])
    async def test_the_change_may_decide_what_the_filter_finds(
        self, bikes: Any, after: str
    ) -> None:
        def paint(bike: Bike) -> None:
            bike.n, bike.color = bike.n + 1, after

        await store_bikes(bikes, 7)

        await migrate_in_batches(Bike.find({"color": "red"}), paint, name=NAME, batch_size=2)

        assert await counts(bikes) == [1] * 7

    async def test_documents_stored_meanwhile_are_changed_where_it_has_not_been(
        self, bikes: Any
    ) -> None:
        async def change(bike: Bike) -> None:
            add_one(bike)
            if bike.id == 5:
                with MongoClient[Any](*bikes_uri) as other:
                    other[DATABASE]["migration_bikes"].insert_many(
                        [{"_id": i, "color": "red", "n": 0} for i in (-1, 100)]
                    )

        bikes_uri = [await uri_of(bikes)]
        await store_bikes(bikes, 8)

        await migrate_in_batches(Bike, change, name=NAME, batch_size=3)

        assert {each["_id"]: each["n"] for each in await read(bikes)} == {
            -1: 0,
            **dict.fromkeys(range(8), 1),
            100: 1,
        }

    async def test_a_document_that_no_longer_matches_in_the_transaction_is_left_alone(
        self, bikes: Any, wire: Wire
    ) -> None:
        uri = await uri_of(bikes)

        def look() -> None:
            if wire._events[-1].command_name == "findAndModify":  # the ids are known
                with MongoClient[Any](uri) as other:
                    other[DATABASE]["migration_bikes"].update_one(
                        {"_id": 3}, {"$set": {"color": "blue"}}
                    )

        await store_bikes(bikes, 4)
        wire.on_start = look

        summary = await migrate_in_batches(Bike.find(Bike.color == "red"), add_one, name=NAME)

        assert await counts(bikes) == [1, 1, 1, 0]
        assert summary.changed == 3

    @pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
    async def test_ids_may_be_of_any_types(self, bikes: Any, batch_size: int) -> None:
        ids: list[Any] = [
            *(MinKey(), None, float("nan"), -3, 1, 2.5, 2**40, Decimal128("7.1")),
            *("", "a", "b", {"a": 1}, {"a": "x"}, b"zz", ObjectId(), ObjectId()),
            *(False, True, datetime(2020, 1, 1), MaxKey()),
        ]
        await store(bikes, ({"_id": each, "n": 0} for each in reversed(ids) if each is not None))

        await migrate_in_batches(Bike, add_one, name=NAME, batch_size=batch_size)

        assert await counts(bikes) == [1] * (len(ids) - 1)

    async def test_an_empty_collection_is_complete_at_once(self, database: Any) -> None:
        summary = await migrate_in_batches(Bike, add_one, name=NAME)

        assert (summary.complete, summary.documents, summary.batches) == (True, 0, 0)
        assert "completed" in await checkpoint(database)

    async def test_hooks_of_the_change_run_after_each_batch(self, bikes: Any) -> None:
        done: list[Any] = []

        def change(bike: Bike) -> None:
            on_commit(lambda: done.append((bike.id, current_scope())))

        await store_bikes(bikes, 3)

        await migrate_in_batches(Bike, change, name=NAME, batch_size=2)

        assert done == [(0, None), (1, None), (2, None)]


async def uri_of(collection: Any) -> str:
    host, port = await address_of(collection.database.client)
    return f"mongodb://{host}:{port}/?directConnection=true"


async def address_of(client: Any) -> Any:
    found = client.address
    return await found if asyncio.iscoroutine(found) else found


class TestChange:
    async def test_what_it_returns_may_be_the_document(self, bikes: Any) -> None:
        def change(bike: Bike) -> Bike:
            add_one(bike)
            return bike

        await store_bikes(bikes, 2)

        await migrate_in_batches(Bike, change, name=NAME)

        assert await counts(bikes) == [1, 1]

    async def test_skip_leaves_the_document_as_it_is(self, bikes: Any) -> None:
        def change(bike: Bike) -> Any:
            add_one(bike)
            return SKIP if bike.id else None

        await store_bikes(bikes, 3)

        summary = await migrate_in_batches(Bike, change, name=NAME)

        assert await counts(bikes) == [1, 0, 0]
        assert (summary.changed, summary.skipped) == (1, 2)

    async def test_a_document_that_stays_what_it_was_is_unchanged(self, bikes: Any) -> None:
        await store_bikes(bikes, 3)

        summary = await migrate_in_batches(Bike, lambda bike: None, name=NAME)

        assert (summary.changed, summary.unchanged) == (0, 3)

    async def test_it_may_return_a_document_of_another_class(self, bikes: Any) -> None:
        def change(bike: Bike) -> NewBike:
            return NewBike(id=bike.id, paint=bike.color, n=bike.n + 1)

        await store_bikes(bikes, 5)

        await migrate_in_batches(Bike, change, name=NAME, batch_size=2, write="replace")

        assert await read(bikes) == [{"_id": i, "paint": "red", "n": 1} for i in range(5)]

    async def test_save_leaves_fields_alone_that_the_class_does_not_know(self, bikes: Any) -> None:
        await store_bikes(bikes, 1, older="kept")

        await migrate_in_batches(Bike, add_one, name=NAME)

        assert await read(bikes) == [{"_id": 0, "color": "red", "n": 1, "older": "kept"}]

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda: True,
            lambda: 1,
            lambda: "red",
            lambda: {"n": 1},
            lambda: Bike(id=5000),
            lambda: Cat(id=ObjectId()),
            lambda: PlainBike,
        ],
        ids=["bool", "int", "str", "dict", "another id", "another collection", "a class"],
    )
    async def test_anything_else_stops_the_run_and_rolls_its_batch_back(
        self, bikes: Any, wrong: Any
    ) -> None:
        def change(bike: Bike) -> Any:
            add_one(bike)
            return wrong() if bike.id == 3 else None

        await store_bikes(bikes, 6)

        with pytest.raises(TypeError, match=r"change\(\) returned a .* must return None"):
            await migrate_in_batches(Bike, change, name=NAME, batch_size=2)

        assert await counts(bikes) == [1, 1, 0, 0, 0, 0]

    async def test_an_error_rolls_its_batch_back_and_the_next_run_goes_on_there(
        self, bikes: Any, database: Any
    ) -> None:
        await store_bikes(bikes, 10)

        with pytest.raises(Breakdown):
            await migrate_in_batches(Bike, add_one_until(7), name=NAME, batch_size=3)
        assert await counts(bikes) == [1] * 6 + [0] * 4
        assert (await checkpoint(database))["position"] == [5]

        summary = await migrate_in_batches(Bike, add_one, name=NAME, batch_size=3)

        assert await counts(bikes) == [1] * 10
        assert (summary.resumed, summary.earlier, summary.changed) == (True, 6, 4)

    @pytest.mark.parametrize("when", ["at once", "before the commit"])
    async def test_rollback_is_no_way_to_leave_a_document_out(self, bikes: Any, when: str) -> None:
        def roll_back() -> None:
            raise Rollback

        def change(bike: Bike) -> None:
            scope = current_scope()
            assert scope is not None
            if when == "at once":
                roll_back()
            scope.before_commit(roll_back)

        await store_bikes(bikes, 3)

        with pytest.raises(MigrationError, match="raised Rollback"):
            await migrate_in_batches(Bike, change, name=NAME)

        assert await counts(bikes) == [0] * 3

    async def test_it_can_not_commit_in_the_middle_of_a_batch(self, bikes: Any) -> None:
        async def change(bike: Bike) -> None:
            scope = current_scope()
            assert scope is not None
            await Ride(bike=bike.id).insert()
            await scope.commit()

        await store_bikes(bikes, 3)

        with pytest.raises(PropagationError, match="would end the transaction of several blocks"):
            await migrate_in_batches(Bike, change, name=NAME)

        assert await Ride.count() == 0

    @pytest.mark.parametrize("write", ["save", "replace"])
    async def test_a_document_that_it_has_removed_is_not_stored_again(
        self, bikes: Any, write: Any
    ) -> None:
        async def change(bike: Bike) -> None:
            await bike.delete()

        await store_bikes(bikes, 3)

        with pytest.raises(MigrationError, match="was not there when it was to be written"):
            await migrate_in_batches(Bike, change, name=NAME, write=write)

        assert await counts(bikes) == [0] * 3

    async def test_it_may_remove_documents_and_skip_them(self, bikes: Any) -> None:
        async def change(bike: Bike) -> Any:
            await bike.delete()
            return SKIP

        await store_bikes(bikes, 5)

        summary = await migrate_in_batches(Bike, change, name=NAME, batch_size=2)

        assert await read(bikes) == []
        assert summary.skipped == 5


class TestBeanie:
    @pytest.mark.parametrize("write", ["save", "replace"])
    async def test_actions_revisions_and_saved_states_are_those_of_its_own_methods(
        self, database: Any, write: Any
    ) -> None:
        for n in range(3):
            await Careful(n=n).insert()
        before = {each.id: each.revision_id for each in await Careful.find_all().to_list()}

        summary = await migrate_in_batches(Careful, add_one, name=NAME, batch_size=2, write=write)

        after = await Careful.find_all().to_list()
        assert [(each.n, each.seen) for each in after] == [
            (n + 1, ["inserted", "before"]) for n in range(3)
        ]
        assert all(each.revision_id != before[each.id] for each in after)
        assert sorted(each.bike for each in await Ride.find_all().to_list()) == [1, 2, 3]
        assert summary.changed == 3
        after[0].n = 70
        await after[0].save()

    async def test_a_document_that_was_saved_under_another_revision_stops_the_run(
        self, database: Any
    ) -> None:
        async def change(careful: Careful) -> None:
            other = await Careful.get(careful.id)
            assert other is not None
            await other.save()

        await Careful().insert()

        with pytest.raises((MigrationError, RevisionIdWasChanged, OperationFailure)):
            await migrate_in_batches(Careful, change, name=NAME)

        assert await Ride.count() == 0

    async def test_validation_on_save_counts(self, database: Any) -> None:
        def change(strict: Strict) -> None:
            strict.n = 100

        await Strict().insert()

        with pytest.raises(InvalidDocumentError, match=r"when it was changed \(n: less_than\)"):
            await migrate_in_batches(Strict, change, name=NAME)

    async def test_children_keep_their_class(self, database: Any) -> None:
        await Vehicle.insert_many([Vehicle()])
        await Car(doors=3).insert()
        await Lorry(tons=40).insert()

        summary = await migrate_in_batches(
            Vehicle.find(with_children=True), add_one, name=NAME, batch_size=2
        )

        stored = await Vehicle.find(with_children=True).to_list()
        assert {type(each): each.n for each in stored} == {Vehicle: 1, Car: 1, Lorry: 1}
        assert {each.doors for each in stored if isinstance(each, Car)} == {3}
        assert summary.changed == 3

    async def test_the_members_of_a_union_keep_their_class(self, database: Any) -> None:
        cat = await Cat(lives=7).insert()
        await Dog(friend=cat).insert()

        await migrate_in_batches(Pets, add_one, name=NAME)

        stored = await Pets.find_all().to_list()
        assert {type(each): each.n for each in stored} == {Cat: 1, Dog: 1}
        (dog,) = [each for each in stored if isinstance(each, Dog)]
        assert dog.friend is not None
        assert dog.friend.ref.id == cat.id

    async def test_a_member_of_a_union_without_the_mixin_is_refused(self, database: Any) -> None:
        await Van().insert()

        with pytest.raises(ModelNotScopedError, match="Van"):
            await migrate_in_batches(Fleet, add_one, name=NAME)

        assert [van.n async for van in Van.find_all()] == [0]

    async def test_a_change_of_everything_that_a_parent_finds_leaves_out_its_children(
        self, database: Any
    ) -> None:
        await Vehicle().insert()
        await Car().insert()

        summary = await migrate_in_batches(Vehicle, add_one, name=NAME)

        assert summary.changed == 1


class TestInvalidDocuments:
    @pytest_asyncio.fixture(autouse=True)
    async def stored(self, bikes: Any) -> None:
        await store_bikes(bikes, 10)
        await bikes.update_many({"_id": {"$in": [4, 7]}}, {"$set": {"n": "secret"}})

    async def test_the_first_one_stops_the_run(self, bikes: Any) -> None:
        with pytest.raises(InvalidDocumentError) as raised:
            await migrate_in_batches(Bike, add_one, name=NAME, batch_size=3)

        assert raised.value.document.id == 4
        assert raised.value.document.errors == ("n: int_parsing",)
        assert "when it was read (n: int_parsing)" in str(raised.value)
        assert "secret" not in str(raised.value) + repr(raised.value.document)
        assert await counts(bikes) == [1, 1, 1, 0, "secret", 0, 0, "secret", 0, 0]

    async def test_it_goes_on_there_when_the_document_was_mended(self, bikes: Any) -> None:
        for bad in (4, 7):
            with pytest.raises(InvalidDocumentError):
                await migrate_in_batches(Bike, add_one, name=NAME, batch_size=3)
            await bikes.update_one({"_id": bad}, {"$set": {"n": 0}})

        await migrate_in_batches(Bike, add_one, name=NAME, batch_size=3)

        assert await counts(bikes) == [1] * 10

    async def test_they_are_left_as_they_are_if_asked_for(
        self, bikes: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "beanie_session_scope")

        summary = await migrate_in_batches(
            Bike, add_one, name=NAME, batch_size=3, on_invalid="skip"
        )

        assert await counts(bikes) == [1, 1, 1, 1, "secret", 1, 1, "secret", 1, 1]
        assert (summary.changed, summary.invalid) == (8, 2)
        assert [each.id for each in summary.invalid_documents] == [4, 7]
        assert {each.errors for each in summary.invalid_documents} == {("n: int_parsing",)}
        assert "secret" not in caplog.text + str(summary)

    async def test_a_later_run_still_lists_them(self, bikes: Any) -> None:
        def change(bike: Bike) -> None:
            if bike.id == 9:
                raise Breakdown

        with pytest.raises(Breakdown):
            await migrate_in_batches(Bike, change, name=NAME, batch_size=6, on_invalid="skip")

        for _ in range(2):
            summary = await migrate_in_batches(
                Bike, lambda bike: None, name=NAME, batch_size=6, on_invalid="skip"
            )
            assert [each.id for each in summary.invalid_documents] == [4, 7]
        assert (summary.earlier, summary.invalid) == (10, 0)

    async def test_what_the_change_wrote_about_a_document_that_it_refuses_is_taken_back(
        self, bikes: Any, database: Any
    ) -> None:
        called: list[int] = []

        async def change(bike: Bike) -> None:
            called.append(bike.id)
            await Ride(bike=bike.id).insert()
            Bike.model_validate({"n": "secret" if bike.id in (1, 2) else bike.n})
            add_one(bike)

        summary = await migrate_in_batches(Bike, change, name=NAME, batch_size=5, on_invalid="skip")

        assert await counts(bikes) == [1, 0, 0, 1, "secret", 1, 1, "secret", 1, 1]
        rides = await read(database["migration_rides"])
        assert [each["bike"] for each in rides] == [0, 3, 5, 6, 8, 9]
        assert called == [0, 1, 2, 3, 0, 3, 5, 6, 8, 9]
        assert (summary.invalid, summary.changed) == (4, 6)

    async def test_one_that_does_not_equal_itself_is_left_out_as_well(self, bikes: Any) -> None:
        def change(bike: Bike) -> None:
            Bike.model_validate({"n": "secret" if bike.id != bike.id else 0})

        await bikes.insert_one({"_id": float("nan"), "n": 0})

        summary = await migrate_in_batches(Bike, change, name=NAME, on_invalid="skip")

        assert (summary.invalid, summary.unchanged) == (3, 8)

    async def test_one_that_is_refused_in_another_form_again_is_left_out_as_well(
        self, bikes: Any, database: Any, wire: Wire
    ) -> None:
        uri, claims = await uri_of(bikes), 0

        def look() -> None:
            nonlocal claims
            claims += wire._events[-1].command_name == "findAndModify"
            if claims == 2:  # the batch is run again
                claims += 1
                with MongoClient[Any](uri) as other:
                    other[DATABASE]["migration_bikes"].update_one(
                        {"_id": 1}, {"$set": {"color": "blue"}}
                    )

        async def change(bike: Bike) -> None:
            await Ride(bike=bike.id).insert()
            Bike.model_validate({"n": "secret" if bike.id == 1 else bike.n})

        wire.on_start = look

        summary = await migrate_in_batches(Bike, change, name=NAME, on_invalid="skip")

        assert [each.id for each in summary.invalid_documents] == [1, 4, 7]
        rides = await read(database["migration_rides"])
        assert 1 not in [each["bike"] for each in rides]


class TestName:
    async def test_a_complete_migration_is_not_run_again(self, bikes: Any, wire: Wire) -> None:
        await store_bikes(bikes, 3)
        await migrate_in_batches(Bike, add_one, name=NAME)

        with wire.record() as seen:
            summary = await migrate_in_batches(Bike, add_one, name=NAME)

        assert await counts(bikes) == [1] * 3
        assert (summary.complete, summary.resumed, summary.documents) == (True, True, 0)
        assert str(summary) == f"Migration {NAME!r} had nothing left to do"
        assert not {"update", "findAndModify", "commitTransaction"} & {*names(seen)}

    @pytest.mark.parametrize(
        "other",
        [
            lambda: Bike.find(Bike.color == "blue"),
            lambda: Bike.find({"color": "red"}, {"n": 0}),
            lambda: Bike,
            lambda: NewBike.find({"color": "red"}),
            lambda: Ride.find({"color": "red"}),
        ],
        ids=["value", "more", "all", "model", "collection"],
    )
    @pytest.mark.parametrize("dry_run", [False, True], ids=["real", "dry"])
    async def test_one_that_was_used_for_another_query_is_refused(
        self, bikes: Any, wire: Wire, other: Any, dry_run: bool
    ) -> None:
        await store_bikes(bikes, 2)
        await migrate_in_batches(Bike.find({"color": "red"}), add_one, name=NAME)

        with wire.record() as seen, pytest.raises(MigrationMismatchError) as raised:
            await migrate_in_batches(other(), add_one, name=NAME, dry_run=dry_run)

        assert "was begun with another query, on Bike" in str(raised.value)
        assert "blue" not in str(raised.value)
        assert await counts(bikes) == [1, 1]
        assert not {"insert", "update", "findAndModify"} & {*names(seen)}

    async def test_two_names_are_two_migrations(self, bikes: Any) -> None:
        await store_bikes(bikes, 3)

        await migrate_in_batches(Bike, add_one, name="one")
        await migrate_in_batches(Bike, add_one, name="two")

        assert await counts(bikes) == [2] * 3

    async def test_a_checkpoint_that_is_removed_stops_the_run(
        self, bikes: Any, database: Any
    ) -> None:
        uri = await uri_of(bikes)

        def change(bike: Bike) -> None:
            add_one(bike)
            if bike.id == 2:
                on_commit(remove)

        def remove() -> None:
            with MongoClient[Any](uri) as other:
                other[DATABASE][CHECKPOINTS].delete_one({})

        await store_bikes(bikes, 6)

        with pytest.raises(MigrationError, match=r"checkpoint of migration .* was removed"):
            await migrate_in_batches(Bike, change, name=NAME, batch_size=3)

        assert await counts(bikes) == [1, 1, 1, 0, 0, 0]


class TestDryRun:
    async def test_it_stores_nothing_and_reports_the_same(
        self, bikes: Any, database: Any, wire: Wire
    ) -> None:
        async def change(bike: Bike) -> Any:
            await Ride(bike=bike.id).insert()
            add_one(bike)
            return SKIP if bike.id == 2 else None

        await store_bikes(bikes, 10)
        await bikes.update_one({"_id": 5}, {"$set": {"n": "bad"}})
        options: dict[str, Any] = {"name": NAME, "batch_size": 3, "on_invalid": "skip"}

        with wire.record() as seen:
            dry = await migrate_in_batches(Bike, change, dry_run=True, **options)

        assert [each for each in await counts(bikes) if each] == ["bad"]
        assert await read(database["migration_rides"]) == []
        assert await read(database[CHECKPOINTS]) == []
        sent = names(seen)
        assert (sent.count("commitTransaction"), sent.count("abortTransaction")) == (0, 4)
        real = await migrate_in_batches(Bike, change, **options)
        assert (dry.changed, dry.skipped, dry.invalid, dry.batches, dry.complete) == (8, 1, 1, 4, 1)
        for figure in ("changed", "unchanged", "skipped", "invalid", "batches", "complete"):
            assert getattr(dry, figure) == getattr(real, figure)
        assert "dry run: nothing was stored" in str(dry)

    async def test_it_goes_on_where_a_real_run_has_ended(self, bikes: Any, database: Any) -> None:
        await store_bikes(bikes, 10)
        with pytest.raises(Breakdown):
            await migrate_in_batches(Bike, add_one_until(5), name=NAME, batch_size=2)
        before = await checkpoint(database)

        dry = await migrate_in_batches(Bike, add_one, name=NAME, batch_size=2, dry_run=True)

        assert (dry.changed, dry.earlier, dry.resumed) == (6, 4, True)
        assert await checkpoint(database) == before


class TestSeveralRunners:
    async def test_what_one_has_changed_the_others_leave_alone(self, bikes: Any) -> None:
        await store_bikes(bikes, 300)

        summaries = await asyncio.gather(
            *(migrate_in_batches(Bike, add_one, name=NAME, batch_size=20) for _ in range(3))
        )

        assert await counts(bikes) == [1] * 300
        assert sum(each.changed for each in summaries) == 300
        assert [each.changed + each.earlier for each in summaries] == [300] * 3
        assert all(each.complete for each in summaries)

    async def test_one_that_comes_between_two_batches_is_noticed(self, bikes: Any) -> None:
        others: list[Any] = []

        async def change(bike: Bike) -> None:
            add_one(bike)
            if bike.id == 0:
                on_commit(let_another_run)

        async def let_another_run() -> None:
            with pytest.raises(Breakdown):
                await migrate_in_batches(Bike, add_one_until(7), name=NAME, batch_size=2)
            others.append(await counts(bikes))

        await store_bikes(bikes, 10)

        summary = await migrate_in_batches(Bike, change, name=NAME, batch_size=3)

        assert others == [[1] * 7 + [0] * 3]
        assert await counts(bikes) == [1] * 10
        assert (summary.changed, summary.earlier) == (6, 4)

    async def test_one_that_goes_on_at_the_end_is_noticed(self, bikes: Any, wire: Wire) -> None:
        uri = await uri_of(bikes)

        def look() -> None:
            command = wire._events[-1].command
            if command.get("update") == CHECKPOINTS and "autocommit" not in command:
                wire.on_start = lambda: None
                with MongoClient[Any](uri) as other:  # as another runner would
                    other[DATABASE][CHECKPOINTS].update_one(
                        {"_id": NAME}, {"$inc": {"step": 1, "changed": 1}}
                    )
                    other[DATABASE]["migration_bikes"].insert_one({"_id": 100, "n": 0})

        await store_bikes(bikes, 2)
        wire.on_start = look

        summary = await migrate_in_batches(Bike, add_one, name=NAME)

        assert await counts(bikes) == [1, 1, 1]
        assert (summary.changed, summary.earlier) == (3, 1)

    @pytest.mark.parametrize("goes_on", [True, False], ids=["works", "is stuck"])
    async def test_one_that_holds_the_checkpoint_is_waited_for_while_it_works(
        self, bikes: Any, wire: Wire, monkeypatch: pytest.MonkeyPatch, goes_on: bool
    ) -> None:
        now = 0.0
        attempts = partial(transaction_attempts, clock=lambda: now)
        monkeypatch.setattr(_run, "transaction_attempts", attempts)
        await store_bikes(bikes, 4)
        with pytest.raises(Breakdown):
            await migrate_in_batches(Bike, add_one_until(0), name=NAME)

        with other_runner(await uri_of(bikes)) as other:
            claims = 0

            def look() -> None:
                nonlocal claims, now
                if wire._events[-1].command_name == "findAndModify":
                    claims += 1
                    if claims == 1 and goes_on:
                        other.commit()
                        other.claim()
                    if claims == 1:
                        now += 1000
                    elif claims == 2:
                        other.commit()

            other.claim()
            wire.on_start = look
            migration = migrate_in_batches(Bike, add_one, name=NAME)
            if goes_on:
                await migration
                assert await counts(bikes) == [1] * 4
            else:
                with pytest.raises(TransactionTimeoutError):
                    await migration
                assert await counts(bikes) == [0] * 4


class OtherRunner:
    """Claims the checkpoint and commits, as a batch does that changes nothing."""

    def __init__(self, client: MongoClient[Any]) -> None:
        self._session = client.start_session()
        self._checkpoints = client[DATABASE][CHECKPOINTS]

    def claim(self) -> None:
        self._session.start_transaction()
        self._checkpoints.update_one({"_id": NAME}, {"$inc": {"step": 1}}, session=self._session)

    def commit(self) -> None:
        self._session.commit_transaction()

    def end(self) -> None:
        self._session.end_session()


@contextmanager
def other_runner(uri: str) -> Iterator[OtherRunner]:
    with MongoClient[Any](uri) as client:
        other = OtherRunner(client)
        yield other
        other.end()


class TestPrimary:
    async def test_nothing_is_read_from_a_secondary(self, server_uri: str, bikes: Any) -> None:
        wire = Wire()
        other = DRIVER.client_class(
            server_uri, event_listeners=[wire], readPreference="secondaryPreferred"
        )
        await init_beanie(database=other[DATABASE], document_models=MODELS)
        await store_bikes(bikes, 4)

        with wire.record() as seen:
            await migrate_in_batches(Bike, add_one, name=NAME, batch_size=2)

        reading = [event for event in seen if event.command_name in ("find", "aggregate")]
        assert len(reading) == 6  # the checkpoint, three times ids, two batches
        assert not [event for event in reading if "$readPreference" in event.command]
        assert await counts(bikes) == [1] * 4
        await close(other)


class TestErrorsOfTheServer:
    @pytest.mark.parametrize("command", ["findAndModify", "update", "commitTransaction"])
    async def test_a_transient_one_runs_the_batch_again(
        self, bikes: Any, fail_point: FailPoint, command: str
    ) -> None:
        await store_bikes(bikes, 10)
        migration = asyncio.ensure_future(
            migrate_in_batches(Bike, wait_at_first, name=NAME, batch_size=4)
        )
        await WAITING.wait()
        with fail_point(command, error_code=112, labels=["TransientTransactionError"], times=3):
            GO.set()
            summary = await migration

        assert await counts(bikes) == [1] * 10
        assert summary.retries >= 1

    async def test_a_commit_of_unknown_outcome_is_found_out(
        self, bikes: Any, fail_point: FailPoint
    ) -> None:
        await store_bikes(bikes, 10)

        with fail_point("commitTransaction", close_connection=True, times=2):
            await migrate_in_batches(Bike, add_one, name=NAME, batch_size=4)

        assert await counts(bikes) == [1] * 10

    async def test_a_batch_that_is_too_large_is_tried_again_smaller(
        self, bikes: Any, fail_point: FailPoint, wire: Wire
    ) -> None:
        await store_bikes(bikes, 8)
        seen: list[int] = []

        def change(bike: Bike) -> None:
            seen.append(bike.id)
            add_one(bike)

        with fail_point("commitTransaction", error_code=257, times=1):
            await migrate_in_batches(Bike, change, name=NAME, batch_size=8)

        assert await counts(bikes) == [1] * 8
        assert seen == [*range(8), *range(4), *range(4, 8)]

    async def test_repeated_conflicts_are_met_with_fewer_documents(
        self, bikes: Any, fail_point: FailPoint
    ) -> None:
        await store_bikes(bikes, 8)
        seen: list[int] = []

        def change(bike: Bike) -> None:
            seen.append(bike.id)
            add_one(bike)

        conflict: dict[str, Any] = {"error_code": 112, "labels": ["TransientTransactionError"]}
        with fail_point("update", **conflict, times=2):
            await migrate_in_batches(Bike, change, name=NAME, batch_size=8)

        assert await counts(bikes) == [1] * 8
        assert seen == [*range(8), *range(4), *range(2), *range(2, 8)]

    async def test_any_other_one_stops_the_run(self, bikes: Any, fail_point: FailPoint) -> None:
        await store_bikes(bikes, 4)

        with fail_point("update", error_code=13, times=1), pytest.raises(OperationFailure):
            await migrate_in_batches(Bike, add_one, name=NAME, batch_size=2)

        assert await counts(bikes) == [0] * 4


WAITING = asyncio.Event()
GO = asyncio.Event()


@pytest.fixture(autouse=True)
def events() -> None:
    global WAITING, GO
    WAITING, GO = asyncio.Event(), asyncio.Event()


async def wait_at_first(bike: Bike) -> None:
    """Let the test do something in the middle of the first batch."""
    add_one(bike)
    if bike.id == 0:
        WAITING.set()
        await GO.wait()


class TestCancellation:
    async def test_a_run_that_is_cancelled_leaves_nothing_open(
        self, bikes: Any, server_uri: str
    ) -> None:
        await store_bikes(bikes, 4)
        migration = asyncio.ensure_future(
            migrate_in_batches(Bike, wait_at_first, name=NAME, batch_size=2)
        )
        await WAITING.wait()

        migration.cancel()
        with pytest.raises(asyncio.CancelledError):
            await migration

        assert open_transactions(server_uri) == 0
        assert await counts(bikes) == [0] * 4
        await migrate_in_batches(Bike, add_one, name=NAME, batch_size=2)
        assert await counts(bikes) == [1] * 4

    @pytest.mark.parametrize("command", ["findAndModify", "find", "update", "commitTransaction"])
    async def test_cancelled_at_any_command_it_changes_each_document_once(
        self, bikes: Any, server_uri: str, fail_point: FailPoint, wire: Wire, command: str
    ) -> None:
        await store_bikes(bikes, 6)
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def look() -> None:
            if (
                wire._events[-1].command_name == command
                and "autocommit" in wire._events[-1].command
            ):
                loop.call_soon_threadsafe(sent.set)

        wire.on_start = look
        with fail_point(command, block_ms=200):
            migration = asyncio.ensure_future(
                migrate_in_batches(Bike, add_one, name=NAME, batch_size=2)
            )
            await sent.wait()
            migration.cancel()
            with pytest.raises(asyncio.CancelledError):
                await migration

        assert open_transactions(server_uri) == 0
        await migrate_in_batches(Bike, add_one, name=NAME, batch_size=2)
        assert await counts(bikes) == [1] * 6


class TestRefusals:
    """Before anything is sent."""

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"change": 5}, TypeError, "change must be a function"),
            ({"name": ""}, ValueError, "name must be a text that is not empty"),
            ({"name": "  "}, ValueError, "name must be a text that is not empty"),
            ({"name": None}, ValueError, "name must be a text that is not empty"),
            ({"batch_size": 0}, ValueError, "batch_size=0 must be a whole number above 0"),
            ({"batch_size": 2.5}, ValueError, "batch_size=2.5 must be a whole number"),
            ({"batch_size": True}, ValueError, "batch_size=True must be a whole number"),
            ({"write": "insert"}, ValueError, "write='insert' is not known"),
            ({"on_invalid": "ask"}, ValueError, "on_invalid='ask' is not known"),
            ({"progress": "loud"}, ValueError, "progress='loud' is not known"),
            ({"query": PlainBike}, ModelNotScopedError, "PlainBike has no SessionScopeMixin"),
            ({"query": int}, ModelNotScopedError, "int has no SessionScopeMixin"),
            ({"query": NotInitialised}, ModelNotInitializedError, "NotInitialised is not init"),
            ({"query": BikeView}, TypeError, "BikeView is a view"),
            ({"query": {"color": "red"}}, TypeError, "query must be a class"),
        ],
    )
    async def test_an_argument_that_can_not_work(
        self, wire: Wire, arguments: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        given: dict[str, Any] = {"query": Bike, "change": add_one, "name": NAME, **arguments}
        query, change = given.pop("query"), given.pop("change")

        with wire.record() as seen, pytest.raises(error, match=message):
            await migrate_in_batches(query, change, **given)

        assert seen == []

    @pytest.mark.parametrize(
        ("query", "what"),
        [
            (lambda: Bike.find().sort("n"), r"sort\(\)"),
            (lambda: Bike.find().skip(1), r"skip\(\)"),
            (lambda: Bike.find().limit(1), r"limit\(\)"),
            (lambda: Bike.find().project(NewBike), r"project\(\)"),
            (lambda: Bike.find(fetch_links=True), "fetch_links"),
            (lambda: Bike.find(lazy_parse=True), "lazy_parse"),
            (lambda: Bike.find(hint="n"), r"hint \(for the driver\)"),
        ],
    )
    async def test_a_query_that_is_more_than_a_filter(
        self, wire: Wire, query: Any, what: str
    ) -> None:
        with wire.record() as seen, pytest.raises(ValueError, match=f"The query has {what}"):
            await migrate_in_batches(query(), add_one, name=NAME)

        assert seen == []

    @pytest.mark.parametrize("query", [lambda: Bike.find_one(), lambda: PlainBike.find()])
    async def test_a_query_of_another_kind(self, wire: Wire, query: Any) -> None:
        with wire.record() as seen, pytest.raises(TypeError):
            await migrate_in_batches(query(), add_one, name=NAME)

        assert seen == []

    async def test_an_open_scope(self, client: Any, wire: Wire) -> None:
        async with with_session(client, collections=[]):
            with wire.record() as seen, pytest.raises(PropagationError, match="batch by batch"):
                await migrate_in_batches(Bike, add_one, name=NAME)

        assert seen == []

    async def test_a_session_that_somebody_else_owns(self, client: Any, wire: Wire) -> None:
        session = await DRIVER.start_session(client)
        with wire.record() as seen:
            with bind_session(session, collections=[Ride]):
                with pytest.raises(PropagationError, match="batch by batch"):
                    await migrate_in_batches(Bike, add_one, name=NAME)
            token = Bike.set_session(session)
            with pytest.raises(PropagationError, match="batch by batch"):
                await migrate_in_batches(Bike, add_one, name=NAME)
            Bike.clear_session(token)

        assert seen == []
        await DRIVER.end_session(session)

    async def test_a_scope_on_another_client_is_not_in_the_way(
        self, bikes: Any, other_client: Any
    ) -> None:
        await store_bikes(bikes, 2)

        async with with_session(other_client, collections=[]):
            await migrate_in_batches(Bike, add_one, name=NAME)

        assert await counts(bikes) == [1, 1]
