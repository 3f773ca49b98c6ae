"""``SessionScopeMixin``: the seam between Beanie and the driver.

Beanie reaches the driver through one getter of the class, ``get_pymongo_collection`` in
Beanie 2.x and ``get_motor_collection`` in 1.x. The mixin answers it with a
``BoundCollection``, which looks the binding up whenever an operation runs.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, ClassVar, TypeAlias, cast
from weakref import ref

from beanie import Document, UnionDoc, View
from beanie.exceptions import CollectionWasNotInitialized, ViewWasNotInitialized

from .binding import Token, Variable, resolve, unbind
from .cascade import carry_scope
from .channel import borrow
from .collection import bind_collection
from .drivers import DRIVER, Session
from .errors import ClientMismatchError, NotAClientError

Model: TypeAlias = "type[SessionScopeMixin]"

BEANIE_BASES: tuple[type[Any], ...] = (Document, View, UnionDoc)

# The one place that knows Beanie 1.x from Beanie 2.x.
if hasattr(Document, "get_pymongo_collection"):
    GETTER, COLLECTION = "get_pymongo_collection", "pymongo_collection"
else:
    GETTER, COLLECTION = "get_motor_collection", "motor_collection"

_models: list[ref[Model]] = []


class SessionScopeMixin:
    """Lets a Beanie class run in a session that nobody has to pass.

    Put it first among the base classes::

        class Bike(SessionScopeMixin, Document):
            color: str

    The same goes for ``View`` and ``UnionDoc``. Inside ``with_session`` every operation of
    the class runs in the scope's session and transaction.

    Raises:
        TypeError: If a class is defined with the mixin after ``Document``, ``View`` or
            ``UnionDoc``, where it would be without effect.
    """

    _scope_variable: ClassVar[Variable]
    _scope_variables: ClassVar[tuple[Variable, ...]]
    _scope_collection: ClassVar[Any]
    _scope_settings: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class its variable, and check the order of its bases."""
        super().__init_subclass__(**kwargs)
        _check_bases(cls)
        cls._scope_variable = ContextVar(cls.__qualname__, default=None)
        cls._scope_variables = tuple(
            parent.__dict__["_scope_variable"]
            for parent in cls.__mro__
            if "_scope_variable" in parent.__dict__
        )
        cls._scope_collection = None
        cls._scope_settings = _settings_attribute(cls)
        if _is_model(cls):
            carry_scope(cls, first=not any(_is_model(base) for base in cls.__bases__))
        _models.append(ref(cls, _models.remove))

    @classmethod
    def set_session(cls, session: Session) -> Token:
        """Bind the class, and the subclasses that have no binding of their own, to a session.

        The binding holds in the current context: for the running task, and for tasks that it
        starts from now on.

        Args:
            session: A session of the driver that Beanie uses. Who started it goes on owning
                it: it is neither committed nor ended here.

        Returns:
            A token for ``clear_session``.

        Raises:
            NotAClientError: If ``session`` is no session of that driver.
            ClientMismatchError: If the class was initialised on another client.
        """
        plain = plain_collection(cls)
        if plain is not None and plain.database.client is not check_session(session).client:
            raise ClientMismatchError(
                f"{cls.__name__} was initialised on another client than the session's, and a "
                "session works with its own client only."
            )
        return Token(cls._scope_variable, borrow(check_session(session)))

    @classmethod
    def clear_session(cls, token: Token | None = None) -> None:
        """Undo ``set_session`` in the current context.

        Args:
            token: What ``set_session`` returned: restores what was bound before that call.
                Without it the class is unbound, whatever it was bound to.

        Raises:
            ValueError: If the token came from another class.
            RuntimeError: If the token was used before.
        """
        if token is None:
            unbind(cls._scope_variables)
        else:
            token.clear(cls._scope_variable)

    @classmethod
    def get_session(cls) -> Session | None:
        """Return the session that an operation of the class would run in here and now.

        Returns:
            The driver's session, or ``None`` where the class is unbound.

        Raises:
            ScopeClosedError: If this task was started in a scope that is over.
        """
        channel = resolve(cls._scope_variables)
        return None if channel is None else channel.session


def _get_collection(cls: Model) -> Any:
    """Return the collection of the class, bound to whichever scope the class is in."""
    settings = getattr(cls, cls._scope_settings, None)
    if settings is None:
        # Beanie's own getter: it raises where the class was not initialised.
        plain = getattr(super(SessionScopeMixin, cls), GETTER)()
    else:
        plain = getattr(settings, COLLECTION)
    bound = cls._scope_collection
    if bound is not None and bound._scope_plain is plain:
        return bound
    if plain is None:
        return None
    cls._scope_collection = bound = bind_collection(plain, cls._scope_variables)
    return bound


def _get_settings(cls: Model) -> Any:
    """Return the class's settings; those of a bound class have the query cache turned off.

    The cache is shared by the whole process: a read in a transaction would put data there
    that may never be committed, and take from it what the transaction has since changed.
    """
    settings = getattr(cls, cls._scope_settings, None)
    if settings is None:
        settings = super(SessionScopeMixin, cls).get_settings()  # type: ignore[misc]
    if settings.use_cache and resolve(cls._scope_variables) is not None:
        return settings.model_copy(update={"use_cache": False})
    return settings


# Assigned, not defined in the class: a type checker goes on seeing Beanie's signatures.
setattr(SessionScopeMixin, GETTER, classmethod(_get_collection))
SessionScopeMixin.get_settings = classmethod(_get_settings)  # type: ignore[attr-defined]


def models() -> list[Model]:
    """Return every class that has the mixin."""
    return [model for reference in tuple(_models) if (model := reference()) is not None]


def fingerprint(every: list[Model]) -> list[object] | None:
    """Return what Beanie's initialisation sets on each class, by which a new one is told.

    Returns:
        The settings, the collection and the links of each class; ``None`` where the
        collection of a class does not depend on these alone.
    """
    found: list[object] = []
    for model in every:
        if not model._scope_settings and _is_model(model):
            return None
        settings = getattr(model, model._scope_settings, None)
        collection = getattr(settings, COLLECTION, None)
        found += (settings, collection, getattr(model, "_link_fields", None))
    return found


def _is_model(cls: type[Any]) -> bool:
    return issubclass(cls, SessionScopeMixin) and issubclass(cls, BEANIE_BASES)


def _check_bases(cls: type[Any]) -> None:
    order = cls.__mro__
    for base in BEANIE_BASES:
        if base in order and order.index(base) < order.index(SessionScopeMixin):
            raise TypeError(
                f"In class {cls.__name__} the mixin comes after {base.__name__}, where it is "
                f"without effect. Put it first: class {cls.__name__}(SessionScopeMixin, "
                f"{base.__name__})."
            )
    if any(GETTER in base.__dict__ for base in order[: order.index(SessionScopeMixin)]):
        raise TypeError(
            f"Class {cls.__name__} overrides {GETTER}(), through which the mixin works, so its "
            "operations would leave the scope. Move the override to a base class that stands "
            f"after the mixin: class {cls.__name__}(SessionScopeMixin, MyDocument)."
        )


def _settings_attribute(cls: type[Any]) -> str:
    """Return where Beanie keeps the settings; no name where its getters are overridden.

    Beanie asks for the collection whenever a document is created, and for the settings
    again and again: one look at the attribute costs what its getter costs.
    """
    if not _is_model(cls):
        return ""
    base = next(base for base in BEANIE_BASES if issubclass(cls, base))
    below: Any = super(SessionScopeMixin, cast("Model", cls))
    for getter in (GETTER, "get_settings"):
        if getattr(below, getter).__func__ is not getattr(base, getter).__func__:
            return ""
    if cls.get_settings.__func__ is not _get_settings:
        return ""
    return "_document_settings" if base is Document else "_settings"


def check_session(session: Session) -> Session:
    """Return the session, or raise ``NotAClientError`` where it is none of this driver."""
    if not isinstance(session, DRIVER.session_class):
        raise NotAClientError(
            f"A session of {DRIVER.name} is needed, which the installed Beanie uses, and this "
            f"is a {type(session).__name__}. To run without a session use clear_session() or "
            "outside_session()."
        )
    return session


def plain_collection(model: Model) -> Any:
    """Return the driver's collection of a class, or ``None`` where it is not initialised."""
    if not _is_model(model):
        return None
    try:
        bound = getattr(model, GETTER)()
    except (AttributeError, CollectionWasNotInitialized, ViewWasNotInitialized):
        return None
    return getattr(bound, "_scope_plain", None)


def view_source(model: type[Any]) -> str | None:
    """Return the name of the collection that a view reads, or ``None`` for what is no view."""
    if not issubclass(model, View):
        return None
    source: Any = model.get_settings().source
    return source if isinstance(source, str) else str(source.get_collection_name())
