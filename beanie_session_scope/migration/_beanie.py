"""Beanie's own migrations, in the session that its ``migrate`` command hands in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from beanie.migrations.controllers.base import BaseMigrationController

from beanie_session_scope import SessionScopeMixin, bind_session

Controller = TypeVar("Controller", bound=BaseMigrationController)


def bind_migration(
    collections: Iterable[type[SessionScopeMixin]] | None = None,
) -> Callable[[Controller], Controller]:
    """Let all of an iterative or a free-fall migration run in Beanie's session.

    Put it above ``@iterative_migration`` or ``@free_fall_migration``. A free-fall migration gets
    the session, and may bind it itself with ``bind_session``. An iterative one does not get it,
    so this is the way for what its function does to other documents.

    Args:
        collections: As for ``bind_session``; all classes, where left out. Those must be among the
            migration's ``document_models``, which Beanie initialises.

    Returns:
        A decorator for the migration.

    Raises:
        TypeError: If what is decorated is no migration of Beanie.
    """

    def decorate(migration: Controller) -> Controller:
        if not isinstance(migration, BaseMigrationController):
            raise TypeError(
                "bind_migration() decorates a migration of Beanie, and this is a "
                f"{type(migration).__name__}: put it above @iterative_migration() or "
                "@free_fall_migration()."
            )
        run: Any = migration.run

        async def run_bound(session: Any) -> None:
            with bind_session(session, collections):
                await run(session=session)

        # Beanie calls this, and looks for nothing but the class of the object.
        migration.run = run_bound  # type: ignore[method-assign]
        return migration

    return decorate
