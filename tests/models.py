"""The document classes of the tests, and the collections that they live in.

``Item`` and its like have the same fields, so that one list of operations runs on each:
``Leaf`` is bound through its parent or its sibling, ``Linked`` through a link.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Dict, List, Optional  # noqa: UP035 - Beanie 1.26 evaluates these itself
from typing import Union as OneOf

from beanie import BackLink, Document, DocumentWithSoftDelete, Link, UnionDoc, View
from pydantic import BaseModel, Field

from beanie_session_scope import SessionScopeMixin, with_session
from beanie_session_scope.mixin import GETTER


class Item(SessionScopeMixin, Document):
    name: str = "new"
    n: int = 0

    class Settings:
        name = "item"
        use_state_management = True


class Root(SessionScopeMixin, Document):
    name: str = "new"
    n: int = 0

    class Settings:
        name = "root"
        is_root = True
        use_state_management = True


class Leaf(Root):
    leaf: int = 1


class Sibling(Root):
    sibling: int = 1


class Linked(SessionScopeMixin, Document):
    name: str = "new"
    n: int = 0

    class Settings:
        name = "linked"
        use_state_management = True


class Holder(SessionScopeMixin, Document):
    name: str = "new"
    one: Optional[Link[Linked]] = None  # noqa: UP045
    many: List[Link[Linked]] = []  # noqa: UP006

    class Settings:
        name = "holder"


class Pet(SessionScopeMixin, Document):
    name: str = "new"
    owners: List[BackLink["Owner"]] = Field(  # noqa: UP006
        json_schema_extra={"original_field": "pets"}
    )

    class Settings:
        name = "pet"


class Owner(SessionScopeMixin, Document):
    name: str = "new"
    pets: List[Link[Pet]] = []  # noqa: UP006

    class Settings:
        name = "owner"


class Union(SessionScopeMixin, UnionDoc):
    class Settings:
        name = "union"
        class_id = "_class_id"


class Member(SessionScopeMixin, Document):
    name: str = "new"
    n: int = 0

    class Settings:
        union_doc = Union
        use_state_management = True


class OtherMember(SessionScopeMixin, Document):
    name: str = "new"

    class Settings:
        union_doc = Union


class Note(SessionScopeMixin, DocumentWithSoftDelete):
    name: str = "new"
    n: int = 0
    one: Optional[Link[Linked]] = None  # noqa: UP045

    class Settings:
        name = "note"
        use_state_management = True


class ItemView(SessionScopeMixin, View):
    name: str
    n: int

    class Settings:
        name = "item_view"
        source = Item
        pipeline: List[Any] = [{"$match": {"n": {"$gte": 0}}}]  # noqa: UP006


class HolderView(SessionScopeMixin, View):
    name: str
    one: Optional[Link[Linked]] = None  # noqa: UP045
    many: List[Link[Linked]] = []  # noqa: UP006

    class Settings:
        name = "holder_view"
        source = Holder
        pipeline: List[Any] = [{"$match": {"name": "stored"}}]  # noqa: UP006


class Cached(SessionScopeMixin, Document):
    name: str = "new"
    n: int = 0

    class Settings:
        name = "cached"
        use_cache = True


class Unlisted(SessionScopeMixin, Document):
    name: str = "new"

    class Settings:
        name = "unlisted"


class Plain(Document):
    name: str = "new"

    class Settings:
        name = "plain"


class HolderOfPlain(SessionScopeMixin, Document):
    name: str = "new"
    one: Optional[Link[Plain]] = None  # noqa: UP045
    many: List[Link[Plain]] = []  # noqa: UP006

    class Settings:
        name = "holder_of_plain"


class Parent(SessionScopeMixin, Document):
    name: str = "new"


class Child(Parent):
    """In a collection of its own: not ``is_root``."""

    one: Optional[Link[Linked]] = None  # noqa: UP045

    class Settings:
        name = "child_of_parent"


class Twin(SessionScopeMixin, Document):
    class Settings:
        name = "child_of_parent"


MODELS: list[Any] = [
    Item,
    Root,
    Leaf,
    Sibling,
    Linked,
    Holder,
    Owner,
    Pet,
    Union,
    Member,
    OtherMember,
    Note,
    ItemView,
    HolderView,
    Cached,
    Unlisted,
    Plain,
    HolderOfPlain,
]


class HiddenPart(BaseModel):
    deep: List[Link[Linked]] = []  # noqa: UP006


class Hidden(SessionScopeMixin, Document):
    """Has links in places where Beanie does not look for them; initialised where it is used."""

    part: HiddenPart = HiddenPart()
    by_name: Dict[str, Link[Leaf]] = {}  # noqa: UP006
    either: Optional[OneOf[Link[Item], Link[Note]]] = None  # noqa: UP007, UP045
    plain: Optional[OneOf[Link[Plain], Link[Note]]] = None  # noqa: UP007, UP045

    class Settings:
        name = "hidden"


COLLECTIONS = (
    "item",
    "root",
    "linked",
    "holder",
    "owner",
    "pet",
    "union",
    "note",
    "cached",
    "unlisted",
    "plain",
    "holder_of_plain",
)


def scope_of(client: Any, *collections: Any, **options: Any) -> Any:
    """Return a scope with ``Item`` in it, or with the classes that are named."""
    return with_session(client=client, collections=collections or [Item], **options)


@contextmanager
def moved_to(collection: Any) -> Iterator[None]:
    """Let ``Item`` use another collection."""
    plain = getattr(Item, GETTER)()._scope_plain
    Item.set_collection(collection)
    try:
        yield
    finally:
        Item.set_collection(plain)


async def stored_n(database: Any, document: Any) -> Any:
    """Return the field ``n`` of a document, as the server has it; ``None`` where it has none."""
    found = await database[document.get_settings().name].find_one({"_id": document.id})
    return None if found is None else found["n"]


async def stored(database: Any) -> list[str]:
    """Return the names of the items that the server holds."""
    return [each["name"] for each in await database["item"].find().sort("name", 1).to_list(None)]
