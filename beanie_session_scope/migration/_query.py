"""Which documents a migration is about, in the order in which it takes them.

It goes by ``_id``, which is indexed and never changes. Where it goes on it asks for an ``_id``
that is greater *in an expression*: there, unlike in a filter, MongoDB compares values of any two
types (manual, "Comparison/Sort Order"), so that a collection may mix numbers, strings and
ObjectIds. From MongoDB 5.0 on such a comparison uses the index.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from beanie import View
from beanie.exceptions import CollectionWasNotInitialized
from beanie.odm.queries.find import FindMany
from beanie.odm.utils.projection import get_projection
from pymongo import ReadPreference

from beanie_session_scope import (
    ModelNotInitializedError,
    ModelNotScopedError,
    SessionScopeMixin,
    collection_of,
)

Model: TypeAlias = Any
"""A class with the mixin: ``Document`` or ``UnionDoc``, of either Beanie."""

Position: TypeAlias = "tuple[Any, ...]"
"""The ``_id`` that was dealt with last, if any: ``(5,)`` or ``()``. ``None`` is an ``_id``, too."""


class Selection:
    """The documents that a query finds.

    Args:
        query: A class with the mixin, or a query that its ``find`` returned.

    Raises:
        TypeError: If it is something else.
        ValueError: If the query says more than which documents.
        ModelNotScopedError: If the class has no mixin.
        ModelNotInitializedError: If the class is not initialised.
    """

    def __init__(self, query: Any) -> None:
        found = _find_all(query) if isinstance(query, type) else query
        if not isinstance(found, FindMany):
            raise TypeError(
                f"query must be a class, or what its find() returns, and is a "
                f"{type(query).__name__}: write Bike, or Bike.find(Bike.color == 'red')."
            )
        self.model: Model = found.document_model
        _check_model(self.model)
        _check_options(found)
        self.filter: dict[str, Any] = dict(found.get_filter_query())
        self.collection = collection_of(self.model)
        self._projection = get_projection(self.model)

    def _after(self, position: Position) -> dict[str, Any]:
        if not position:
            return self.filter
        after = {"$expr": {"$gt": ["$_id", {"$literal": position[0]}]}}
        return {"$and": [self.filter, after]} if self.filter else after

    async def ids(self, position: Position, most: int) -> list[Any]:
        """Return the next ids in order.

        It runs outside any transaction: to find them may take longer than one may live. Each
        batch looks again, in its transaction, whether they still match.
        """
        primary = self.collection.with_options(read_preference=ReadPreference.PRIMARY)
        cursor = primary.find(self._after(position), {"_id": 1}).sort("_id", 1).limit(most)
        return [each["_id"] async for each in cursor]

    async def count(self, position: Position) -> int:
        """Count the documents that are left."""
        if not position and not self.filter:
            return int(await self.collection.estimated_document_count())
        return int(await self.collection.count_documents(self._after(position)))

    def documents(self, ids: list[Any]) -> Any:
        """Return a cursor over those that still match, as the driver reads them, in order."""
        found = {"$and": [self.filter, {"_id": {"$in": ids}}]}
        return self.collection.find(found, self._projection).sort("_id", 1)


def _find_all(model: type[Any]) -> Any:
    _check_model(model)
    try:
        return model.find_all()
    except CollectionWasNotInitialized:
        raise ModelNotInitializedError(
            f"{model.__name__} is not initialised: list it in document_models of init_beanie(), "
            "and await that before the migration is run."
        ) from None


def _check_model(model: type[Any]) -> None:
    if not issubclass(model, SessionScopeMixin):
        raise ModelNotScopedError(
            f"{model.__name__} has no SessionScopeMixin, so its documents can't be changed in a "
            f"transaction: declare it as class {model.__name__}(SessionScopeMixin, Document)."
        )
    if issubclass(model, View):
        raise TypeError(
            f"{model.__name__} is a view, and views can't be written: migrate the documents that "
            "it is made of."
        )


def _check_options(query: Any) -> None:
    """Refuse what would make the query another one each time, or its documents other ones."""
    given = {
        "sort()": query.sort_expressions,
        "skip()": query.skip_number,
        "limit()": query.limit_number,
        "project()": query.projection_model is not query.document_model,
        "fetch_links": query.fetch_links,
        "lazy_parse": query.lazy_parse,
        "session": query.session is not None,
        **{f"{name} (for the driver)": True for name in query.pymongo_kwargs},
    }
    refused = [name for name, value in given.items() if value]
    if refused:
        raise ValueError(
            f"The query has {', '.join(refused)}, and a migration takes all documents that match "
            "its filter, whole and in the order of _id: leave that out, or put into the filter "
            "what it is to find."
        )
