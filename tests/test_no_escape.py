"""G1: every Beanie operation of a bound class carries the scope's session and transaction."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, cast

import pytest
from beanie import DeleteRules, Link, WriteRules, init_beanie
from beanie.exceptions import DocumentWasNotSaved
from models import (
    Child,
    Hidden,
    HiddenPart,
    Holder,
    HolderOfPlain,
    HolderView,
    Item,
    ItemView,
    Leaf,
    Linked,
    Member,
    Note,
    OtherMember,
    Owner,
    Parent,
    Pet,
    Plain,
    Root,
    Sibling,
    Twin,
    Union,
    Unlisted,
)
from operations import (
    DOCUMENT,
    LINKS,
    NO_COMMAND,
    OPERATIONS,
    PUBLIC,
    SOFT_DELETE,
    UNION,
    VIEW,
    VIEW_LINKS,
    Run,
    present,
    public_names,
)
from wire import Wire, names, outside

from beanie_session_scope import (
    ModelNotScopedError,
    Rollback,
    SessionScopeMixin,
    UnsupportedInTransactionError,
    bind_session,
    cascade,
    outside_session,
    with_session,
)
from beanie_session_scope.collection import CURSOR_OPERATIONS, _bound_class
from beanie_session_scope.collection import OPERATIONS as COLLECTION_OPERATIONS
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.mixin import GETTER


def collection_of(model: Any) -> Any:
    return getattr(model, GETTER)()


def contents(database: Any, *collections: str) -> Any:
    async def read() -> dict[str, list[Any]]:
        return {c: await database[c].find().sort("_id", 1).to_list(None) for c in collections}

    return read()


async def run_inside(
    client: Any, wire: Wire, listed: Iterable[Any], run: Run, model: Any, stored: Any
) -> list[str]:
    """Run an operation in a scope that is rolled back; return what it sent outside."""
    async with with_session(client=client, collections=listed) as session:
        with wire.record() as seen:
            await run(model, stored)
        assert seen, "the operation sent nothing"
        escaped = outside(seen, session)
        raise Rollback
    return escaped


class TestTables:
    def test_every_public_name_of_beanie_is_in_a_table(self) -> None:
        """A release of Beanie with a new operation fails here, until it is tested below."""
        unknown = {name for cls in PUBLIC for name in public_names(cls)} - OPERATIONS - NO_COMMAND

        assert unknown == set()

    def test_every_public_method_of_the_drivers_collection_is_in_the_table(self) -> None:
        """A release of the driver with a new method fails here, until it is classified."""
        public = {name for name in dir(DRIVER.collection_class) if not name.startswith("_")}

        assert public - set(COLLECTION_OPERATIONS) == set()

    def test_every_public_method_of_the_drivers_cursors_is_in_the_table(self) -> None:
        public = {
            name for cls in DRIVER.cursor_classes for name in dir(cls) if not name.startswith("_")
        }

        assert public - set(CURSOR_OPERATIONS) == set()

    async def test_a_method_that_the_table_does_not_know_is_refused(
        self, client: Any, database: Any
    ) -> None:
        """Users meet a new release of a driver before the table does."""

        class Newer(DRIVER.collection_class):  # type: ignore[misc, name-defined]
            async def brand_new(self) -> str:
                return "ran"

        bound = object.__new__(_bound_class(Newer))
        plain = object.__new__(Newer)
        plain.__dict__.update(database["item"].__dict__)
        bound.__dict__.update(_scope_plain=plain, _scope_variables=Item._scope_variables)

        assert await bound.brand_new() == "ran"
        async with with_session(client=client, collections=[Item]):
            with pytest.raises(UnsupportedInTransactionError, match="brand_new"):
                await bound.brand_new()

    async def test_the_buffer_of_a_cursor_is_where_the_driver_layer_looks(
        self, client: Any, database: Any
    ) -> None:
        await database["item"].insert_many([{"n": i} for i in range(3)])
        cursor = database["item"].find()

        await cursor.__anext__()

        assert DRIVER.buffered(cursor) == 2


class TestEveryOperation:
    """Each with the class bound in every way in which a class can come to be bound."""

    @pytest.fixture(
        params=[
            pytest.param(([Item], Item), id="by name"),
            pytest.param(([Root], Leaf), id="through its parent"),
            pytest.param(([Sibling], Leaf), id="through a sibling"),
            pytest.param(([Holder], Linked), id="as a link's target"),
            pytest.param(([Union], Member), id="through its union"),
            pytest.param(([OtherMember], Member), id="through another member"),
            pytest.param((None, Item), id="with all classes"),
        ]
    )
    def listed_and_model(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.mark.parametrize("name", present(DOCUMENT))
    async def test_of_a_document_class_runs_in_the_transaction(
        self, client: Any, wire: Wire, database: Any, listed_and_model: Any, name: str
    ) -> None:
        listed, model = listed_and_model
        stored = [await model(name="stored", n=n).insert() for n in range(2)]
        collection = model.get_settings().name
        before = await contents(database, collection)

        escaped = await run_inside(client, wire, listed, DOCUMENT[name], model, stored[0])

        assert escaped == []
        assert await contents(database, collection) == before

    @pytest.mark.parametrize("name", present(SOFT_DELETE))
    async def test_of_a_soft_delete_class_runs_in_the_transaction(
        self, client: Any, wire: Wire, database: Any, name: str
    ) -> None:
        stored = await Note(name="stored", one=await Linked(name="stored").insert()).insert()
        before = await contents(database, "note")

        escaped = await run_inside(client, wire, [Note], SOFT_DELETE[name], Note, stored)

        assert escaped == []
        assert await contents(database, "note") == before

    @pytest.mark.parametrize("name", present(VIEW))
    async def test_of_a_view_runs_in_the_transaction(
        self, client: Any, wire: Wire, name: str
    ) -> None:
        await Item(name="stored").insert()

        assert await run_inside(client, wire, [ItemView], VIEW[name], ItemView, None) == []

    @pytest.mark.parametrize("name", present(VIEW_LINKS))
    async def test_of_a_view_that_follows_links_runs_in_the_transaction(
        self, client: Any, wire: Wire, name: str
    ) -> None:
        linked = await Linked(name="stored").insert()
        await Holder(name="stored", one=linked, many=[linked]).insert()

        run = VIEW_LINKS[name]
        assert await run_inside(client, wire, [HolderView], run, HolderView, None) == []

    @pytest.mark.parametrize("name", present(UNION))
    @pytest.mark.parametrize("listed", [Union, Member])
    async def test_of_a_union_runs_in_the_transaction(
        self, client: Any, wire: Wire, listed: Any, name: str
    ) -> None:
        stored = await Member(name="stored").insert()

        assert await run_inside(client, wire, [listed], UNION[name], Union, stored) == []

    @pytest.mark.parametrize("name", present(LINKS))
    async def test_that_follows_links_runs_in_the_transaction(
        self, client: Any, wire: Wire, database: Any, name: str
    ) -> None:
        targets = [await Linked(name="stored").insert() for _ in range(4)]
        await Holder(name="stored", one=targets[0], many=targets[1:]).insert()
        before = await contents(database, "holder", "linked")

        escaped = await run_inside(client, wire, [Holder], LINKS[name], None, None)

        assert escaped == []
        assert await contents(database, "holder", "linked") == before

    @pytest.mark.parametrize("field", ["one", "many"])
    async def test_of_the_links_of_a_class_bound_by_hand_runs_in_the_transaction(
        self, client: Any, wire: Wire, field: str
    ) -> None:
        """``set_session`` binds one class; what starts at its documents stays with it."""
        await Holder(name="stored", **{field: self._links(field)}).insert(
            link_rule=WriteRules.WRITE
        )
        session = await DRIVER.start_session(client)
        await DRIVER.start_transaction(session)
        token = Holder.set_session(session)
        try:
            with wire.record() as seen:
                holder = await Holder.find_one(Holder.name == "stored")
                await holder.fetch_link(field)
                await holder.save(link_rule=WriteRules.WRITE)
                await holder.fetch_all_links()
        finally:
            Holder.clear_session(token)
        assert len(seen) >= 4
        assert outside(seen, session) == []
        assert Linked.get_session() is None
        await session.abort_transaction()
        await session.end_session()

    @staticmethod
    def _links(field: str) -> Any:
        return Linked(name="stored") if field == "one" else [Linked(name="stored")]

    async def test_that_follows_a_back_link_runs_in_the_transaction(
        self, client: Any, wire: Wire
    ) -> None:
        pet = await Pet(name="pet").insert()
        await Owner(name="owner", pets=[pet]).insert()

        async with with_session(client=client, collections=[Pet]) as session:
            with wire.record() as seen:
                pets = await Pet.find(fetch_links=True).to_list()
                await Owner.find_all().to_list()
            assert outside(seen, session) == []
        assert [owner.name for owner in pets[0].owners] == ["owner"]

    async def test_runs_in_a_session_that_somebody_else_owns(self, client: Any, wire: Wire) -> None:
        session = await DRIVER.start_session(client)
        await DRIVER.start_transaction(session)
        with bind_session(session, collections=[Holder]), wire.record() as seen:
            await Holder(one=Linked(), many=[]).insert(link_rule=WriteRules.WRITE)
            await Linked.find_one()
        assert outside(seen, session) == []
        assert len(seen) == 3
        await session.abort_transaction()
        await session.end_session()


class TestBoundTogether:
    async def test_are_a_class_and_the_views_of_its_collection(self, client: Any) -> None:
        async with with_session(client=client, collections=[Item]):
            await Item(name="uncommitted", n=1).insert()
            assert [each.name for each in await ItemView.find_all().to_list()] == ["uncommitted"]
            raise Rollback

    async def test_are_a_class_and_what_its_subclasses_need(
        self, client: Any, wire: Wire, database: Any
    ) -> None:
        await init_beanie(database=database, document_models=[Linked, Parent, Child, Twin])
        async with with_session(client=client, collections=[Parent]) as session:
            assert Child.get_session() is session
            assert Linked.get_session() is session
            assert Twin.get_session() is session

    async def test_are_found_anew_when_a_class_was_initialised_further(
        self, client: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Beanie fills in the links last: a scope may open in the middle.

        (Names in annotations, of classes that Beanie does not know yet, say nothing until then.)
        """
        with monkeypatch.context() as unfinished:
            unfinished.setattr(cascade, "_links_in", lambda annotation, seen: iter(()))
            for model in (Holder, HolderView):
                unfinished.setattr(model, "_link_fields", None)
            async with with_session(client=client, collections=[Holder]):
                assert Linked.get_session() is None
        async with with_session(client=client, collections=[Holder]) as session:
            assert Linked.get_session() is session

    async def test_are_a_class_and_what_submodels_and_containers_link_to(
        self, client: Any, database: Any
    ) -> None:
        """Beanie lists none of these links, so only ``Link.fetch()`` follows them."""
        await init_beanie(database=database, document_models=[Hidden])
        linked = await Linked(n=1).insert()
        link = cast("Link[Linked]", linked.to_ref())
        hidden = await Hidden(part=HiddenPart(deep=[link])).insert()
        async with with_session(client=client, collections=[Hidden]) as session:
            found = await Hidden.get(hidden.id)
            assert found is not None
            fetched = cast("Linked", await found.part.deep[0].fetch())
            fetched.n = 99
            await fetched.save()
            assert all(each.get_session() is session for each in (Leaf, Item, Note))
            raise Rollback
        await hidden.delete()
        assert [each["n"] async for each in database["linked"].find()] == [1]


class TestCascadesOfAClassBoundByHand:
    """The linked classes are not bound: only what starts at a document carries them along."""

    @pytest.fixture
    async def session(self, client: Any) -> Any:
        session = await DRIVER.start_session(client)
        await DRIVER.start_transaction(session)
        yield session
        await session.end_session()

    async def test_take_the_rule_as_a_string_too(self, session: Any, database: Any) -> None:
        token = Holder.set_session(session)
        with suppress(DocumentWasNotSaved):  # Beanie 2 does not follow a string
            await Holder(one=Linked()).insert(link_rule="WRITE")  # type: ignore[arg-type]
        Holder.clear_session(token)
        await session.abort_transaction()
        assert await contents(database, "holder", "linked") == {"holder": [], "linked": []}

    async def test_take_back_links_along(self, session: Any, wire: Wire) -> None:
        pet = await Pet(name="pet").insert()
        await Owner(name="owner", pets=[pet]).insert()
        token = Pet.set_session(session)
        with wire.record() as seen:
            stored = await Pet.get(pet.id)
            with suppress(AttributeError):  # Beanie 1 can't fetch the links back
                await stored.fetch_link("owners")
        Pet.clear_session(token)
        assert seen
        assert outside(seen, session) == []
        await session.abort_transaction()

    async def test_take_the_session_and_the_rule_by_position(
        self, session: Any, database: Any
    ) -> None:
        stored = await Holder(name="stored", one=Linked()).insert(link_rule=WriteRules.WRITE)
        holder = await Holder.get(stored.id, fetch_links=True)
        await holder.delete(session, None, DeleteRules.DELETE_LINKS)
        await session.abort_transaction()
        assert await database["linked"].count_documents({}) == 1
        assert await database["holder"].count_documents({}) == 1


class TestTheCollection:
    async def test_held_from_before_the_scope_runs_in_it(
        self, client: Any, wire: Wire, database: Any
    ) -> None:
        held = collection_of(Item)
        async with with_session(client=client, collections=[Item]) as session:
            with wire.record() as seen:
                await held.insert_one({"name": "x"})
                await held.with_options().find_one({})
            assert outside(seen, session) == []
            raise Rollback
        assert await database["item"].count_documents({}) == 0

    async def test_is_a_collection_of_the_driver(self, client: Any, database: Any) -> None:
        bound = collection_of(Item)

        assert isinstance(bound, DRIVER.collection_class)
        assert bound == database["item"]
        assert bound.name == "item"
        assert bound.database.name == database.name

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("create_index", ("name",)),
            ("create_indexes", ([],)),
            ("drop", ()),
            ("drop_index", ("name_1",)),
            ("drop_indexes", ()),
            ("rename", ("other",)),
            ("aggregate_raw_batches", ([],)),
            ("estimated_document_count", ()),
            ("find_raw_batches", ()),
            ("watch", ()),
        ],
    )
    async def test_refuses_in_a_scope_what_can_not_be_done_there(
        self, client: Any, wire: Wire, name: str, arguments: tuple[Any, ...]
    ) -> None:
        async with with_session(client=client, collections=[Item]):
            with (
                wire.record() as seen,
                pytest.raises(UnsupportedInTransactionError, match=rf"{name}\(\)"),
            ):
                await getattr(collection_of(Item), name)(*arguments)
        assert seen == []

    async def test_changes_its_indexes_in_a_session_without_a_transaction(
        self, client: Any, database: Any
    ) -> None:
        async with with_session(client=client, collections=[Item], transaction=False):
            index = await collection_of(Item).create_index("n")
            await collection_of(Item).drop_index(index)

    async def test_tells_about_itself_outside_the_transaction(
        self, client: Any, wire: Wire
    ) -> None:
        async with with_session(client=client, collections=[Item]):
            with wire.record() as seen:
                await collection_of(Item).index_information()
        assert all("txnNumber" not in event.command for event in seen)

    async def test_runs_the_drivers_own_methods_where_the_class_is_unbound(
        self, client: Any, wire: Wire
    ) -> None:
        with wire.record() as seen:
            await collection_of(Item).estimated_document_count()
            await collection_of(Item).distinct("name", {}, None)
        assert names(seen) == ["count", "distinct"]

    async def test_takes_its_session_as_a_positional_argument_too(
        self, client: Any, wire: Wire
    ) -> None:
        async with with_session(client=client, collections=[Item]) as session:
            with wire.record() as seen:
                await collection_of(Item).distinct("name", {}, None)
                await collection_of(Item).distinct("name", {}, session)
            assert outside(seen, session) == []
        assert len(seen) == 2


class TestWhatStaysOutside:
    async def test_a_class_that_is_not_listed(self, client: Any, database: Any) -> None:
        async with with_session(client=client, collections=[Item]):
            await Unlisted().insert()
            raise Rollback
        assert await database["unlisted"].count_documents({}) == 1

    async def test_every_class_where_none_is_listed(self, client: Any, database: Any) -> None:
        async with with_session(client=client, collections=[]):
            await Item().insert()
            raise Rollback
        assert await database["item"].count_documents({}) == 1

    async def test_a_class_under_outside_session(self, client: Any, database: Any) -> None:
        async with with_session(client=client, collections=[Item, Root]):
            with outside_session(Root):
                await Leaf().insert()
            await Item().insert()
            raise Rollback
        assert await database["root"].count_documents({}) == 1
        assert await database["item"].count_documents({}) == 0

    async def test_an_operation_with_a_session_of_its_own(
        self, client: Any, wire: Wire, database: Any
    ) -> None:
        other = await DRIVER.start_session(client)
        async with with_session(client=client, collections=[Item]):
            with wire.record() as seen:
                await Item(name="kept").insert(session=other)
            raise Rollback
        assert [event.command["lsid"] for event in seen] == [other.session_id]
        assert await database["item"].count_documents({"name": "kept"}) == 1
        await other.end_session()


class TestLinksToAClassWithoutTheMixin:
    @pytest.mark.parametrize("field", ["one", "many"])
    async def test_are_not_written_outside_but_refused(
        self, client: Any, database: Any, field: str
    ) -> None:
        value = Plain() if field == "one" else [Plain()]
        with pytest.raises(ModelNotScopedError, match="Plain"):
            async with with_session(client=client, collections=[HolderOfPlain]):
                await HolderOfPlain(**{field: value}).insert(link_rule=WriteRules.WRITE)
        assert await database["plain"].count_documents({}) == 0

    async def test_are_not_fetched_outside_but_refused(self, client: Any) -> None:
        plain = await Plain().insert()
        holder = await HolderOfPlain(one=plain).insert()
        async with with_session(client=client, collections=[HolderOfPlain]):
            again = await HolderOfPlain.get(holder.id)
            with pytest.raises(ModelNotScopedError, match="class Plain"):
                await again.fetch_link("one")

    async def test_are_not_fetched_outside_where_beanie_does_not_list_them(
        self, client: Any, wire: Wire, database: Any
    ) -> None:
        await init_beanie(database=database, document_models=[Hidden])
        link = cast("Link[Plain]", (await Plain().insert()).to_ref())
        hidden = await Hidden(plain=link).insert()
        async with with_session(client=client, collections=[Hidden]):
            again = await Hidden.get(hidden.id)
            assert again is not None
            with wire.record() as seen, pytest.raises(ModelNotScopedError, match="class Plain"):
                await again.fetch_link("plain")
            assert names(seen) == []
        await hidden.delete()

    async def test_are_harmless_where_nothing_follows_them(self, client: Any) -> None:
        plain = await Plain().insert()
        async with with_session(client=client, collections=[HolderOfPlain]):
            await HolderOfPlain(one=plain).insert()
        assert await HolderOfPlain.count() == 1

    async def test_are_harmless_where_they_are_empty(self, client: Any) -> None:
        async with with_session(client=client, collections=[HolderOfPlain]):
            holder = await HolderOfPlain().insert()
            await holder.fetch_link(field="one")
            await holder.fetch_all_links()

    async def test_are_followed_where_no_scope_is_open(self, client: Any) -> None:
        await HolderOfPlain(one=Plain()).insert(link_rule=WriteRules.WRITE)
        assert await Plain.count() == 1


def test_the_mixin_adds_no_field_and_hides_no_name_of_beanie() -> None:
    assert set(Item.model_fields) == {"id", "revision_id", "name", "n"}
    added = {name for name in vars(SessionScopeMixin) if not name.startswith("_")}
    assert added == {"clear_session", "get_session", "set_session", "get_settings", GETTER}
