"""A free-fall migration; two environment variables let the tests spoil it."""

import os
from contextlib import nullcontext
from typing import Any

from beanie import Document, free_fall_migration
from beanie.operators import Inc

from beanie_session_scope import SessionScopeMixin, bind_session


class Account(SessionScopeMixin, Document):
    owner: str
    balance: int = 0

    class Settings:
        name = "accounts"


class Entry(SessionScopeMixin, Document):
    text: str

    class Settings:
        name = "entries"


def bound(session: Any) -> Any:
    if os.environ.get("MIGRATION_UNBOUND"):
        return nullcontext()
    return bind_session(session, collections=[Account, Entry])


async def change(amount: int) -> None:
    for account in await Account.find_all().to_list():
        await account.update(Inc({Account.balance: amount}))
        await Entry(text=f"{account.owner}: {amount}").insert()
    if os.environ.get("MIGRATION_BREAKS"):
        raise RuntimeError("the migration breaks")


class Forward:
    @free_fall_migration(document_models=[Account, Entry])
    async def raise_balances(self, session: Any) -> None:
        with bound(session):
            await change(1000)


class Backward:
    @free_fall_migration(document_models=[Account, Entry])
    async def lower_balances(self, session: Any) -> None:
        with bound(session):
            await change(-1000)
