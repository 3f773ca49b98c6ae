"""What is written to the logger ``beanie_session_scope``, at which level, and what never is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from clients import close
from labels import UNKNOWN
from models import Item, moved_to, scope_of
from pymongo import MongoClient
from pymongo.errors import DuplicateKeyError, PyMongoError
from wire import DATABASE, FailPoint, open_transactions

from beanie_session_scope import (
    CommitUnknownError,
    HookError,
    Rollback,
    ScopeClosedError,
    SessionScopeError,
    TransactionAbortedError,
    TransactionTimeoutError,
    run_in_transaction,
)
from beanie_session_scope import transaction as transaction_module
from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.mixin import GETTER

NAME = "beanie_session_scope"


class Log:
    """The records of the package's logger."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    @property
    def records(self) -> list[Any]:
        return [each for each in self._caplog.records if each.name == NAME]

    @property
    def events(self) -> list[str]:
        return [each.event for each in self.records]

    def one(self, event: str) -> Any:
        (record,) = (each for each in self.records if each.event == event)
        return record

    async def wait_for(self, event: str) -> Any:
        while event not in self.events:
            await asyncio.sleep(0.005)
        return self.one(event)

    def everything(self) -> str:
        """Return all that a handler could write of the records."""
        return "\n".join(f"{each.getMessage()} {vars(each)!r}" for each in self.records)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    caplog.set_level(logging.DEBUG, logger=NAME)
    return Log(caplog)


class TestATransaction:
    async def test_that_commits_is_logged_for_debugging_only(self, client: Any, log: Log) -> None:
        async with scope_of(client):
            await Item().insert()
            async with scope_of(client):
                await Item.find_one()
        assert log.events == ["begin", "committed"]
        assert {each.levelno for each in log.records} == {logging.DEBUG}

    async def test_is_logged_with_figures(self, client: Any, log: Log) -> None:
        async with (scope := scope_of(client)):
            document = await Item().insert()
            await document.set({"n": 1})
            await Item.find_one()
            scope.track(Item())
        record = log.one("committed")
        assert record.outcome == "committed"
        assert record.operations == 3
        assert record.documents == 2
        assert 0 < record.duration < 10
        assert "3 operations" in record.getMessage()

    async def test_that_aborts_is_logged_for_debugging_only(self, client: Any, log: Log) -> None:
        with pytest.raises(KeyError):
            async with scope_of(client):
                await Item().insert()
                raise KeyError("secret")
        assert log.events == ["begin", "aborted"]
        assert log.one("aborted").levelno == logging.DEBUG
        assert (log.one("aborted").outcome, log.one("aborted").operations) == ("aborted", 1)

    async def test_that_is_followed_by_another_is_logged_apart(self, client: Any, log: Log) -> None:
        async with (scope := scope_of(client)):
            await Item().insert()
            await Item().insert()
            await scope.commit()
            await Item().insert()
            await scope.abort()
        assert log.events == ["begin", "committed", "begin", "aborted", "begin", "committed"]
        ends = [each for each in log.records if each.event != "begin"]
        assert [each.operations for each in ends] == [2, 1, 0]
        assert [each.documents for each in ends] == [2, 1, 0]

    async def test_whose_outcome_is_unknown_is_a_warning(
        self, client: Any, log: Log, fail_point: FailPoint
    ) -> None:
        with fail_point("commitTransaction", error_code=64, labels=[UNKNOWN]):
            with pytest.raises(CommitUnknownError):
                async with scope_of(client, timeout=0.05):
                    await Item().insert()
        assert log.one("unknown").levelno == logging.WARNING
        assert log.one("unknown").documents == 1

    async def test_that_took_long_is_a_warning(
        self, client: Any, log: Log, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transaction_module, "SLOW", 0.01)
        async with scope_of(client):
            await Item().insert()
            await asyncio.sleep(0.02)
        record = log.one("committed")
        assert record.levelno == logging.WARNING
        assert record.duration >= 0.02

    async def test_that_comes_near_its_limit_is_a_warning(
        self, client: Any, log: Log, server_uri: str
    ) -> None:
        name = "transactionLifetimeLimitSeconds"
        with MongoClient[Any](server_uri) as admin:
            before = admin.admin.command("getParameter", 1, **{name: 1})[name]
            admin.admin.command("setParameter", 1, **{name: 1})
            try:
                async with scope_of(client):
                    await Item().insert()
                    record = await log.wait_for("transaction.expiring")
                    raise Rollback
            finally:
                admin.admin.command("setParameter", 1, **{name: before})
        assert record.levelno == logging.WARNING
        assert record.limit == 1
        assert 0.5 <= record.duration < 1.5

    async def test_without_a_transaction_is_logged_for_debugging_only(
        self, client: Any, log: Log
    ) -> None:
        async with scope_of(client, transaction=False):
            await Item().insert()
        assert log.events == ["begin"]
        assert "without a transaction" in log.one("begin").getMessage()


class TestARetry:
    async def test_of_the_whole_attempt_is_logged(
        self, client: Any, log: Log, fail_point: FailPoint
    ) -> None:
        async def work() -> None:
            await Item().insert()

        with fail_point("commitTransaction", error_code=251, times=2):
            await run_in_transaction(work, client=client, collections=[Item], jitter=lambda: 1.0)
        first, second = (each for each in log.records if each.event == "retry")
        assert (first.levelno, first.attempt, second.attempt) == (logging.INFO, 1, 2)
        assert first.label == "TransientTransactionError"
        assert first.error == "OperationFailure (code 251)"
        assert first.wait == pytest.approx(0.0075)
        assert second.wait == pytest.approx(0.01125)
        assert log.events == [
            *("begin", "aborted", "retry") * 2,
            "begin",
            "committed",
        ]

    async def test_that_is_no_longer_due_is_not_logged(
        self, client: Any, log: Log, fail_point: FailPoint
    ) -> None:
        async def work() -> None:
            await Item().insert()

        with fail_point("commitTransaction", error_code=251):
            with pytest.raises(TransactionTimeoutError, match="OperationFailure"):
                await run_in_transaction(work, client=client, collections=[Item], timeout=0.001)
        assert log.events.count("retry") == log.events.count("aborted") - 1

    async def test_of_a_commit_is_logged(
        self, client: Any, log: Log, fail_point: FailPoint
    ) -> None:
        with fail_point("commitTransaction", error_code=64, labels=[UNKNOWN], times=2):
            async with scope_of(client):
                await Item().insert()
        first, second = (each for each in log.records if each.event == "commit.retry")
        assert (first.levelno, first.attempt, second.attempt) == (logging.INFO, 1, 2)
        assert (first.label, first.error) == (UNKNOWN, "OperationFailure (code 64)")
        assert 0 <= first.wait <= 0.0075
        assert log.events == ["begin", "commit.retry", "commit.retry", "committed"]


class TestCleanUp:
    async def test_that_goes_on_in_the_background_is_logged(
        self, client: Any, log: Log, fail_point: FailPoint, server_uri: str
    ) -> None:
        with fail_point("abortTransaction", block_ms=200, times=1):
            async with scope_of(client, cleanup_timeout=0.05):
                await Item().insert()
                raise Rollback
            record = log.one("background")
            assert (record.levelno, record.waited) == (logging.WARNING, 0.05)
            done = await log.wait_for("background.done")
        assert done.levelno == logging.INFO
        assert open_transactions(server_uri) == 0

    async def test_that_failed_with_nobody_waiting_is_an_error(
        self, client: Any, log: Log, fail_point: FailPoint
    ) -> None:
        async def work() -> None:
            async with scope_of(client):
                await Item(name="secret").insert()
                committing.set()

        committing = asyncio.Event()
        with fail_point("commitTransaction", error_code=251, block_ms=100, times=1):
            task = asyncio.ensure_future(work())
            await committing.wait()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        record = log.one("cleanup.failed")
        assert record.levelno == logging.ERROR
        assert record.error == "OperationFailure (code 251)"
        assert record.exc_info is None, "a traceback would show the message"

    async def test_of_hooks_that_failed_is_an_error(self, client: Any, log: Log) -> None:
        def fail() -> None:
            raise ValueError("secret")

        with pytest.raises(KeyError):
            async with (scope := scope_of(client)):
                scope.on_abort(fail)
                raise KeyError("secret")
        record = log.one("hooks.failed")
        assert (record.levelno, record.errors) == (logging.ERROR, 1)
        assert "ValueError" in record.getMessage()
        assert "secret" not in log.everything()


class TestWhatIsNeverWritten:
    async def test_is_the_contents_of_documents(
        self, client: Any, log: Log, fail_point: FailPoint
    ) -> None:
        secret = "the contents"
        first = await Item(name=secret).insert()
        said: list[str] = []
        with pytest.raises(TransactionAbortedError) as aborted:
            async with scope_of(client):
                with pytest.raises(DuplicateKeyError) as duplicate:
                    await Item(id=first.id, name=secret).insert()
                with pytest.raises(TransactionAbortedError) as refused:
                    await Item.find_one(Item.name == secret)
        said += [str(aborted.value), str(refused.value)]
        with pytest.raises(HookError) as failed:
            async with (scope := scope_of(client)):
                error = duplicate.value
                scope.on_commit(lambda: (_ for _ in ()).throw(error))
        said.append(str(failed.value))
        with fail_point("commitTransaction", error_code=64, labels=[UNKNOWN]):
            with pytest.raises(CommitUnknownError) as unknown:
                async with scope_of(client, timeout=0.05):
                    await Item(name=secret).insert()
        said.append(str(unknown.value))
        assert str(first.id) in str(duplicate.value), "the driver's own message quotes it"
        for text in (*said, log.everything()):
            assert secret not in text
            assert str(first.id) not in text
            assert "dup key" not in text

    async def test_is_what_an_exception_of_the_user_says(
        self, client: Any, log: Log, fail_point: FailPoint
    ) -> None:
        class MyError(Exception):
            code = "secret code"

        def fail() -> None:
            raise MyError("secret")

        with pytest.raises(ScopeClosedError) as closed:
            with pytest.raises(MyError):
                async with (scope := scope_of(client)):
                    scope.on_abort(fail)
                    scope.before_commit(fail)
                    cursor = getattr(Item, GETTER)().find({})
            await cursor.next()
        assert "MyError" in str(closed.value)
        assert "secret" not in str(closed.value)
        assert log.events == ["begin", "aborted", "hooks.failed"]
        assert "secret" not in log.everything()

    async def test_is_where_the_server_is(
        self, client: Any, log: Log, fail_point: FailPoint, server_uri: str
    ) -> None:
        host = server_uri.split("//")[1].split("/")[0]

        async def work() -> None:
            await Item().insert()

        with fail_point("insert", close_connection=True, times=1):
            await run_in_transaction(work, client=client, collections=[Item])
        with fail_point("insert", close_connection=True):
            with pytest.raises(TransactionTimeoutError) as late:
                await run_in_transaction(work, client=client, collections=[Item], timeout=0.001)
        assert "retry" in log.events
        assert host in str(late.value.__cause__), "the driver's own message tells it"
        for text in (log.everything(), str(late.value), repr(scope_of(client))):
            assert host not in text
            assert "mongodb://" not in text

    async def test_is_a_password(self, client: Any, log: Log) -> None:
        async with unreachable("mongodb://user:password@127.0.0.1:1/") as elsewhere:
            with pytest.raises(PyMongoError):
                async with (scope := scope_of(elsewhere)):
                    await Item().insert()
            with pytest.raises(SessionScopeError) as mismatch:
                async with scope_of(client):
                    pytest.fail("the body ran")
        for text in (log.everything(), str(mismatch.value), repr(scope)):
            assert "password" not in text
            assert "127.0.0.1" not in text


@asynccontextmanager
async def unreachable(uri: str) -> AsyncIterator[Any]:
    """Let the class use a client that reaches no server."""
    elsewhere = DRIVER.client_class(uri, serverSelectionTimeoutMS=50)
    try:
        with moved_to(elsewhere[DATABASE]["item"]):
            yield elsewhere
    finally:
        await close(elsewhere)


class TestTheLogger:
    async def test_costs_no_record_where_nobody_listens(
        self, client: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger=NAME)
        async with scope_of(client):
            await Item().insert()
        assert [each for each in caplog.records if each.name == NAME] == []

    async def test_names_the_function_that_wrote_and_not_the_one_that_hands_on(
        self, client: Any, log: Log
    ) -> None:
        async with scope_of(client):
            await Item().insert()
        assert {each.filename for each in log.records} == {"transaction.py"}
