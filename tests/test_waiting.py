"""Waiting for what must come to its end, while the waiting task is cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from beanie_session_scope.log import nameof
from beanie_session_scope.waiting import Uncancelled, settle


async def wait(future: asyncio.Future[Any]) -> Any:
    return await Uncancelled(future)


@pytest.fixture
async def future() -> asyncio.Future[str]:
    return asyncio.get_running_loop().create_future()


class TestUncancelled:
    async def test_gives_the_result(self, future: asyncio.Future[str]) -> None:
        task = asyncio.ensure_future(wait(future))
        await asyncio.sleep(0)
        future.set_result("done")
        assert await task == "done"
        assert await Uncancelled(future) == "done"

    async def test_raises_the_error(self, future: asyncio.Future[str]) -> None:
        task = asyncio.ensure_future(wait(future))
        await asyncio.sleep(0)
        future.set_exception(KeyError("mine"))
        with pytest.raises(KeyError, match="mine"):
            await task

    async def test_is_left_by_a_cancellation_at_once_and_the_future_goes_on(
        self, future: asyncio.Future[str]
    ) -> None:
        task = asyncio.ensure_future(wait(future))
        await asyncio.sleep(0)
        task.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not future.done()
        future.set_result("done")
        await asyncio.sleep(0)

    async def test_wakes_the_task_once_however_often_it_is_cancelled_in_one_turn(
        self, future: asyncio.Future[str]
    ) -> None:
        reported: list[object] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context))
        task = asyncio.ensure_future(wait(future))
        await asyncio.sleep(0)
        for _ in range(3):
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert reported == []

    async def test_takes_a_cancellation_in_the_turn_in_which_the_future_ends(
        self, future: asyncio.Future[str]
    ) -> None:
        task = asyncio.ensure_future(wait(future))
        await asyncio.sleep(0)
        future.set_result("done")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_takes_a_cancellation_that_came_before_it_began(
        self, future: asyncio.Future[str]
    ) -> None:
        async def wait_later() -> Any:
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            return await Uncancelled(future)

        task = asyncio.ensure_future(wait_later())
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not future.done()

    async def test_is_a_future_to_asyncio(self, future: asyncio.Future[str]) -> None:
        assert asyncio.isfuture(Uncancelled(future))

    async def test_works_with_a_timeout(self, future: asyncio.Future[str]) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(wait(future), 0.01)
        assert not future.done()


class TestSettle:
    async def test_comes_to_the_end_however_often_it_is_cancelled(
        self, future: asyncio.Future[str]
    ) -> None:
        task = asyncio.ensure_future(settle(future))
        for _ in range(4):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        future.set_result("done")
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_raises_the_error_of_the_work(self, future: asyncio.Future[str]) -> None:
        task = asyncio.ensure_future(settle(future))
        await asyncio.sleep(0)
        future.set_exception(KeyError())
        with pytest.raises(KeyError):
            await task

    async def test_names_an_error_that_nobody_waits_for_without_its_message(
        self, future: asyncio.Future[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        task = asyncio.ensure_future(settle(future))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        future.set_exception(KeyError("secret"))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert "KeyError" in caplog.text
        assert "secret" not in caplog.text

    async def test_ends_when_the_work_itself_is_cancelled(
        self, future: asyncio.Future[str]
    ) -> None:
        task = asyncio.ensure_future(settle(future))
        await asyncio.sleep(0)
        future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_an_error_is_named_by_its_class_and_code() -> None:
    from pymongo.errors import OperationFailure

    assert nameof(OperationFailure("secret", 112)) == "OperationFailure (code 112)"
    assert nameof(ValueError("secret")) == "ValueError"
