"""The document classes of the tests about memory, and what these tests ask of a document.

``Neither``, ``Revised``, ``Stated``, ``Both`` and ``Previous`` have the same fields, and one
combination each of Beanie's settings that keep something in memory.
"""

from collections import deque
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Any, ClassVar, Deque, Dict, List, Optional, Set, Tuple  # noqa: UP035 - as models
from uuid import UUID

from beanie import (
    DecimalAnnotation,
    Delete,
    Document,
    DocumentWithSoftDelete,
    Insert,
    Link,
    Save,
    Update,
    after_event,
    before_event,
    init_beanie,
)
from clients import empty
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from beanie_session_scope import SessionScopeMixin, with_session


class Neither(SessionScopeMixin, Document):
    name: str = "new"
    n: int = 0

    class Settings:
        name = "memory_neither"


class Revised(SessionScopeMixin, Document):
    name: str = "new"
    n: int = 0

    class Settings:
        name = "memory_revised"
        use_revision = True


class Stated(SessionScopeMixin, Document):
    name: str = "new"
    n: int = 0

    class Settings:
        name = "memory_stated"
        use_state_management = True


class Both(SessionScopeMixin, Document):
    name: str = "new"
    n: int = 0

    class Settings:
        name = "memory_both"
        use_revision = True
        use_state_management = True


class Previous(SessionScopeMixin, Document):
    name: str = "new"
    n: int = 0

    class Settings:
        name = "memory_previous"
        use_revision = True
        use_state_management = True
        state_management_save_previous = True


EVERY: list[Any] = [Neither, Revised, Stated, Both, Previous]
WITH_REVISION: list[Any] = [Revised, Both, Previous]
WITH_STATE: list[Any] = [Stated, Both, Previous]


class NeitherParent(SessionScopeMixin, Document):
    name: str = "new"
    one: Optional[Link[Neither]] = None  # noqa: UP045
    many: List[Link[Neither]] = []  # noqa: UP006

    class Settings:
        name = "memory_neither_parent"


class BothParent(SessionScopeMixin, Document):
    name: str = "new"
    one: Optional[Link[Both]] = None  # noqa: UP045
    many: List[Link[Both]] = []  # noqa: UP006

    class Settings:
        name = "memory_both_parent"
        use_revision = True
        use_state_management = True


class GrandParent(SessionScopeMixin, Document):
    name: str = "new"
    one: Optional[Link[BothParent]] = None  # noqa: UP045

    class Settings:
        name = "memory_grandparent"


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Part(BaseModel):
    size: int = 1
    marks: List[int] = []  # noqa: UP006


class FrozenPart(BaseModel):
    model_config = ConfigDict(frozen=True)

    size: int = 1
    marks: List[int] = []  # noqa: UP006


@dataclass
class Spec:
    weight: int = 1
    notes: List[str] = field(default_factory=list)  # noqa: UP006


class Rich(SessionScopeMixin, Document):
    """One field of each kind of value."""

    model_config = ConfigDict(extra="allow")

    n: int = 0
    part: Part = Part()
    parts: List[Part] = []  # noqa: UP006
    by_name: Dict[str, List[int]] = {}  # noqa: UP006
    frozen_part: FrozenPart = FrozenPart()
    spec: Spec = Field(default_factory=Spec)
    tags: Set[str] = set()  # noqa: UP006
    pair: Tuple[int, List[int]] = (0, [])  # noqa: UP006
    queue: Deque[int] = Field(default_factory=deque)  # noqa: UP006
    anything: Any = None
    price: DecimalAnnotation = Decimal("1.50")
    color: Color = Color.RED
    key: UUID = UUID(int=1)
    at: datetime = datetime(2020, 1, 1)
    _seen: List[str] = PrivateAttr(default_factory=list)  # noqa: UP006

    class Settings:
        name = "memory_rich"
        use_state_management = True
        bson_encoders = {Spec: asdict}


class Lazy(SessionScopeMixin, Document):
    """For lazy parsing, which knows nothing of the annotations in ``Rich``."""

    n: int = 0
    part: Part = Part()

    class Settings:
        name = "memory_lazy"
        use_state_management = True


class Strict(SessionScopeMixin, Document):
    """Every assignment is validated, and so is the whole document before it is written."""

    model_config = ConfigDict(validate_assignment=True)

    n: int = Field(default=0, ge=0)

    class Settings:
        name = "memory_strict"
        use_state_management = True
        validate_on_save = True


class Frozen(SessionScopeMixin, Document):
    fixed: str = Field(default="fixed", frozen=True)
    part: FrozenPart = FrozenPart()

    class Settings:
        name = "memory_frozen"
        use_revision = True


class Eventful(SessionScopeMixin, Document):
    """Its event actions change its fields."""

    name: str = "new"
    events: List[str] = []  # noqa: UP006
    after: int = 0
    pause: ClassVar[Any] = None

    @before_event(Insert, Save, Update, Delete)
    def remember(self) -> None:
        self.events.append("before")
        self.name = self.name.upper()

    @after_event(Insert, Save, Update, Delete)
    async def count(self) -> None:
        self.after += 1
        if Eventful.pause is not None:
            await Eventful.pause()

    class Settings:
        name = "memory_eventful"
        use_revision = True
        use_state_management = True


class Soft(SessionScopeMixin, DocumentWithSoftDelete):
    name: str = "new"
    n: int = 0

    class Settings:
        name = "memory_soft"
        use_revision = True
        use_state_management = True


class Counting(Neither):
    """Has the mixin from its parent, and changes itself before that is asked to write."""

    class Settings:
        name = "memory_counting"

    async def insert(self, *args: Any, **kwargs: Any) -> Any:
        self.n += 1
        return await super().insert(*args, **kwargs)

    async def save(self, *args: Any, **kwargs: Any) -> Any:
        self.n += 1
        return await super().save(*args, **kwargs)


MODELS: list[Any] = [
    *EVERY,
    Counting,
    NeitherParent,
    BothParent,
    GrandParent,
    Rich,
    Lazy,
    Strict,
    Frozen,
    Eventful,
    Soft,
]


async def initialise(database: Any) -> None:
    """Initialise the classes on the test's client, and empty their collections."""
    await init_beanie(database=database, document_models=MODELS)
    await empty(database, *(model.get_collection_name() for model in MODELS))


def scope_of(client: Any, **options: Any) -> Any:
    """Return a scope with all the classes in it."""
    return with_session(client=client, collections=MODELS, **options)


def look(document: Document) -> dict[str, Any]:
    """Return all that a document holds, in copies that nothing changes any more."""
    return {
        "fields": deepcopy(dict(vars(document))),
        "set": set(document.model_fields_set),
        "extra": deepcopy(document.model_extra),
        "private": deepcopy(getattr(document, "__pydantic_private__", None)),
    }


async def stored(database: Any, document: Document) -> Any:
    """Return what the server holds of a document; ``None`` where it holds nothing."""
    found = await database[type(document).get_collection_name()].find_one({"_id": document.id})
    if found is not None and found.get("revision_id") is not None:
        found["revision_id"] = found["revision_id"].as_uuid()
    return found
