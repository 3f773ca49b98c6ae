"""Beanie's public operations: each that reaches the database, with one way to call it.

``PUBLIC`` holds the classes in which Beanie declares them. A name that appears there in
some release of Beanie and is neither in ``OPERATIONS`` nor in ``NO_COMMAND`` makes the test
that compares them fail, so that no new operation goes untested.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from beanie import BackLink, BulkWriter, Document, DocumentWithSoftDelete, Link, UnionDoc, View
from beanie.odm.fields import DeleteRules, WriteRules
from beanie.odm.operators.update.general import Inc, Set
from beanie.odm.queries.aggregation import AggregationQuery
from beanie.odm.queries.delete import DeleteMany, DeleteOne
from beanie.odm.queries.find import FindMany, FindOne
from beanie.odm.queries.update import UpdateMany, UpdateOne, UpdateResponse
from lazy_model import LazyModel
from models import Holder, Linked

PUBLIC: tuple[type[Any], ...] = (
    AggregationQuery,
    BackLink,
    BulkWriter,
    DeleteMany,
    DeleteOne,
    Document,
    DocumentWithSoftDelete,
    FindMany,
    FindOne,
    Link,
    UnionDoc,
    UpdateMany,
    UpdateOne,
    View,
)

PIPELINE: list[Any] = [{"$group": {"_id": "$name", "n": {"$sum": "$n"}}}]

Run = Callable[[Any, Any], Awaitable[object]]


def public_names(cls: type[Any]) -> set[str]:
    """Return the public callables that Beanie adds to a class."""
    inherited = set(dir(LazyModel))
    return {
        f"{cls.__name__}.{name}"
        for name in dir(cls)
        if not name.startswith("_") and name not in inherited and callable(getattr(cls, name))
    }


def _query(model: Any) -> Any:
    return model.find(model.name == "stored")


def _one(model: Any) -> Any:
    return model.find_one(model.name == "stored")


async def _iterate(cursor: Any) -> list[Any]:
    return [each async for each in cursor]


async def _first(cursor: Any) -> object:
    async for each in cursor:
        return each
    return None


async def _bulk(model: Any, _: Any) -> object:
    async with model.bulk_writer() as bulk:
        await model.insert_one(model(), bulk_writer=bulk)
        await _one(model).update(Inc({"n": 1}), bulk_writer=bulk)
        await _query(model).delete(bulk_writer=bulk)


async def _bulk_writer(model: Any, _: Any) -> object:
    bulk = BulkWriter(object_class=model) if _takes_object_class() else BulkWriter()
    await model.insert_one(model(), bulk_writer=bulk)
    return await bulk.commit()


def _takes_object_class() -> bool:
    return "object_class" in BulkWriter.__init__.__code__.co_varnames


async def _cursor(query: Any) -> object:
    cursor = query.get_cursor()
    if hasattr(cursor, "__await__"):
        cursor = await cursor
    return await cursor.to_list(None)


async def _changes(doc: Any) -> object:
    doc.n += 1
    return await doc.save_changes()


async def _upsert(model: Any, query: Any) -> object:
    return await query.upsert(Set({"n": 5}), on_insert=model(name="upserted"))


def _nothing(model: Any) -> Any:
    return model.find(model.name == "not there")


def _nothing_one(model: Any) -> Any:
    return model.find_one(model.name == "not there")


# The operations that every document class has, called as (model, a stored document).
DOCUMENT: dict[str, Run] = {
    "Document.aggregate": lambda m, d: m.aggregate(PIPELINE).to_list(),
    "Document.all": lambda m, d: m.all().to_list(),
    "Document.avg": lambda m, d: m.avg(m.n),
    "Document.bulk_writer": _bulk,
    "Document.count": lambda m, d: m.count(),
    "Document.create": lambda m, d: m().create(),
    "Document.current_date": lambda m, d: d.current_date({"at": True}),
    "Document.delete": lambda m, d: d.delete(),
    "Document.delete_all": lambda m, d: m.delete_all(),
    "Document.distinct": lambda m, d: m.distinct("name"),
    "Document.find": lambda m, d: m.find(m.n >= 0).to_list(),
    "Document.find_all": lambda m, d: m.find_all().to_list(),
    "Document.find_many": lambda m, d: m.find_many(m.n >= 0).to_list(),
    "Document.find_one": lambda m, d: m.find_one(m.n >= 0),
    "Document.get": lambda m, d: m.get(d.id),
    "Document.inc": lambda m, d: d.inc({m.n: 1}),
    "Document.insert": lambda m, d: m().insert(),
    "Document.insert_many": lambda m, d: m.insert_many([m(), m()]),
    "Document.insert_one": lambda m, d: m.insert_one(m()),
    "Document.inspect_collection": lambda m, d: m.inspect_collection(),
    "Document.max": lambda m, d: m.max(m.n),
    "Document.min": lambda m, d: m.min(m.n),
    "Document.replace": lambda m, d: d.replace(),
    "Document.replace_many": lambda m, d: m.replace_many([d]),
    "Document.save": lambda m, d: d.save(),
    "Document.save_changes": lambda m, d: _changes(d),
    "Document.set": lambda m, d: d.set({m.n: 3}),
    "Document.sum": lambda m, d: m.sum(m.n),
    "Document.sync": lambda m, d: d.sync(),
    "Document.update": lambda m, d: d.update(Set({"n": 4})),
    "Document.update_all": lambda m, d: m.update_all(Set({"n": 4})),
    "AggregationQuery.get_cursor": lambda m, d: _cursor(m.aggregate(PIPELINE)),
    "AggregationQuery.to_list": lambda m, d: _query(m).aggregate(PIPELINE).to_list(),
    "AggregationQuery.__aiter__": lambda m, d: _iterate(m.aggregate(PIPELINE)),
    "BulkWriter.commit": _bulk_writer,
    "DeleteMany.__await__": lambda m, d: _query(m).delete(),
    "DeleteOne.__await__": lambda m, d: _one(m).delete(),
    "FindMany.aggregate": lambda m, d: _query(m).aggregate(PIPELINE).to_list(),
    "FindMany.avg": lambda m, d: _query(m).avg(m.n),
    "FindMany.count": lambda m, d: _query(m).count(),
    "FindMany.current_date": lambda m, d: _query(m).current_date({"at": True}),
    "FindMany.delete": lambda m, d: _query(m).delete(),
    "FindMany.delete_many": lambda m, d: _query(m).delete_many(),
    "FindMany.distinct": lambda m, d: _query(m).distinct("name"),
    "FindMany.exists": lambda m, d: _query(m).exists(),
    "FindMany.find": lambda m, d: _query(m).find(m.n >= 0).to_list(),
    "FindMany.find_many": lambda m, d: _query(m).find_many(m.n >= 0).to_list(),
    "FindMany.first_or_none": lambda m, d: _query(m).first_or_none(),
    "FindMany.get_cursor": lambda m, d: _cursor(_query(m)),
    "FindMany.inc": lambda m, d: _query(m).inc({m.n: 1}),
    "FindMany.limit": lambda m, d: _query(m).limit(1).to_list(),
    "FindMany.max": lambda m, d: _query(m).max(m.n),
    "FindMany.min": lambda m, d: _query(m).min(m.n),
    "FindMany.project": lambda m, d: _query(m).project(m).to_list(),
    "FindMany.set": lambda m, d: _query(m).set({m.n: 7}),
    "FindMany.skip": lambda m, d: _query(m).skip(1).to_list(),
    "FindMany.sort": lambda m, d: _query(m).sort("-n").to_list(),
    "FindMany.sum": lambda m, d: _query(m).sum(m.n),
    "FindMany.to_list": lambda m, d: _query(m).to_list(length=2),
    "FindMany.update": lambda m, d: _query(m).update(Inc({"n": 1})),
    "FindMany.update_many": lambda m, d: _query(m).update_many(Inc({"n": 1})),
    "FindMany.upsert": lambda m, d: _upsert(m, _nothing(m)),
    "FindMany.__aiter__": lambda m, d: _iterate(_query(m)),
    "FindMany.__anext__": lambda m, d: _first(_query(m)),
    "FindOne.count": lambda m, d: _one(m).count(),
    "FindOne.current_date": lambda m, d: _one(m).current_date({"at": True}),
    "FindOne.delete": lambda m, d: _one(m).delete(),
    "FindOne.delete_one": lambda m, d: _one(m).delete_one(),
    "FindOne.exists": lambda m, d: _one(m).exists(),
    "FindOne.find_one": lambda m, d: _one(m).find_one(m.n >= 0),
    "FindOne.inc": lambda m, d: _one(m).inc({m.n: 1}),
    "FindOne.project": lambda m, d: _one(m).project(m),
    "FindOne.replace_one": lambda m, d: _one(m).replace_one(m(name="replaced")),
    "FindOne.set": lambda m, d: _one(m).set({m.n: 2}),
    "FindOne.update": lambda m, d: _one(m).update(Inc({"n": 1})),
    "FindOne.update_one": lambda m, d: _one(m).update_one(Inc({"n": 1})),
    "FindOne.upsert": lambda m, d: _upsert(m, _nothing_one(m)),
    "UpdateMany.__await__": lambda m, d: _query(m).update(Inc({"n": 1})),
    "UpdateMany.current_date": lambda m, d: _query(m).inc({m.n: 1}).current_date({"at": True}),
    "UpdateMany.inc": lambda m, d: _query(m).set({m.name: "x"}).inc({m.n: 1}),
    "UpdateMany.set": lambda m, d: _query(m).inc({m.n: 1}).set({m.name: "x"}),
    "UpdateMany.update": lambda m, d: _query(m).inc({m.n: 1}).update(Set({"name": "x"})),
    "UpdateMany.update_many": lambda m, d: _query(m).inc({m.n: 1}).update_many(Set({"name": "x"})),
    "UpdateMany.upsert": lambda m, d: _nothing(m).inc({m.n: 1}).upsert(on_insert=m()),
    "UpdateOne.__await__": lambda m, d: _one(m).update(
        Inc({"n": 1}), response_type=UpdateResponse.NEW_DOCUMENT
    ),
    "UpdateOne.current_date": lambda m, d: _one(m).inc({m.n: 1}).current_date({"at": True}),
    "UpdateOne.inc": lambda m, d: _one(m).set({m.name: "x"}).inc({m.n: 1}),
    "UpdateOne.set": lambda m, d: _one(m).inc({m.n: 1}).set({m.name: "x"}),
    "UpdateOne.update": lambda m, d: _one(m).inc({m.n: 1}).update(Set({"name": "x"})),
    "UpdateOne.update_one": lambda m, d: _one(m).inc({m.n: 1}).update_one(Set({"name": "x"})),
    "UpdateOne.upsert": lambda m, d: _nothing_one(m).inc({m.n: 1}).upsert(on_insert=m()),
}


def _of(prefix: str, keys: tuple[str, ...]) -> dict[str, Run]:
    return {f"{prefix}.{key}": DOCUMENT[f"Document.{key}"] for key in keys}


READS = (
    "aggregate",
    "all",
    "avg",
    "count",
    "find",
    "find_all",
    "find_many",
    "find_one",
    "max",
    "min",
    "sum",
)
VIEW: dict[str, Run] = _of("View", READS)
UNION: dict[str, Run] = {
    "UnionDoc.aggregate": lambda u, d: u.aggregate(PIPELINE).to_list(),
    "UnionDoc.all": lambda u, d: u.all().to_list(),
    "UnionDoc.avg": lambda u, d: u.avg("n"),
    "UnionDoc.bulk_writer": lambda u, d: _union_bulk(u, d),
    "UnionDoc.count": lambda u, d: u.count(),
    "UnionDoc.find": lambda u, d: u.find({"n": {"$gte": 0}}).to_list(),
    "UnionDoc.find_all": lambda u, d: u.find_all().to_list(),
    "UnionDoc.find_many": lambda u, d: u.find_many({"n": {"$gte": 0}}).to_list(),
    "UnionDoc.find_one": lambda u, d: u.find_one({"n": {"$gte": 0}}),
    "UnionDoc.max": lambda u, d: u.max("n"),
    "UnionDoc.min": lambda u, d: u.min("n"),
    "UnionDoc.sum": lambda u, d: u.sum("n"),
}


async def _union_bulk(union: Any, doc: Any) -> object:
    async with union.bulk_writer() as bulk:
        await type(doc).insert_one(type(doc)(), bulk_writer=bulk)


SOFT_DELETE: dict[str, Run] = {
    **_of(
        "DocumentWithSoftDelete",
        tuple(name.removeprefix("Document.") for name in DOCUMENT if name.startswith("Document.")),
    ),
    "DocumentWithSoftDelete.find_many_in_all": lambda m, d: m.find_many_in_all().to_list(),
    "DocumentWithSoftDelete.hard_delete": lambda m, d: d.hard_delete(),
    "DocumentWithSoftDelete.fetch_all_links": lambda m, d: _linked_one(m, "fetch_all_links"),
    "DocumentWithSoftDelete.fetch_link": lambda m, d: _linked_one(m, "fetch_link", "one"),
}


async def _linked_one(model: Any, method: str, *args: Any) -> object:
    linking = await model.find_one(model.name == "stored")
    await getattr(linking, method)(*args)
    assert linking.one.name == "stored", "the link was followed"
    return linking


async def _stored_holder(**fields: Any) -> Any:
    return await Holder.find_one(Holder.name == "stored", **fields)


async def _fetch(call: Callable[[Any], Awaitable[object]]) -> object:
    return await call(await _stored_holder())


def _new_holder() -> Any:
    return Holder(one=Linked(), many=[Linked() for _ in range(3)])


async def _deleted() -> object:
    holder = await _stored_holder(fetch_links=True)
    return await holder.delete(link_rule=DeleteRules.DELETE_LINKS)


async def _written(method: str) -> object:
    holder = await _stored_holder(fetch_links=True)
    return await getattr(holder, method)(link_rule=WriteRules.WRITE)


# What follows a link from one document to another. The arguments are not used: the
# documents are a Holder and the Linked ones that it links to.
LINKS: dict[str, Run] = {
    "Document.fetch_all_links": lambda *_: _fetch(lambda h: h.fetch_all_links()),
    "Document.fetch_link": lambda *_: _fetch(lambda h: h.fetch_link(Holder.one)),
    "Link.fetch": lambda *_: _fetch(lambda h: h.one.fetch()),
    "Link.fetch_list": lambda *_: _fetch(lambda h: Link.fetch_list(h.many)),
    "Link.fetch_many": lambda *_: _fetch(lambda h: Link.fetch_many(h.many)),
    "Link.fetch_one": lambda *_: _fetch(lambda h: Link.fetch_one(h.one)),
    "find(fetch_links=True)": lambda *_: Holder.find(fetch_links=True).to_list(),
    "find(fetch_links=True).count": lambda *_: Holder.find(fetch_links=True).count(),
    "find_one(fetch_links=True)": lambda *_: _stored_holder(fetch_links=True),
    "insert(link_rule=WRITE)": lambda *_: _new_holder().insert(link_rule=WriteRules.WRITE),
    "insert_one(link_rule=WRITE)": lambda *_: Holder.insert_one(
        _new_holder(), link_rule=WriteRules.WRITE
    ),
    "save(link_rule=WRITE)": lambda *_: _written("save"),
    "replace(link_rule=WRITE)": lambda *_: _written("replace"),
    "delete(link_rule=DELETE_LINKS)": lambda *_: _deleted(),
}

VIEW_LINKS: dict[str, Run] = {
    "View.fetch_all_links": lambda m, d: _linked_one(m, "fetch_all_links"),
    "View.fetch_link": lambda m, d: _linked_one(m, "fetch_link", "one"),
}

# Public, and sends nothing: builds a query, or tells something about a class.
NO_COMMAND = {
    *(
        f"{kind}.{name}"
        for kind in ("Document", "DocumentWithSoftDelete", "View", "UnionDoc")
        for name in (
            "add_child",
            "check_hidden_fields",
            "fill_back_refs",
            "get_bson_encoders",
            "get_changes",
            "get_collection_name",
            "get_link_fields",
            "get_model_type",
            "get_motor_collection",
            "get_previous_changes",
            "get_previous_saved_state",
            "get_pymongo_collection",
            "get_saved_state",
            "get_settings",
            "is_deleted",
            "link_from_id",
            "register_doc",
            "rollback",
            "set_collection",
            "set_collection_name",
            "set_database",
            "state_management_replace_objects",
            "state_management_save_previous",
            "to_ref",
            "use_state_management",
            "validate_self",
        )
    ),
    *(
        f"{kind}.{name}"
        for kind in (
            "AggregationQuery",
            "DeleteMany",
            "DeleteOne",
            "FindMany",
            "FindOne",
            "UpdateMany",
            "UpdateOne",
        )
        for name in (
            "AggregationQueryType",
            "DeleteQueryType",
            "UpdateQueryType",
            "build_aggregation_pipeline",
            "clone",
            "get_aggregation_pipeline",
            "get_filter_query",
            "get_projection_model",
            "prepare_find_expressions",
            "set_session",
        )
    ),
    "BulkWriter.add_operation",
    *(
        f"{kind}.{name}"
        for kind in ("Link", "BackLink")
        for name in (
            "build_validation",
            "repack_links",
            "serialize",
            "to_dict",
            "to_ref",
            "wrapped_validate",
        )
    ),
}

OPERATIONS: set[str] = {
    *DOCUMENT,
    *VIEW,
    *UNION,
    *SOFT_DELETE,
    *LINKS,
    *VIEW_LINKS,
}


def present(operations: dict[str, Run]) -> list[str]:
    """Return the operations of a table that the installed Beanie has."""
    declared = {name for cls in PUBLIC for name in public_names(cls)}
    inherited = {name for name in operations if "__" in name or "(" in name}
    return sorted((declared | inherited) & set(operations))
