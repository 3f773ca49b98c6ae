"""G6, value by value: what an abort or a retry puts back, and into which objects."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio
from memory_models import (
    Both,
    BothParent,
    Color,
    Frozen,
    FrozenPart,
    Lazy,
    Part,
    Rich,
    Spec,
    Strict,
    initialise,
    look,
    scope_of,
    stored,
)
from pydantic import ValidationError

from beanie_session_scope import Rollback


@pytest_asyncio.fixture(autouse=True)
async def _classes(database: Any) -> None:
    await initialise(database)


def rich(**values: Any) -> Rich:
    return Rich(
        part=Part(size=1, marks=[1]),
        parts=[Part(size=2), Part(size=3)],
        by_name={"a": [1, 2]},
        frozen_part=FrozenPart(size=1, marks=[1]),
        spec=Spec(weight=1, notes=["first"]),
        tags={"x"},
        pair=(1, [1]),
        queue=deque([1]),
        **values,
    )


Change = Callable[[Rich], object]

CHANGES: dict[str, tuple[Callable[[Rich], Any], Change]] = {
    "a nested model": (lambda d: d.part, lambda d: setattr(d.part, "size", 9)),
    "a list in a nested model": (lambda d: d.part.marks, lambda d: d.part.marks.append(9)),
    "a model in a list": (lambda d: d.parts[0], lambda d: setattr(d.parts[0], "size", 9)),
    "a list": (lambda d: d.parts, lambda d: d.parts.pop()),
    "a dict": (lambda d: d.by_name, lambda d: d.by_name.clear()),
    "a list in a dict": (lambda d: d.by_name["a"], lambda d: d.by_name["a"].append(9)),
    "a frozen model's list": (
        lambda d: d.frozen_part.marks,
        lambda d: d.frozen_part.marks.append(9),
    ),
    "a dataclass": (lambda d: d.spec, lambda d: setattr(d.spec, "weight", 9)),
    "a list in a dataclass": (lambda d: d.spec.notes, lambda d: d.spec.notes.append("9")),
    "a set": (lambda d: d.tags, lambda d: d.tags.add("9")),
    "a list in a tuple": (lambda d: d.pair[1], lambda d: d.pair[1].append(9)),
    "a deque": (lambda d: d.queue, lambda d: d.queue.append(9)),
    "a private attribute": (lambda d: d._seen, lambda d: d._seen.append("9")),
    "a bytearray": (lambda d: d.anything["bytes"], lambda d: d.anything["bytes"].extend(b"9")),
    "an extra field's list": (lambda d: d.more, lambda d: d.more.append(9)),  # type: ignore[attr-defined]
}

REPLACEMENTS: dict[str, Any] = {
    "part": Part(size=9),
    "parts": [],
    "by_name": {"b": []},
    "frozen_part": FrozenPart(size=9),
    "spec": Spec(weight=9),
    "tags": {"y"},
    "pair": (9, []),
    "queue": deque([9]),
    "anything": {"other": 9},
    "price": Decimal("9.99"),
    "color": Color.BLUE,
    "key": UUID(int=9),
    "at": datetime(2030, 1, 1),
    "more": [9],
    "_seen": ["9"],
}


class TestWhatIsTracked:
    @pytest.mark.parametrize("what", CHANGES)
    async def test_is_put_back_into_the_same_object(self, client: Any, what: str) -> None:
        part_of, change = CHANGES[what]
        document = rich(more=[1], anything={"bytes": bytearray(b"1")})
        document._seen.append("1")
        held, before = part_of(document), look(document)
        async with (scope := scope_of(client)):
            scope.track(document)
            change(document)
            assert look(document) != before
            raise Rollback
        assert part_of(document) is held
        assert look(document) == before

    @pytest.mark.parametrize("field", REPLACEMENTS)
    async def test_gets_the_object_back_that_it_had(self, client: Any, field: str) -> None:
        document = rich(more=[1], anything={"a": 1})
        held, before = getattr(document, field), look(document)
        async with (scope := scope_of(client)):
            scope.track(document)
            setattr(document, field, REPLACEMENTS[field])
            raise Rollback
        assert getattr(document, field) is held
        assert look(document) == before

    async def test_loses_what_was_added_to_it(self, client: Any) -> None:
        document = rich()
        before = look(document)
        async with (scope := scope_of(client)):
            scope.track(document)
            document.unheard_of = 1  # type: ignore[attr-defined]
            document.by_name["b"] = []
            raise Rollback
        assert look(document) == before
        assert not hasattr(document, "unheard_of")

    async def test_knows_again_which_fields_were_set(self, client: Any) -> None:
        document = Rich(n=1)
        async with (scope := scope_of(client)):
            scope.track(document)
            document.color = Color.BLUE
            await document.insert()
            raise Rollback
        assert document.model_fields_set == {"n"}

    async def test_includes_the_linked_documents_that_are_in_memory(self, client: Any) -> None:
        child, other = Both(n=1), Both(n=2)
        parent = BothParent(one=child, many=[other])
        async with (scope := scope_of(client)):
            scope.track(parent)
            child.n = other.n = 9
            parent.many.clear()
            raise Rollback
        assert (parent.one, parent.many) == (child, [other])
        assert (child.n, other.n) == (1, 2)

    async def test_may_refer_to_itself(self, client: Any) -> None:
        document = rich()
        document.anything = around = [document.part, {"again": document.part}]
        around.append(around)
        async with (scope := scope_of(client)):
            scope.track(document)
            document.part.size = 9
            document.anything.clear()
            raise Rollback
        assert document.anything is around
        assert around[0] is document.part
        assert around[2] is around
        assert document.part.size == 1

    async def test_is_put_back_again_after_an_abort_in_the_block(self, client: Any) -> None:
        document = rich()
        before = look(document)
        async with (scope := scope_of(client)):
            scope.track(document)
            document.part.marks.append(2)
            await scope.abort()
            assert look(document) == before
            document.part.marks.append(3)
            raise Rollback
        assert look(document) == before


class TestWhatIsWritten:
    async def test_keeps_the_values_that_the_server_merged_back_out(
        self, client: Any, database: Any
    ) -> None:
        document = await rich(more=[1]).insert()
        held = document.part, document.parts, document.parts[0], document.spec
        before = look(document)
        async with scope_of(client):
            await document.set(
                {
                    "part.size": 9,
                    "part.marks": [9],
                    "parts.0.size": 9,
                    "by_name.a": [9],
                    "frozen_part.size": 9,
                    "tags": ["y"],
                    "price": Decimal("9.99"),
                    "color": Color.BLUE,
                    "key": UUID(int=9),
                    "at": datetime(2030, 1, 1),
                    "more": [9],
                }
            )
            assert document.part is held[0], "Beanie merges into nested models"
            assert document.part.size == 9
            raise Rollback
        assert look(document) == before
        assert (document.part, document.parts, document.parts[0], document.spec) == held
        assert all(
            now is then
            for now, then in zip(
                (document.part, document.parts, document.parts[0], document.spec), held, strict=True
            )
        )
        await document.save()
        assert (await stored(database, document))["part"] == {"size": 1, "marks": [1]}

    async def test_may_have_frozen_fields(self, client: Any, database: Any) -> None:
        document = Frozen(part=FrozenPart(size=2))
        before = look(document)
        async with scope_of(client):
            await document.insert()
            await document.replace()
            raise Rollback
        assert look(document) == before
        with pytest.raises(ValidationError):
            document.fixed = "no"
        await document.insert()
        assert (await stored(database, document))["part"]["size"] == 2

    async def test_may_be_validated_on_assignment_and_on_save(
        self, client: Any, database: Any
    ) -> None:
        document = await Strict(n=1).insert()
        before = look(document)
        async with scope_of(client):
            await document.inc({"n": 1})
            await document.save()
            raise Rollback
        assert look(document) == before
        with pytest.raises(ValidationError):
            document.n = -1
        document.n = 3
        await document.save_changes()
        assert (await stored(database, document))["n"] == 3

    async def test_is_put_back_though_it_would_no_longer_be_valid(self, client: Any) -> None:
        document = await Strict(n=1).insert()
        document.__dict__["n"] = -1
        async with (scope := scope_of(client)):
            scope.track(document)
            document.n = 5
            raise Rollback
        assert document.n == -1

    @staticmethod
    async def _half_parsed() -> Any:
        first = await Lazy(n=1, part=Part(marks=[1])).insert()
        (document,) = await Lazy.find(Lazy.id == first.id, lazy_parse=True).to_list()
        return document

    async def test_may_be_half_parsed(self, client: Any, database: Any) -> None:
        document = await self._half_parsed()
        document.n = 2
        async with scope_of(client):
            await document.save_changes()
            assert document.part == Part(marks=[1])
            raise Rollback
        assert document.n == 2
        await document.save_changes()
        found = await stored(database, document)
        assert (found["n"], found["part"]) == (2, {"size": 1, "marks": [1]})

    async def test_may_be_half_parsed_and_not_looked_at_before(self, client: Any) -> None:
        document = await self._half_parsed()
        async with scope_of(client):
            await document.set({"n": 9, "part.marks": []})
            assert (document.n, document.part.marks) == (9, [])
            raise Rollback
        assert (document.n, document.part.marks) == (1, [1])
