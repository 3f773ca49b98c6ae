"""The document classes of the tests of the pytest plugin: the inner test runs import them, too."""

from beanie import Document

from beanie_session_scope import SessionScopeMixin

DATABASE = "beanie_session_scope_plugin_tests"


class Bike(SessionScopeMixin, Document):
    name: str = "new"

    class Settings:
        name = "bikes"


class Rider(SessionScopeMixin, Document):
    name: str = "new"

    class Settings:
        name = "riders"


class PlainBike(Document):
    """Stored where ``Bike`` is, without the mixin."""

    name: str = "new"

    class Settings:
        name = "bikes"


MODELS = [Bike, Rider, PlainBike]
