"""Many classes in the application: ``python -m benchmarks.scaling``.

Every class is stored in a collection of its own. A scope binds one of them, or all. By hand, and
with ``bind()``, nothing is done for a class that is not used.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from beanie import Document, init_beanie

from beanie_session_scope import SessionScopeMixin, with_session

from .measure import Row, measure
from .overhead import transactions
from .suite import Benchmark, Setting, main
from .ways import SCOPE, WAYS, Way


def new_class(number: int) -> Any:
    """Return a class like all others."""
    namespace = {"__module__": __name__, "__annotations__": {"color": str}}
    return type(f"Bound{number}", (SessionScopeMixin, Document), namespace)


async def rows(setting: Setting) -> AsyncIterator[Row]:
    classes: list[Any] = [SCOPE.model]
    for count in setting.pick((1, 5, 20, 100, 500), (1, 20, 500), (1, 3)):
        new = [new_class(number) for number in range(len(classes), count)]
        await init_beanie(database=setting.database, document_models=new)
        classes += new
        for name, with_insert, bound in (
            ("empty, one bound", False, classes[:1]),
            ("empty, all bound", False, classes),
            ("one insert, one bound", True, classes[:1]),
            ("one insert, all bound", True, classes),
        ):
            blocks = {
                way.name: transactions(setting, way, with_insert, setting.pick(30, 10, 2))
                for way in ways(list(bound))
            }
            yield await measure(name, blocks, setting.pick(15, 5, 1), x=count)


def ways(classes: list[Any]) -> list[Way]:
    """Return the ways, of which the last binds these classes."""

    def open_scope(client: Any) -> Any:
        return with_session(client, classes)

    *others, scope = WAYS
    return [*others, replace(scope, open=open_scope)]


BENCHMARK = Benchmark("scaling", "Number of classes", rows, x_name="classes", plot="lines")

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
