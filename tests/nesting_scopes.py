"""The scopes of the tests about nesting: on two clients, and ended in one way or another."""

from __future__ import annotations

from typing import Any

from nesting_models import Here, There, database_of

from beanie_session_scope import Rollback, transaction_attempts, with_session

ENDS = ("commit", "abort")


class Boom(Exception):
    """Raised by the tests, and by nobody else."""


class Pair:
    """Two clients, and the classes that each has."""

    def __init__(self, here: Any, there: Any) -> None:
        self.here, self.there = here, there

    def scope(self, *models: Any, **options: Any) -> Any:
        return with_session(client=self.here, collections=models or [Here], **options)

    def joined(self, **options: Any) -> Any:
        return self.scope(propagation="required", **options)

    def new(self, *models: Any, **options: Any) -> Any:
        return self.scope(*models, propagation="requires_new", **options)

    def other(self, **options: Any) -> Any:
        return with_session(client=self.there, collections=[There], **options)

    def attempts(self, *models: Any, **options: Any) -> Any:
        return transaction_attempts(
            client=self.here, collections=models or [Here], jitter=lambda: 0.0, **options
        )

    def other_attempts(self, **options: Any) -> Any:
        return transaction_attempts(
            client=self.there, collections=[There], jitter=lambda: 0.0, **options
        )

    async def stored(self, model: Any = Here) -> list[str]:
        """Return the names of what the server holds, whatever is bound here."""
        client = self.there if model is There else self.here
        found = database_of(client)[model.Settings.name].find().sort("name", 1)
        return [each["name"] for each in await found.to_list(None)]


async def fail_by(how: str, scope: Any) -> None:
    """End the block of a scope in one of the ways that a block can end."""
    if how == "exception":
        raise Boom
    if how in ("rollback", "abort"):
        raise Rollback
    if how == "rollback_only":
        scope.set_rollback_only("the test says so")
