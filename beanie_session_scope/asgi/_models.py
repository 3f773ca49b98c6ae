"""The classes of the application."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from beanie_session_scope import SessionScopeMixin

Model: TypeAlias = "type[SessionScopeMixin]"


def scoped_models(parent: Model = SessionScopeMixin) -> Iterator[Model]:
    """Yield every class with the mixin."""
    for model in parent.__subclasses__():
        yield model
        yield from scoped_models(model)
