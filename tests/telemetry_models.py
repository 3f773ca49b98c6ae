"""The document class of the tests about telemetry."""

from __future__ import annotations

from beanie import Document

from beanie_session_scope import SessionScopeMixin


class Coin(SessionScopeMixin, Document):
    value: int = 1

    class Settings:
        name = "coin"
