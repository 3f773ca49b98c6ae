"""G6, retried: every attempt finds the documents as the first one found them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import pytest_asyncio
from beanie import WriteRules
from labels import TRANSIENT
from memory_models import (
    EVERY,
    MODELS,
    Both,
    BothParent,
    Neither,
    Part,
    Previous,
    Rich,
    initialise,
    look,
    stored,
)
from pymongo.errors import OperationFailure
from wire import FailPoint, Wire, names

from beanie_session_scope import (
    TransactionTimeoutError,
    run_in_transaction,
    transaction_attempts,
    transactional,
    with_session,
)

ROUNDS = 30
COMMIT, WRITE = "commitTransaction", "findAndModify"
NO_SUCH_TRANSACTION, WRITE_CONFLICT = 251, 112


@pytest_asyncio.fixture(autouse=True)
async def _classes(database: Any) -> None:
    await initialise(database)


def at_once() -> float:
    """Stand for the jitter: no backoff."""
    return 0.0


async def add_one(document: Any) -> Any:
    document.n += 1
    await document.save()
    return document


class TestAnArgument:
    @pytest.mark.parametrize("model", EVERY)
    @pytest.mark.parametrize("fails", [COMMIT, WRITE])
    async def test_is_changed_once_in_three_attempts(
        self, client: Any, database: Any, wire: Wire, fail_point: FailPoint, model: Any, fails: str
    ) -> None:
        document = await model(n=1).insert()
        with fail_point(fails, error_code=NO_SUCH_TRANSACTION, times=2), wire.record() as seen:
            result = await run_in_transaction(
                add_one, document, client=client, collections=MODELS, jitter=at_once
            )
        assert names(seen).count(WRITE) == 3
        assert result is document
        assert document.n == (await stored(database, document))["n"] == 2

    async def test_of_a_decorated_function_or_method_is_changed_once(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        class Service:
            @transactional(collections=MODELS, jitter=at_once)
            async def add(self, *, to: Any) -> None:
                await add_one(to)

        document = await Both(n=1).insert()
        with fail_point(COMMIT, error_code=NO_SUCH_TRANSACTION, times=2):
            await Service().add(to=document)
        assert document.n == (await stored(database, document))["n"] == 2

    async def test_may_stand_in_lists_tuples_sets_and_dicts(
        self, client: Any, fail_point: FailPoint
    ) -> None:
        documents = [await Both(n=1).insert() for _ in range(3)]

        async def add(several: Any, more: Any) -> None:
            for each in (*several, *more["these"]):
                each.n += 1
                await each.replace()

        with fail_point(COMMIT, error_code=NO_SUCH_TRANSACTION, times=2):
            await run_in_transaction(
                add,
                documents[:1],
                {"these": tuple(documents[1:])},
                client=client,
                collections=MODELS,
                jitter=at_once,
            )
        assert [each.n for each in documents] == [2, 2, 2]

    async def test_may_be_any_value_however_it_refers_to_itself(self, client: Any) -> None:
        around: dict[str, Any] = {"document": Both(n=1)}
        around["again"] = [around]

        async def insert(values: dict[str, Any]) -> None:
            await values["document"].insert()

        await run_in_transaction(insert, around, client=client, collections=MODELS)
        assert around["document"].id is not None

    async def test_is_rewound_whole_though_only_a_part_was_written(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        document = await Rich(part=Part(marks=[1])).insert()
        held = document.part

        async def mark(document: Any) -> None:
            document.part.marks.append(len(document.part.marks) + 1)
            document._seen.append("here")
            await document.set({"n": document.n + 1})

        with fail_point(COMMIT, error_code=NO_SUCH_TRANSACTION, times=2):
            await run_in_transaction(
                mark, document, client=client, collections=MODELS, jitter=at_once
            )
        assert document.n == 1
        assert document._seen == ["here"]
        assert document.part is held

    async def test_brings_its_linked_documents_along(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        parent = BothParent(one=Both(n=1), many=[Both(n=1)])
        await parent.insert(link_rule=WriteRules.WRITE)

        async def add(parent: Any) -> None:
            parent.one.n += 1
            parent.many[0].n += 1
            parent.many.append(Both(n=1))
            await parent.save(link_rule=WriteRules.WRITE)

        with fail_point(COMMIT, error_code=NO_SUCH_TRANSACTION, times=2):
            await run_in_transaction(add, parent, client=client, collections=MODELS, jitter=at_once)
        assert (parent.one.n, [each.n for each in parent.many]) == (2, [2, 1])
        found = await stored(database, parent)
        assert [each.id for each in found["many"]] == [each.id for each in parent.many]
        assert await database["memory_both"].count_documents({}) == 3

    async def test_that_was_never_stored_is_inserted_once(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        async def insert(document: Any) -> Any:
            assert document.id is None
            return (await document.insert()).id

        document = Previous(n=1)
        with fail_point(COMMIT, error_code=NO_SUCH_TRANSACTION, times=2):
            result = await run_in_transaction(
                insert, document, client=client, collections=MODELS, jitter=at_once
            )
        assert result == document.id
        assert await database["memory_previous"].count_documents({}) == 1

    async def test_is_rewound_too_when_the_last_attempt_has_failed(
        self, client: Any, fail_point: FailPoint
    ) -> None:
        document = await Both(n=1).insert()
        before = look(document)
        with fail_point(COMMIT, error_code=NO_SUCH_TRANSACTION):
            with pytest.raises(TransactionTimeoutError):
                await run_in_transaction(
                    add_one, document, client=client, collections=MODELS, timeout=0.05
                )
        assert look(document) == before

    async def test_is_rewound_too_when_its_error_allows_no_retry(self, client: Any) -> None:
        async def fail(document: Any) -> None:
            document.n += 1
            raise KeyError

        document = Both(n=1)
        with pytest.raises(KeyError):
            await run_in_transaction(fail, document, client=client, collections=MODELS)
        assert document.n == 1

    async def test_of_a_call_that_joins_is_rewound_by_the_owner(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        document = await Both(n=1).insert()

        async def outer() -> None:
            await run_in_transaction(add_one, document, client=client, collections=MODELS)

        with fail_point(COMMIT, error_code=NO_SUCH_TRANSACTION, times=2):
            await run_in_transaction(outer, client=client, collections=MODELS, jitter=at_once)
        assert document.n == (await stored(database, document))["n"] == 2


class TestTracking:
    async def test_in_an_attempt_rewinds_what_was_not_passed(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        document, attempts = await Both(n=1).insert(), 0
        with fail_point(COMMIT, error_code=NO_SUCH_TRANSACTION, times=2):
            async for attempt in transaction_attempts(client, collections=MODELS, jitter=at_once):
                async with attempt:
                    attempts += 1
                    attempt.track(document)
                    await add_one(document)
        assert attempts == 3
        assert document.n == (await stored(database, document))["n"] == 2

    async def test_is_not_needed_for_what_the_writes_themselves_change(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        document, new = await Both(n=1).insert(), Both(n=1)
        with fail_point(COMMIT, error_code=NO_SUCH_TRANSACTION, times=2):
            async for attempt in transaction_attempts(client, collections=MODELS, jitter=at_once):
                async with attempt:
                    await document.inc({"n": 1})
                    await new.insert()
        assert document.n == (await stored(database, document))["n"] == 2
        assert await database["memory_both"].count_documents({}) == 2

    async def test_keeps_what_an_independent_scope_has_committed_meanwhile(
        self, client: Any, database: Any, fail_point: FailPoint
    ) -> None:
        """It is stored, attempt by attempt: to go back behind it would lose it in memory."""
        document = await Both(n=0).insert()

        async def count(document: Any) -> None:
            async with with_session(client, MODELS, propagation="requires_new"):
                await document.inc({"n": 1})
            await Neither().insert()
            raise_once()

        failures = [OperationFailure("conflict", WRITE_CONFLICT)] * 2
        for each in failures:
            each._add_error_label(TRANSIENT)

        def raise_once() -> None:
            if failures:
                raise failures.pop()

        await run_in_transaction(count, document, client=client, collections=MODELS, jitter=at_once)
        assert document.n == (await stored(database, document))["n"] == 3
        await document.replace()
        assert await database["memory_neither"].count_documents({}) == 1


@pytest.mark.parametrize("model", EVERY)
class TestLostUpdates:
    async def test_are_none_over_thirty_failed_commits_of_one_call(
        self, client: Any, database: Any, fail_point: FailPoint, model: Any
    ) -> None:
        document = await model(n=0).insert()
        with fail_point(COMMIT, error_code=NO_SUCH_TRANSACTION, times=ROUNDS):
            await run_in_transaction(
                add_one, document, client=client, collections=MODELS, jitter=at_once
            )
        assert document.n == (await stored(database, document))["n"] == 1

    async def test_are_none_over_thirty_calls_that_fail_once_each(
        self, client: Any, database: Any, fail_point: FailPoint, model: Any
    ) -> None:
        document = await model(n=0).insert()
        for number in range(ROUNDS):
            fails = (COMMIT, WRITE)[number % 2]
            code = (NO_SUCH_TRANSACTION, WRITE_CONFLICT)[number % 2]
            with fail_point(fails, error_code=code, times=1):
                await run_in_transaction(
                    add_one, document, client=client, collections=MODELS, jitter=at_once
                )
        assert document.n == (await stored(database, document))["n"] == ROUNDS

    async def test_are_none_under_real_conflicts(
        self, client: Any, database: Any, model: Any
    ) -> None:
        first = await model(n=0).insert()

        async def add() -> None:
            found = await model.get(first.id)
            assert found is not None
            await asyncio.sleep(0)
            await add_one(found)

        await asyncio.gather(
            *(run_in_transaction(add, client=client, collections=MODELS) for _ in range(6))
        )
        assert (await stored(database, first))["n"] == 6
