"""G4: whatever happens to the task, nothing is left open, bound, or half changed."""

from __future__ import annotations

import asyncio
import logging
import sys
from asyncio.runners import _cancel_all_tasks as cancel_all_tasks  # type: ignore[attr-defined]
from collections.abc import AsyncIterator, Collection, Coroutine
from itertools import count, filterfalse
from typing import Any

import pytest
from beanie import init_beanie
from clients import close
from models import Item, Linked
from pymongo import MongoClient
from pymongo.errors import OperationFailure
from stepping import Stepping, run
from wire import APP_NAME, DATABASE, ENDS, FailPoint, Wire, open_transactions

from beanie_session_scope import (
    Rollback,
    ScopeState,
    current_scope,
    on_abort,
    on_commit,
    run_in_transaction,
    transaction_attempts,
    with_session,
)
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.waiting import _background

LABELS = {"errorLabels": ["TransientTransactionError"]}
TRANSIENT = OperationFailure("try again", 112, LABELS)


class Program:
    """A block with several operations, hooks, nested scopes and a retry."""

    def __init__(self, client: Any, item: Item) -> None:
        self._client = client
        self.item = item
        self._attempts = 0
        self.committed = False
        self.sessions: list[Any] = []

    async def run(self) -> None:
        await run_in_transaction(self._attempt, self.item, client=self._client, collections=[Item])

    async def _attempt(self, item: Item) -> None:
        self._attempts += 1
        scope = current_scope()
        assert scope is not None
        self.sessions.append(scope.session)
        scope.before_commit(self._check)
        on_commit(self._after)
        on_abort(self._rolled_back)
        item.n += 1
        await item.save()
        async with with_session(client=self._client, collections=[Linked]):
            await Linked(name="joined").insert()
        async with with_session(
            client=self._client, collections=[Linked], propagation="requires_new"
        ) as session:
            self.sessions.append(session)
            await Linked(name="independent").insert()
        if self._attempts == 1:
            raise TRANSIENT
        await asyncio.gather(*(Item(name="new").insert() for _ in range(2)))
        async for _ in Item.find({"name": "new"}, batch_size=1):
            pass

    async def _check(self) -> None:
        assert await Item.find({"name": "new"}).count() == 2

    async def _after(self) -> None:
        await asyncio.sleep(0)
        assert current_scope() is None
        self.committed = True

    async def _rolled_back(self) -> None:
        await asyncio.sleep(0)
        assert current_scope() is None


BLOCK_MS = 40
"""How slow a slow server is; the cancellations come within that time."""

COMMANDS = (
    "abortTransaction",
    "aggregate",
    "commitTransaction",
    "find",
    "findAndModify",
    "getMore",
    "insert",
)


class Leaks:
    """Runs the program in a task, and looks for what it leaves behind."""

    def __init__(self, client: Any, database: Any, uri: str, wire: Wire) -> None:
        self._wire = wire
        self._client = client
        self._database = database
        self._uri = uri
        self.cases = 0

    async def after_suspension(self, at: int, times: int) -> int:
        """Cancel the program at one suspension, and at those after it; then check.

        Returns:
            How often it was suspended.
        """
        program = await self._program()
        stepping = Stepping(self._watched(program), at, times)
        tasks = asyncio.all_tasks()
        task = asyncio.ensure_future(run(stepping))
        await self._check(task, tasks, program, f"cancelled at {at}, {times} times")
        return stepping.suspensions

    async def after_command(self, at: int, times: int) -> int:
        """Cancel the program while the server works on one command; then check.

        Returns:
            How many commands it sent.
        """
        program = await self._program()
        tasks = asyncio.all_tasks()
        task = asyncio.ensure_future(self._watched(program))
        loop, commands = asyncio.get_running_loop(), count(1)

        def cancel(left: int) -> None:
            task.cancel()
            if left > 1:
                loop.call_later(BLOCK_MS / 4_000, cancel, left - 1)

        def started() -> None:
            if next(commands) == at:
                loop.call_soon_threadsafe(loop.call_later, BLOCK_MS / 4_000, cancel, times)

        self._wire.on_start = started
        await self._check(task, tasks, program, f"cancelled in command {at}, {times} times")
        return next(commands) - 1

    async def _program(self) -> Program:
        self._wire.on_start = lambda: None
        await self._database["item"].delete_many({})
        await self._database["linked"].delete_many({})
        return Program(self._client, await Item(name="old", n=5).insert())

    async def _check(
        self,
        task: asyncio.Future[Any],
        tasks: set[asyncio.Task[Any]],
        program: Program,
        case: str,
    ) -> None:
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        self._wire.on_start = lambda: None
        assert outcome is None or isinstance(outcome, asyncio.CancelledError), case
        assert open_transactions(self._uri) == 0, case
        assert all(session.has_ended for session in program.sessions), case
        # A slow transaction asks for its limit, in a task that ends by itself.
        if others := asyncio.all_tasks() - tasks:
            _, others = await asyncio.wait(others, timeout=1)
        assert not list(filterfalse(is_of_the_driver, others)), case
        await self._check_data(program.item, program, case)
        self.cases += 1

    @staticmethod
    async def _watched(program: Program) -> None:
        try:
            await program.run()
        finally:
            assert current_scope() is None
            assert (Item.get_session(), Linked.get_session()) == (None, None)

    async def _check_data(self, item: Item, program: Program, case: str) -> None:
        """All of the transaction is there or nothing of it, and memory says the same."""
        stored = await self._database["item"].find_one({"_id": item.id})
        news = await self._database["item"].count_documents({"name": "new"})
        joined = await self._database["linked"].count_documents({"name": "joined"})
        assert (stored["n"], news, joined) in ((5, 0, 0), (6, 2, 1)), case
        assert stored["n"] == 6 or not program.committed, case
        assert (item.n, item.is_changed) == (stored["n"], False), case


def is_of_the_driver(task: asyncio.Task[Any]) -> bool:
    """Tell whether a task belongs to the driver, which looks after its servers all the time."""
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and "pymongo" in code.co_filename


@pytest.fixture
def leaks(client: Any, database: Any, server_uri: str, wire: Wire) -> Leaks:
    return Leaks(client, database, server_uri, wire)


@pytest.mark.parametrize("times", [1, 2, 4])
class TestACancelledTask:
    async def test_leaves_nothing_at_any_of_its_suspensions(self, leaks: Leaks, times: int) -> None:
        suspensions = await leaks.after_suspension(0, times)
        for at in range(1, suspensions + 1):
            await leaks.after_suspension(at, times)
        print(f"{leaks.cases} suspensions, {times} cancellations each: 0 leaks")
        assert leaks.cases > 20

    @pytest.mark.slow
    async def test_leaves_nothing_where_the_server_is_slow_at_any_command(
        self, leaks: Leaks, times: int, fail_point: FailPoint
    ) -> None:
        commands = await leaks.after_command(0, times)
        with fail_point(*COMMANDS, block_ms=BLOCK_MS):
            for at in range(1, commands + 1):
                await leaks.after_command(at, times)
        print(f"{leaks.cases} slow commands, {times} cancellations each: 0 leaks")
        assert leaks.cases > 10


class TestTheShutdownOfTheLoop:
    """``asyncio.run`` cancels every task, those included that protect a clean-up."""

    @pytest.mark.slow
    def test_leaves_nothing_at_any_command(self, server_uri: str, fail_point: FailPoint) -> None:
        commands = shut_down_in_command(server_uri, 0)
        with fail_point(*COMMANDS, block_ms=BLOCK_MS):
            for at in range(1, commands + 1):
                shut_down_in_command(server_uri, at)
                assert open_transactions(server_uri) == 0, at
        print(f"{commands} commands, the loop shut down in each: 0 leaks")
        assert commands > 10

    @pytest.mark.slow
    def test_leaves_nothing_where_the_end_of_a_transaction_is_slow(
        self, server_uri: str, fail_point: FailPoint
    ) -> None:
        ends = shut_down_in_command(server_uri, 0, ENDS)
        with fail_point(*ENDS, block_ms=10 * BLOCK_MS):
            for at in range(1, ends + 1):
                shut_down_in_command(server_uri, at, ENDS)
                assert open_transactions(server_uri) == 0, at
        assert ends > 2


def shut_down_in_command(uri: str, at: int, among: Collection[str] = COMMANDS) -> int:
    """End the main task of a loop while another one works; return how many commands it sent.

    Both count only the commands with certain names.
    """
    wire, commands = Wire(), count(1)

    loop = asyncio.new_event_loop()

    async def connect() -> Any:
        return DRIVER.client_class(uri, event_listeners=[wire], appname=APP_NAME)

    async def main(client: Any) -> Program:
        await init_beanie(database=client[DATABASE], document_models=[Item, Linked])
        await Item.delete_all()
        await Linked.delete_all()
        program = Program(client, await Item(name="old", n=5).insert())
        reached = asyncio.Event()

        def started() -> None:
            if wire.last in among and next(commands) == at:
                loop.call_soon_threadsafe(loop.call_later, BLOCK_MS / 4_000, reached.set)

        wire.on_start = started
        task = asyncio.ensure_future(program.run())
        waiting = asyncio.ensure_future(reached.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return program

    client = loop.run_until_complete(connect())
    program = loop.run_until_complete(main(client))
    cancel_all_tasks(loop)  # what asyncio.run does, which would not let the client be closed
    loop.run_until_complete(close(client))
    loop.close()
    with MongoClient[Any](uri) as sync:
        stored = sync[DATABASE]["item"].find_one({"name": "old"})
        assert stored is not None
        news = sync[DATABASE]["item"].count_documents({"name": "new"})
        joined = sync[DATABASE]["linked"].count_documents({"name": "joined"})
    assert (stored["n"], news, joined) in ((5, 0, 0), (6, 2, 1)), at
    assert program.item.n == stored["n"], at
    assert all(session.has_ended for session in program.sessions), at
    return next(commands) - 1


class TestOtherWaysToBeCancelled:
    @pytest.fixture
    async def slow_block(self, client: Any, fail_point: FailPoint) -> AsyncIterator[SlowBlock]:
        with fail_point("insert", block_ms=200):
            yield SlowBlock(client)

    async def test_a_timeout(self, slow_block: SlowBlock, server_uri: str, database: Any) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(slow_block.run(), 0.05)
        await slow_block.check(server_uri, database)

    if sys.version_info >= (3, 11):  # with groups of tasks

        async def test_a_failing_sibling(
            self, slow_block: SlowBlock, server_uri: str, database: Any
        ) -> None:
            with pytest.raises(Exception, match="errors in a TaskGroup"):
                async with asyncio.TaskGroup() as group:
                    group.create_task(slow_block.run())
                    await asyncio.sleep(0.05)
                    raise KeyError
            await slow_block.check(server_uri, database)

    async def test_a_failing_sibling_inside_the_block(
        self, slow_block: SlowBlock, server_uri: str, database: Any
    ) -> None:
        async def fail() -> None:
            await asyncio.sleep(0.05)
            raise KeyError

        with pytest.raises(KeyError):
            await slow_block.run(fail())
        await slow_block.check(server_uri, database)


class SlowBlock:
    """A scope whose inserts take longer than they are waited for."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.item = Item()

    async def run(self, *siblings: Coroutine[Any, Any, None]) -> None:
        async with with_session(client=self._client, collections=[Item]):
            await asyncio.gather(self.item.insert(), Item().insert(), *siblings)

    async def check(self, uri: str, database: Any) -> None:
        assert open_transactions(uri) == 0
        assert await database["item"].count_documents({}) == 0
        assert self.item.id is None


class TestAServerThatDoesNotAnswer:
    """The wait for it is bounded."""

    @pytest.mark.parametrize("error", [KeyError, asyncio.CancelledError])
    async def test_is_left_to_the_background(
        self,
        client: Any,
        server_uri: str,
        database: Any,
        fail_point: FailPoint,
        caplog: pytest.LogCaptureFixture,
        error: type[BaseException],
    ) -> None:
        item = Item()
        caplog.set_level(logging.INFO, "beanie_session_scope")
        with fail_point("abortTransaction", block_ms=500, times=1):
            with pytest.raises(error):
                async with with_session(
                    client=client, collections=[Item], cleanup_timeout=0.1
                ) as session:
                    await item.insert()
                    raise error
            assert not session.has_ended
            assert (Item.get_session(), item.id) == (None, None)
            assert events(caplog) == ["background"]
            await asyncio.wait(_background)
        assert session.has_ended
        assert events(caplog) == ["background", "background.done"]
        assert open_transactions(server_uri) == 0
        assert await database["item"].count_documents({}) == 0

    async def test_is_waited_for_no_longer_by_a_task_that_is_cancelled_in_a_commit(
        self, client: Any, database: Any, fail_point: FailPoint, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def work() -> None:
            async with scope:
                await Item().insert()

        caplog.set_level(logging.INFO, "beanie_session_scope")
        scope = with_session(client=client, collections=[Item], cleanup_timeout=0.1)
        with fail_point("commitTransaction", block_ms=500, times=1):
            task = asyncio.ensure_future(work())
            while scope.state is not ScopeState.COMMITTING:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert scope.state is ScopeState.COMMITTING
            await asyncio.wait(_background)
        assert scope.state is ScopeState.COMMITTED
        assert scope.session.has_ended
        assert await database["item"].count_documents({}) == 1
        assert events(caplog) == ["background", "background.done"]

    async def test_lets_a_rollback_be_quiet_before_its_abort_could_begin(
        self, client: Any, server_uri: str, fail_point: FailPoint
    ) -> None:
        with fail_point("insert", block_ms=500, times=1):
            async with with_session(client=client, collections=[Item], cleanup_timeout=0.05):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(Item().insert(), 0.05)
                raise Rollback
            await asyncio.wait(_background)
        assert open_transactions(server_uri) == 0

    async def test_drops_the_hooks_of_an_attempt_that_was_run_again_meanwhile(
        self, client: Any, fail_point: FailPoint
    ) -> None:
        aborted: list[int] = []
        with fail_point("abortTransaction", block_ms=500, times=1):
            async for attempt in transaction_attempts(
                client, [Item], timeout=0.4, cleanup_timeout=0.05
            ):
                async with attempt:
                    on_abort(lambda number=attempt.number: aborted.append(number))  # type: ignore[misc]
                    if attempt.number == 1:
                        await Item.find_one()
                        raise TRANSIENT
            await asyncio.wait(_background)
        assert aborted == []

    async def test_is_no_time_for_another_attempt_on_the_same_session(
        self, client: Any, fail_point: FailPoint
    ) -> None:
        session = await DRIVER.start_session(client)
        with fail_point("abortTransaction", block_ms=500, times=1):
            with pytest.raises(OperationFailure, match="try again"):
                async for attempt in transaction_attempts(
                    collections=[Item], session=session, cleanup_timeout=0.05
                ):
                    async with attempt:
                        await Item.find_one()
                        raise TRANSIENT
            await asyncio.wait(_background)
        await session.end_session()

    async def test_leaves_documents_alone_that_are_in_use_again(
        self, client: Any, fail_point: FailPoint
    ) -> None:
        item = await Item(n=1).insert()
        with fail_point("abortTransaction", block_ms=300, times=1):
            with pytest.raises(KeyError):
                async with with_session(client=client, cleanup_timeout=0.05):
                    await item.set({Item.n: 2})
                    raise KeyError
            assert item.n == 1
            item.n = 3
            await asyncio.wait(_background)
        assert item.n == 3


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [getattr(record, "event", "") for record in caplog.records]
