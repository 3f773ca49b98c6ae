"""The document classes of the migration tests, each in a collection of its own."""

from typing import Any, List, Optional  # noqa: UP035 - Beanie 1.26 evaluates these itself

from beanie import (
    Document,
    Insert,
    Link,
    Replace,
    Save,
    UnionDoc,
    View,
    after_event,
    before_event,
)
from pydantic import Field

from beanie_session_scope import SessionScopeMixin


class Bike(SessionScopeMixin, Document):
    id: Any = Field(default=None, alias="_id")
    color: str = "red"
    n: int = 0

    class Settings:
        name = "migration_bikes"


class NewBike(SessionScopeMixin, Document):
    """What a bike becomes: its color has another name."""

    id: Any = Field(default=None, alias="_id")
    paint: str
    n: int = 0

    class Settings:
        name = "migration_bikes"


class Ride(SessionScopeMixin, Document):
    """Written beside the bikes, by what changes them."""

    bike: Any

    class Settings:
        name = "migration_rides"


class Careful(SessionScopeMixin, Document):
    """Everything that Beanie does when it saves a document."""

    n: int = 0
    seen: List[str] = []  # noqa: UP006

    class Settings:
        name = "migration_careful"
        use_state_management = True
        use_revision = True

    @before_event(Save, Replace)
    def note_before(self) -> None:
        self.seen = [*self.seen, "before"]

    @after_event(Save, Replace)
    async def note_after(self) -> None:
        await Ride(bike=self.n).insert()

    @before_event(Insert)
    def never(self) -> None:
        self.seen = ["inserted"]


class Strict(SessionScopeMixin, Document):
    n: int = Field(default=0, lt=100)

    class Settings:
        name = "migration_strict"
        validate_on_save = True


class Vehicle(SessionScopeMixin, Document):
    n: int = 0

    class Settings:
        name = "migration_vehicles"
        is_root = True


class Car(Vehicle):
    doors: int = 4


class Lorry(Vehicle):
    tons: int = 7


class Pets(SessionScopeMixin, UnionDoc):
    class Settings:
        name = "migration_pets"
        class_id = "_class_id"


class Cat(SessionScopeMixin, Document):
    n: int = 0
    lives: int = 9

    class Settings:
        union_doc = Pets


class Dog(SessionScopeMixin, Document):
    n: int = 0
    friend: Optional[Link[Cat]] = None  # noqa: UP045

    class Settings:
        union_doc = Pets


class Fleet(SessionScopeMixin, UnionDoc):
    class Settings:
        name = "migration_fleet"
        class_id = "_class_id"


class Van(Document):
    n: int = 0

    class Settings:
        union_doc = Fleet


class BikeView(SessionScopeMixin, View):
    color: str

    class Settings:
        name = "migration_bike_view"
        source = Bike
        pipeline: List[Any] = [{"$match": {}}]  # noqa: UP006


class PlainBike(Document):
    n: int = 0

    class Settings:
        name = "migration_plain"


class NotInitialised(SessionScopeMixin, Document):
    n: int = 0


MODELS: list[Any] = [
    Bike,
    NewBike,
    Ride,
    Careful,
    Strict,
    Vehicle,
    Fleet,
    Van,
    Car,
    Lorry,
    Pets,
    Cat,
    Dog,
    BikeView,
    PlainBike,
]
COLLECTIONS = (
    "migration_bikes",
    "migration_rides",
    "migration_careful",
    "migration_strict",
    "migration_vehicles",
    "migration_pets",
    "migration_plain",
    "beanie_session_scope_migrations",
)
