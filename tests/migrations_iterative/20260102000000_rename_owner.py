"""An iterative migration, whose function writes other documents as well."""

import os
from typing import Any

from beanie import Document, iterative_migration

from beanie_session_scope import SessionScopeMixin
from beanie_session_scope.migration import bind_migration


class OldAccount(SessionScopeMixin, Document):
    owner: str
    balance: int = 0

    class Settings:
        name = "accounts"


class NewAccount(SessionScopeMixin, Document):
    holder: str
    balance: int = 0

    class Settings:
        name = "accounts"


class Entry(SessionScopeMixin, Document):
    text: str

    class Settings:
        name = "entries"


def bound(migration: Any) -> Any:
    return migration if os.environ.get("MIGRATION_UNBOUND") else bind_migration()(migration)


async def note(text: str) -> None:
    await Entry(text=text).insert()
    if os.environ.get("MIGRATION_BREAKS") == text:
        raise RuntimeError("the migration breaks")


class Forward:
    @bound
    @iterative_migration(document_models=[Entry], batch_size=2)
    async def rename(self, input_document: OldAccount, output_document: NewAccount) -> None:
        output_document.holder = input_document.owner
        await note(input_document.owner)


class Backward:
    @bound
    @iterative_migration(document_models=[Entry], batch_size=2)
    async def rename(self, input_document: NewAccount, output_document: OldAccount) -> None:
        output_document.owner = input_document.holder
        await note(input_document.holder)
