"""The documents of the benchmarks: each twice, as a plain class and with the mixin."""

from __future__ import annotations

from beanie import Document

from beanie_session_scope import SessionScopeMixin


class Plain(Document):
    color: str
    size: int = 1
    tags: list[str] = []

    class Settings:
        indexes = ["color"]


class Scoped(SessionScopeMixin, Document):
    color: str
    size: int = 1
    tags: list[str] = []

    class Settings:
        indexes = ["color"]


class PlainCounter(Document):
    value: int = 0


class ScopedCounter(SessionScopeMixin, Document):
    value: int = 0


class PlainEntry(Document):
    number: int


class ScopedEntry(SessionScopeMixin, Document):
    number: int
