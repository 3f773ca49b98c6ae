"""Transfers between accounts: all of a transfer is stored, or nothing of it.

    python examples/money_transfer.py

A transfer takes the money from one account *first*, and finds out afterwards whether it may.
Only the rollback keeps the sum of all balances right. At last, transfers that compete for the
same two accounts run at the same time: MongoDB lets one of two win and tells the other to try
again, which transaction_attempts does.
"""

import asyncio
from typing import Any

from _server import open_database
from beanie import Document
from beanie.operators import Inc

from beanie_session_scope import SessionScopeMixin, transaction_attempts, with_session


class Account(SessionScopeMixin, Document):
    owner: str
    balance: int


class LedgerEntry(SessionScopeMixin, Document):
    source: str
    target: str
    amount: int


class InsufficientFundsError(Exception):
    """The source has less than the amount."""


class UnknownAccountError(Exception):
    """Nobody of that name has an account."""


async def transfer(source: str, target: str, amount: int) -> None:
    async with with_session(collections=[Account, LedgerEntry]):
        if await change(source, -amount) < 0:
            raise InsufficientFundsError(source)
        await change(target, amount)
        await LedgerEntry(source=source, target=target, amount=amount).insert()


async def change(owner: str, amount: int) -> int:
    """Change a balance. Nothing here says that it is part of a transaction."""
    account = Account.find_one(Account.owner == owner)
    await account.update(Inc({Account.balance: amount}))
    found = await Account.find_one(Account.owner == owner)
    if found is None:
        raise UnknownAccountError(owner)
    return found.balance


async def transfer_with_retries(source: str, target: str, amount: int) -> int:
    """Transfer, again while MongoDB says so; return how many attempts it took."""
    number = 0
    async for attempt in transaction_attempts(collections=[Account, LedgerEntry]):
        number = attempt.number
        async with attempt:
            await transfer(source, target, amount)  # joins this transaction
    return number


async def refused(source: str, target: str, amount: int) -> str:
    try:
        await transfer(source, target, amount)
    except (InsufficientFundsError, UnknownAccountError) as error:
        return f"refused: {error!r}"
    return "done"


async def report(database: Any, balances: dict[str, int], entries: int) -> None:
    """Show what the database holds, read by the driver, and check it."""
    accounts = database[Account.get_collection_name()].find()
    held = {account["owner"]: account["balance"] async for account in accounts}
    ledger = await database[LedgerEntry.get_collection_name()].count_documents({})
    total = sum(held.values())
    print(f"  balances: {held}, sum {total}; ledger entries: {ledger}")
    expect(total, 150)
    expect(held, balances)
    expect(ledger, entries)


def expect(actual: object, expected: object) -> None:
    if actual != expected:
        raise AssertionError(f"{actual!r} should be {expected!r}")


async def main() -> None:
    async with open_database(Account, LedgerEntry) as database:
        print("\nTwo accounts")
        async with with_session(collections=[Account]):
            await Account(owner="Ann", balance=100).insert()
            await Account(owner="Bob", balance=50).insert()
        await report(database, {"Ann": 100, "Bob": 50}, entries=0)

        print("\nAnn sends Bob 30")
        await transfer("Ann", "Bob", 30)
        await report(database, {"Ann": 70, "Bob": 80}, entries=1)

        print("\nBob sends Ann 500, which he does not have")
        outcome = await refused("Bob", "Ann", 500)
        print(f"  {outcome}")
        expect(outcome, "refused: InsufficientFundsError('Bob')")
        await report(database, {"Ann": 70, "Bob": 80}, entries=1)

        print("\nAnn sends 10 to Zoe, who has no account")
        outcome = await refused("Ann", "Zoe", 10)
        print(f"  {outcome}")
        expect(outcome, "refused: UnknownAccountError('Zoe')")
        await report(database, {"Ann": 70, "Bob": 80}, entries=1)

        print("\nAnn sends Bob 1, and Bob sends Ann 2, ten times each and all at the same time")
        transfers = [("Ann", "Bob", 1), ("Bob", "Ann", 2)] * 10
        took = await asyncio.gather(*(transfer_with_retries(*each) for each in transfers))
        print(f"  20 transfers, {sum(took)} attempts")
        await report(database, {"Ann": 80, "Bob": 70}, entries=21)
    print("\nThe sum never changed, and every transfer that succeeded is in the ledger.")


if __name__ == "__main__":
    asyncio.run(main())
