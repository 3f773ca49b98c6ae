"""G10: what can't work is refused, early and clearly, with nothing bound and nothing sent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from beanie import Document, View, init_beanie
from clients import close
from models import Item, Linked, Plain, Unlisted
from pymongo import MongoClient
from pymongo.read_preferences import ReadPreference
from wire import DATABASE, Wire

import beanie_session_scope
from beanie_session_scope import (
    ClientMismatchError,
    ModelNotInitializedError,
    ModelNotScopedError,
    NotAClientError,
    PropagationError,
    SessionScopeError,
    SessionScopeMixin,
    TransactionsNotSupportedError,
    UnsupportedInTransactionError,
    bind_session,
    collection_of,
    current_scope,
    outside_session,
    with_session,
)
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.mixin import COLLECTION, GETTER
from beanie_session_scope.testing import StandaloneServer


class NeverInitialised(SessionScopeMixin, Document):
    name: str = "new"


async def refused(error: type[Exception], match: str, wire: Wire, **arguments: Any) -> None:
    """Assert that a scope with these arguments is refused, and leaves nothing behind."""
    with wire.record() as seen, pytest.raises(error, match=match) as caught:
        async with with_session(**arguments):
            pytest.fail("the body ran")
    assert seen == []
    assert Item.get_session() is None
    assert current_scope() is None
    assert "mongodb://" not in str(caught.value)


class TestCollections:
    async def test_without_the_mixin(self, client: Any, wire: Wire) -> None:
        match = r"Plain has no SessionScopeMixin.*class Plain\(SessionScopeMixin, Document\)"
        await refused(ModelNotScopedError, match, wire, client=client, collections=[Item, Plain])
        await refused(TypeError, match, wire, client=client, collections=[Plain])

    async def test_that_was_not_initialised(self, client: Any, wire: Wire) -> None:
        match = "NeverInitialised is not initialised.*init_beanie"
        for arguments in ({"client": client}, {}):
            await refused(
                ModelNotInitializedError,
                match,
                wire,
                collections=[Item, NeverInitialised],
                **arguments,
            )

    async def test_of_another_client(self, client: Any, wire: Wire, other_client: Any) -> None:
        await refused(
            ClientMismatchError,
            "Item was initialised on another client",
            wire,
            client=other_client,
            collections=[Item],
        )

    async def test_of_two_clients(self, client: Any, wire: Wire, other_client: Any) -> None:
        plain = Linked.get_settings()
        bound = getattr(Linked, GETTER)()
        Linked.set_collection(other_client[DATABASE]["linked"])
        try:
            await refused(ClientMismatchError, "have 2", wire, collections=[Item, Linked])
        finally:
            Linked.set_collection(bound._scope_plain)
        assert Linked.get_settings() is plain

    @pytest.mark.parametrize(
        ("collections", "match"),
        [
            (Item, r"is Item: write collections=\[Bike\]"),
            ("Item", "is a str object"),
            (7, "is a int object"),
            ([7], "a int object was given"),
            (["Item"], "a str object was given"),
        ],
    )
    async def test_that_are_no_classes(
        self, client: Any, wire: Wire, collections: Any, match: str
    ) -> None:
        await refused(ModelNotScopedError, match, wire, client=client, collections=collections)

    async def test_an_instance_and_not_a_word_of_its_contents(
        self, client: Any, wire: Wire
    ) -> None:
        item = Item(name="secret")
        with pytest.raises(ModelNotScopedError, match="a Item object was given") as caught:
            async with with_session(client=client, collections=[item]):  # type: ignore[list-item]
                pass
        assert "secret" not in str(caught.value)

    async def test_may_be_any_iterable(self, client: Any) -> None:
        def named() -> Iterator[Any]:
            yield Item
            yield Unlisted

        for collections in (named(), {Item, Unlisted}, (Item, Unlisted)):
            async with with_session(client=client, collections=collections) as session:
                assert Item.get_session() is Unlisted.get_session() is session


class TestTheClient:
    @pytest.mark.parametrize("thing", ["a database", "a string", "a blocking client", "a class"])
    async def test_that_is_none(self, client: Any, wire: Wire, server_uri: str, thing: str) -> None:
        blocking: Any = MongoClient(server_uri, connect=False)
        things = {
            "a database": client[DATABASE],
            "a string": server_uri,
            "a blocking client": blocking,
            "a class": type(client),
        }
        match = f"must be a {DRIVER.client_class.__name__}"
        for error in (NotAClientError, ClientMismatchError, TypeError):
            await refused(error, match, wire, client=things[thing], collections=[Item])
        blocking.close()

    async def test_that_no_one_named(self, client: Any, wire: Wire) -> None:
        await refused(ClientMismatchError, "given no client", wire, collections=[])


class TestSessions:
    @pytest.mark.parametrize("session", [None, "session", object()])
    async def test_that_are_none(self, client: Any, session: Any) -> None:
        with pytest.raises(TypeError, match="session of"):
            Item.set_session(session)
        with pytest.raises(NotAClientError), bind_session(session, collections=[Item]):
            pytest.fail("the body ran")
        assert Item.get_session() is None

    async def test_of_another_client(self, client: Any, other_client: Any) -> None:
        session = await DRIVER.start_session(other_client)
        with pytest.raises(ClientMismatchError), bind_session(session, collections=[Item]):
            pytest.fail("the body ran")
        with pytest.raises(ClientMismatchError, match="another client than the session's"):
            Item.set_session(session)
        assert Item.get_session() is None
        await session.end_session()


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"propagation": "nested"}, "'nested' is not known"),
            ({"snapshot": True}, "transaction=False"),
            ({"snapshot": True, "transaction": False, "causal_consistency": True}, "exclude"),
            ({"read_preference": ReadPreference.SECONDARY}, "reads from the primary"),
            ({"transaction": False, "max_commit_time_ms": 5}, "max_commit_time_ms say how"),
            ({"timeout": 0}, "above 0"),
            ({"timeout": float("nan")}, "above 0"),
        ],
    )
    async def test_that_exclude_each_other(
        self, client: Any, wire: Wire, options: dict[str, Any], match: str
    ) -> None:
        await refused(ValueError, match, wire, client=client, collections=[Item], **options)


class TestDefiningAClass:
    @pytest.mark.parametrize("base", [Document, View])
    def test_with_the_mixin_last_shows_the_right_order(self, base: Any) -> None:
        match = re.escape(f"class Wrong(SessionScopeMixin, {base.__name__})")
        with pytest.raises(TypeError, match=match):

            class Wrong(base, SessionScopeMixin):  # type: ignore[misc]
                pass

    def test_with_the_mixin_after_a_base_of_its_own_too(self) -> None:
        class Base(Document):
            pass

        with pytest.raises(TypeError, match="comes after Document"):

            class Wrong(Base, SessionScopeMixin):
                pass

    def test_that_overrides_the_getter_shows_where_to_put_it(self) -> None:
        with pytest.raises(TypeError, match=rf"overrides {GETTER}\(\)"):
            type("Wrong", (SessionScopeMixin, Document), {GETTER: classmethod(lambda cls: None)})

    def test_after_a_helper_that_overrides_the_getter_shows_where_to_put_it(self) -> None:
        class Helper:
            pass

        setattr(Helper, GETTER, classmethod(lambda cls: None))
        with pytest.raises(TypeError, match=rf"overrides {GETTER}\(\)"):

            class Wrong(Helper, SessionScopeMixin, Document):
                pass

    async def test_that_overrides_its_settings_is_taken_at_its_word(
        self, client: Any, wire: Wire, database: Any
    ) -> None:
        class Moved(SessionScopeMixin, Document):
            name: str = "new"

            @classmethod
            def get_settings(cls) -> Any:
                moved = {COLLECTION: database["moved"], "use_cache": True}
                return super().get_settings().model_copy(update=moved)

        await database.drop_collection("moved")
        await database.create_collection("moved")
        await init_beanie(database=database, document_models=[Moved])
        async with with_session(client=client, collections=[Moved]) as session:
            with wire.record() as seen:
                await Moved().insert()
            assert seen[0].command["lsid"] == session.session_id
        assert await database["moved"].count_documents({}) == 1

    async def test_over_a_base_that_overrides_the_getter_works(
        self, client: Any, wire: Wire, database: Any
    ) -> None:
        """A database for each tenant, say: the base decides which, the mixin binds it."""

        class Tenant(Document):
            name: str = "new"

        setattr(Tenant, GETTER, classmethod(lambda cls: database["tenant_7"]))

        class Order(SessionScopeMixin, Tenant):
            pass

        await database.drop_collection("tenant_7")
        await database.create_collection("tenant_7")
        await init_beanie(database=database, document_models=[Order])
        async with with_session(client=client, collections=[Order]) as session:
            with wire.record() as seen:
                await Order().insert()
            assert seen[0].command["lsid"] == session.session_id
            assert seen[0].command["insert"] == "tenant_7"
            assert await database["tenant_7"].count_documents({}) == 0
        assert await database["tenant_7"].count_documents({}) == 1


@pytest.mark.starts_servers
class TestTheServer:
    @pytest.mark.parametrize("operation", ["insert", "find"])
    async def test_that_is_standalone_says_so_at_the_first_operation(self, operation: str) -> None:
        with StandaloneServer() as server:
            client = DRIVER.client_class(server.uri)
            await init_beanie(database=client[DATABASE], document_models=[Item])
            with pytest.raises(TransactionsNotSupportedError, match="replica set") as caught:
                async with with_session(client=client, collections=[Item]):
                    await (Item().insert() if operation == "insert" else Item.find().to_list())
            assert getattr(caught.value.__cause__, "code", None) == 20
            assert Item.get_session() is None
            async with with_session(client=client, collections=[Item], transaction=False):
                await Item().insert()
            await close(client)


async def test_changing_an_index_of_a_bound_class_does_not_hang(client: Any, database: Any) -> None:
    """``init_beanie`` with a new index would wait for the transaction that waits for it."""

    class Indexed(SessionScopeMixin, Document):
        name: str = "new"

        class Settings:
            name = "item"
            indexes = ["name"]

    with pytest.raises(UnsupportedInTransactionError, match="create_indexes"):
        async with with_session(client=client, collections=[Item]):
            await Item().insert()
            token = Indexed.set_session(Item.get_session())
            try:
                await init_beanie(database=database, document_models=[Indexed])
            finally:
                Indexed.clear_session(token)


def test_outside_session_refuses_what_has_no_mixin() -> None:
    with pytest.raises(ModelNotScopedError, match="Plain"), outside_session(Plain):  # type: ignore[arg-type]
        pytest.fail("the body ran")


async def test_the_collection_of_a_class_is_refused_where_there_is_none(client: Any) -> None:
    assert collection_of(Item) is getattr(Item, GETTER)()
    with pytest.raises(ModelNotScopedError, match="Plain"):
        collection_of(Plain)  # type: ignore[arg-type]
    with pytest.raises(ModelNotInitializedError, match="NeverInitialised"):
        collection_of(NeverInitialised)


def test_every_error_has_one_base() -> None:
    errors = [
        value
        for name, value in vars(beanie_session_scope).items()
        if name.endswith("Error") and isinstance(value, type)
    ]
    assert len(errors) >= 12
    assert all(issubclass(error, SessionScopeError) for error in errors)
    assert PropagationError in errors
