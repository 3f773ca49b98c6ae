"""What a session scope does, step by step, against a real MongoDB.

    python examples/quickstart.py

Each step says what the scope sees, and what the database really holds: that is read through
the driver, without the library. The example ends with an error if any of it is not as told.
"""

import asyncio
from typing import Any

from _server import open_database
from beanie import Document, Link, WriteRules
from pydantic import Field

from beanie_session_scope import Rollback, SessionScopeMixin, outside_session, with_session


class Wheel(SessionScopeMixin, Document):
    name: str


class Bike(SessionScopeMixin, Document):
    name: str
    wheels: list[Link[Wheel]] = Field(default_factory=list)


class LogEntry(SessionScopeMixin, Document):
    name: str


class PaintError(Exception):
    """What goes wrong in the second step."""


async def commit(database: Any) -> None:
    heading("1. Leaving the block commits")

    async with with_session(collections=[Bike]):
        await Bike(name="Racer").insert()
        await Bike(name="Tourer").insert()
        expect("the scope sees", await names(Bike), "Racer, Tourer")
        expect("the database holds, meanwhile", await stored(database, Bike), "nothing")

    expect("the database holds, afterwards", await stored(database, Bike), "Racer, Tourer")


async def rollback_by_an_exception(database: Any) -> None:
    heading("2. An exception rolls back, and propagates")

    caught: Exception | None = None
    try:
        async with with_session(collections=[Bike]):
            await Bike.find(Bike.name == "Racer").delete()
            await Bike(name="Cruiser").insert()
            expect("the scope sees", await names(Bike), "Cruiser, Tourer")
            raise PaintError("out of paint")
    except PaintError as error:
        caught = error

    expect("what left the block", repr(caught), "PaintError('out of paint')")
    expect("the database holds, afterwards", await stored(database, Bike), "Racer, Tourer")


async def quiet_rollback(database: Any) -> None:
    heading("3. Rollback rolls back, and goes on after the block")

    async with with_session(collections=[Bike]):
        await Bike.find_all().delete()
        expect("the scope sees", await names(Bike), "nothing")
        raise Rollback

    expect("the database holds, afterwards", await stored(database, Bike), "Racer, Tourer")


async def gather(database: Any) -> None:
    heading("4. asyncio.gather inside one transaction")

    async with with_session(collections=[Bike]):
        await asyncio.gather(*(Bike(name=f"Folding bike {n}").insert() for n in range(100)))
        expect("the scope counts", f"{await Bike.count()} bikes", "102 bikes")
        raise Rollback

    expect("the database holds, rolled back", await stored(database, Bike), "Racer, Tourer")

    async with with_session(collections=[Bike]):
        await asyncio.gather(*(Bike(name=f"Folding bike {n}").insert() for n in range(100)))

    count = await database[Bike.get_collection_name()].count_documents({})
    expect("the database holds, committed", f"{count} bikes", "102 bikes")


async def cascade(database: Any) -> None:
    heading("5. Linked documents come along")

    async with with_session(collections=[Bike]):  # Wheel is linked from Bike: bound with it
        bike = Bike(name="Gravel bike", wheels=[Wheel(name="front"), Wheel(name="rear")])
        await bike.insert(link_rule=WriteRules.WRITE)
        expect("the scope sees", await names(Wheel), "front, rear")
        raise Rollback

    expect("the database holds, rolled back", await stored(database, Wheel), "nothing")

    async with with_session(collections=[Bike]):
        bike = Bike(name="Gravel bike", wheels=[Wheel(name="front"), Wheel(name="rear")])
        await bike.insert(link_rule=WriteRules.WRITE)

    expect("the database holds, committed", await stored(database, Wheel), "front, rear")


async def kept_outside(database: Any) -> None:
    heading("6. outside_session keeps a write whatever becomes of the transaction")

    async with with_session():  # every class that was initialised
        await Wheel.find_all().delete()
        with outside_session(LogEntry):
            await LogEntry(name="tried to delete the wheels").insert()
        expect("the scope sees", await names(Wheel), "nothing")
        raise Rollback

    expect("the database holds, rolled back", await stored(database, Wheel), "front, rear")
    log = await stored(database, LogEntry)
    expect("the database holds, kept", log, "tried to delete the wheels")


async def names(model: type[Any]) -> str:
    """What the class itself reads, in the scope that it is bound to."""
    return listed([document.name for document in await model.find_all().to_list()])


async def stored(database: Any, model: type[Any]) -> str:
    """What the database holds: read by the driver, on a connection outside any scope."""
    cursor = database[model.get_collection_name()].find()
    return listed([document["name"] async for document in cursor])


def listed(found: list[str]) -> str:
    return ", ".join(sorted(found)) or "nothing"


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def expect(what: str, actual: str, expected: str) -> None:
    print(f"  {what + ':':<34}{actual}")
    if actual != expected:
        raise AssertionError(f"{what}: {actual}; it should be: {expected}")


async def main() -> None:
    async with open_database(Bike, Wheel, LogEntry) as database:
        await commit(database)
        await rollback_by_an_exception(database)
        await quiet_rollback(database)
        await gather(database)
        await cascade(database)
        await kept_outside(database)
    print("\nAll as it should be.")


if __name__ == "__main__":
    asyncio.run(main())
