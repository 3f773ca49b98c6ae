"""Aborts that the driver could not send, and keeps quiet about: no transaction stays open."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from models import Item
from wire import FailPoint, Wire, names, open_transactions

from beanie_session_scope import transaction_attempts, with_session
from beanie_session_scope.drivers import DRIVER

pytestmark = pytest.mark.timeout(60)


def sent(seen: list[Any]) -> list[str]:
    """Return the commands, but for the one that asks how long a slow transaction may live."""
    return [name for name in names(seen) if name != "getParameter"]


class TestALostAbort:
    @pytest.mark.parametrize("times", [1, 2, 3])
    async def test_leaves_no_transaction_open(
        self, client: Any, server_uri: str, fail_point: FailPoint, wire: Wire, times: int
    ) -> None:
        with fail_point("abortTransaction", times=times, close_connection=True):
            with wire.record() as seen, pytest.raises(KeyError):
                async with with_session(client=client, collections=[Item]):
                    await Item().insert()
                    raise KeyError

        # The driver itself tries twice.
        killed = ["killSessions"] if times > 1 else []
        assert sent(seen) == ["insert", "abortTransaction", "abortTransaction", *killed]
        assert open_transactions(server_uri) == 0

    async def test_is_followed_up_until_there_is_a_connection(
        self, client: Any, server_uri: str, fail_point: FailPoint, wire: Wire
    ) -> None:
        both = ("abortTransaction", "killSessions")
        with fail_point(*both, times=5, close_connection=True):
            with wire.record() as seen, pytest.raises(KeyError):
                async with with_session(client=client, collections=[Item]):
                    await Item().insert()
                    raise KeyError

        assert sent(seen)[-4:] == ["killSessions"] * 4
        assert open_transactions(server_uri) == 0

    async def test_that_is_followed_up_in_the_background_leaves_later_transactions_alone(
        self, client: Any, fail_point: FailPoint, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "beanie_session_scope")
        session = await DRIVER.start_session(client)
        with fail_point("abortTransaction", "killSessions", times=20, close_connection=True):
            with pytest.raises(KeyError):
                async for attempt in transaction_attempts(
                    collections=[Item], session=session, cleanup_timeout=1.75
                ):
                    async with attempt:
                        await Item().insert()
                        raise KeyError
            while session.in_transaction:
                await asyncio.sleep(0.001)
            await DRIVER.start_transaction(session)
            while "background.done" not in [getattr(each, "event", "") for each in caplog.records]:
                await asyncio.sleep(0.01)

        assert session.in_transaction
        await session.abort_transaction()
        await session.end_session()


class TestALostConnection:
    async def test_makes_many_aborts_fail_and_leaves_no_transaction_open(
        self, client: Any, server_uri: str, fail_point: FailPoint
    ) -> None:
        """PyMongo pauses its pool then, and sends nothing for a moment."""
        items = await asyncio.gather(*(Item(n=n).insert() for n in range(20)))

        async def change(number: int) -> None:
            async for attempt in transaction_attempts(collections=[Item], timeout=20):
                async with attempt:
                    await Item.get(items[number].id)
                    await Item.find_all().to_list()
                    await Item.find_one(Item.id == items[number % 20].id).set({"name": "x"})

        with fail_point("update", times=10, close_connection=True):
            await asyncio.gather(*(change(number) for number in range(20) for _ in range(8)))

        assert open_transactions(server_uri) == 0
