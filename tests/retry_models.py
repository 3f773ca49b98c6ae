"""Document classes whose methods run in transactions."""

from typing import Any

from beanie import Document
from labels import TRANSIENT, labelled

from beanie_session_scope import SessionScopeMixin, transactional

calls: list[str] = []
"""The methods that were called."""

FAILURES = 2
"""How often each method fails before it succeeds."""


def note(name: str) -> None:
    """Note a call, and let it fail as in a conflict while it is one of the first."""
    calls.append(name)
    if calls.count(name) <= FAILURES:
        raise labelled(TRANSIENT)


class Counter(SessionScopeMixin, Document):
    n: int = 0

    class Settings:
        name = "counter"
        use_state_management = True

    @transactional
    async def add(self, step: int = 1) -> int:
        """Add to the counter."""
        self.n += step
        await self.save()
        note("add")
        return self.n

    @transactional(timeout=5)
    async def add_change(self) -> None:
        self.n += 1
        await self.save_changes()
        note("add_change")

    @classmethod
    @transactional()
    async def create(cls, **fields: Any) -> "Counter":
        created = await cls(**fields).insert()
        note("create")
        return created

    @staticmethod
    @transactional
    async def double(counter: "Counter") -> None:
        counter.n *= 2
        await counter.save()
        note("double")
