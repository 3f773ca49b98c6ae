"""The three forms that run a transaction again, as their users see them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from conflicts import Conflicts, Late
from forms import FORMS, Form
from labels import TRANSIENT, labelled
from models import Holder, Item, Linked, Plain, stored_n
from pymongo.errors import OperationFailure, PyMongoError
from wire import FailPoint, Wire, names

from beanie_session_scope import (
    ClientMismatchError,
    ModelNotScopedError,
    NotAClientError,
    PropagationError,
    Rollback,
    ScopeReusedError,
    ScopeState,
    TransactionTimeoutError,
    on_abort,
    run_in_transaction,
    transaction_attempts,
    with_session,
)
from beanie_session_scope.drivers import DRIVER


@pytest.mark.parametrize("form", FORMS)
class TestTheResult:
    async def test_is_that_of_the_last_call(self, client: Any, database: Any, form: Form) -> None:
        conflict = Conflicts()

        async def work(first: str, second: str) -> tuple[str, str, int]:
            await Item(name=first).insert()
            conflict()
            return first, second, conflict.calls

        assert await form(work, "a", "b") == ("a", "b", 3)
        assert await database["item"].count_documents({}) == 1

    async def test_is_none_after_a_rollback(self, client: Any, database: Any, form: Form) -> None:
        conflict = Conflicts()

        async def work() -> None:
            await Item().insert()
            conflict()
            raise Rollback

        assert await form(work) is None
        assert conflict.calls == 3
        assert await database["item"].count_documents({}) == 0

    async def test_is_not_that_of_an_attempt_whose_commit_failed(
        self, client: Any, form: Form, fail_point: FailPoint
    ) -> None:
        conflict = Conflicts(times=0)

        async def work() -> str:
            await Item().insert()
            conflict()
            if conflict.calls == 2:
                raise Rollback
            return "not committed"

        with fail_point("commitTransaction", error_code=112, times=1):
            assert await form(work) is None
        assert conflict.calls == 2


class TestDocuments:
    """What is passed in, or tracked, is rewound whole before each new attempt."""

    @pytest.mark.parametrize("failing", ["callback", "insert", "commitTransaction"])
    @pytest.mark.parametrize("form", FORMS[:2])
    async def test_that_are_arguments_are_changed_once(
        self, client: Any, database: Any, form: Form, fail_point: FailPoint, failing: str
    ) -> None:
        conflict = Conflicts(times=2 if failing == "callback" else 0)

        async def work(document: Item) -> None:
            conflict()
            document.n += 1
            document.name += "!"
            await document.save()
            await Item().insert()

        document = await Item().insert()
        with fail_point(failing, error_code=112, times=2):
            await form(work, document)
        assert conflict.calls == 3
        assert (document.n, document.name) == (1, "new!")
        assert await stored_n(database, document) == 1

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda document: [document],
            lambda document: (1, document),
            lambda document: {"item": document},
            lambda document: [{"items": [document]}],
        ],
        ids=["list", "tuple", "dict", "nested"],
    )
    @pytest.mark.parametrize("form", FORMS[:2])
    async def test_are_found_in_containers(
        self, client: Any, database: Any, form: Form, wrap: Callable[[Item], Any]
    ) -> None:
        conflict = Conflicts()
        document = await Item().insert()

        async def work(_: Any) -> None:
            document.n += 1
            await document.save()
            conflict()

        await form(work, wrap(document))
        assert (conflict.calls, document.n, await stored_n(database, document)) == (3, 1, 1)

    async def test_that_are_tracked_are_changed_once(self, client: Any, database: Any) -> None:
        conflict = Conflicts()
        document = await Item().insert()
        async for attempt in transaction_attempts(collections=[Item]):
            async with attempt:
                attempt.track(document)
                document.n += 1
                await document.save()
                conflict()
        assert (conflict.calls, document.n, await stored_n(database, document)) == (3, 1, 1)

    @pytest.mark.parametrize("form", FORMS[:2])
    async def test_that_are_linked_from_those_are_changed_once(
        self, client: Any, database: Any, form: Form
    ) -> None:
        conflict = Conflicts()
        linked = await Linked().insert()
        holder = await Holder(one=linked).insert()  # type: ignore[arg-type]

        async def work(holder: Holder) -> None:
            holder.one.n += 1  # type: ignore[union-attr]
            await holder.one.save()  # type: ignore[union-attr]
            conflict()

        await form(work, holder, collections=[Holder])
        assert (conflict.calls, linked.n, await stored_n(database, linked)) == (3, 1, 1)

    @pytest.mark.parametrize("form", FORMS[:2])
    async def test_are_rewound_where_the_callback_ended_the_transaction_itself(
        self, client: Any, database: Any, form: Form, fail_point: FailPoint
    ) -> None:
        calls = []

        async def work(document: Item) -> None:
            calls.append(document.n)
            document.n += 1
            await document.save()
            await Item.get_session().commit_transaction()

        document = await Item().insert()
        with fail_point("commitTransaction", error_code=112, times=2):
            await form(work, document)
        assert calls == [0, 0, 0]
        assert (document.n, await stored_n(database, document)) == (1, 1)

    @pytest.mark.parametrize("form", FORMS[:2])
    async def test_are_what_they_were_when_the_last_attempt_has_failed(
        self, client: Any, database: Any, form: Form
    ) -> None:
        async def work(document: Item) -> None:
            document.n += 1
            await document.save()
            raise labelled(TRANSIENT)

        document = await Item().insert()
        with pytest.raises(TransactionTimeoutError):
            await form(work, document, clock=Late())
        assert (document.n, await stored_n(database, document)) == (0, 0)

    @pytest.mark.parametrize("form", FORMS[:2])
    async def test_of_a_joined_form_are_rewound_by_the_owner(
        self, client: Any, database: Any, form: Form
    ) -> None:
        conflict = Conflicts()

        async def add(document: Item) -> None:
            document.n += 1
            await document.save()
            conflict()

        document = await Item().insert()
        async for attempt in transaction_attempts(collections=[Item]):
            async with attempt:
                await form(add, document)
        assert (conflict.calls, document.n, await stored_n(database, document)) == (3, 1, 1)


@pytest.mark.parametrize("form", FORMS)
class TestInsideAnOpenScope:
    async def test_joins_it(self, client: Any, wire: Wire, form: Form) -> None:
        async def work() -> Any:
            await Item().insert()
            return Item.get_session()

        with wire.record() as seen:
            async with with_session(collections=[Item]) as session:
                assert await form(work) is session
                assert await form(work) is session
        assert names(seen) == ["insert", "insert", "commitTransaction"]

    @pytest.mark.parametrize("late", [False, True])
    async def test_retries_nothing_and_changes_no_error(
        self, client: Any, form: Form, late: bool
    ) -> None:
        conflict, raised = Conflicts(times=0), labelled(TRANSIENT)

        async def work() -> None:
            conflict()
            raise raised

        with pytest.raises(PyMongoError) as caught:
            async with with_session(collections=[Item]):
                await form(work, **({"clock": Late()} if late else {}))
        assert caught.value is raised
        assert conflict.calls == 1

    async def test_is_retried_by_the_owner(self, client: Any, database: Any, form: Form) -> None:
        inner, outer = Conflicts(), Conflicts(times=0)

        async def work() -> None:
            await Item().insert()
            inner()

        async def owner() -> None:
            outer()
            await Item().insert()
            await form(work)

        await form(owner)
        assert (inner.calls, outer.calls) == (3, 3)
        assert await database["item"].count_documents({}) == 2

    async def test_is_retried_by_the_owner_though_that_one_has_caught_the_error(
        self, client: Any, database: Any, form: Form, fail_point: FailPoint
    ) -> None:
        outer = Conflicts(times=0)

        async def owner() -> None:
            outer()
            try:
                await form(Item().insert)
            except OperationFailure:
                await asyncio.sleep(0)

        with fail_point("insert", error_code=112, times=1):
            await form(owner)
        assert outer.calls == 2
        assert await database["item"].count_documents({}) == 1

    async def test_rolls_all_of_it_back_quietly(
        self, client: Any, database: Any, form: Form
    ) -> None:
        async def work() -> None:
            await Item().insert()
            raise Rollback

        async def owner() -> str:
            await Item().insert()
            await form(work)
            return "went on"

        assert await form(owner) is None
        assert await database["item"].count_documents({}) == 0

    async def test_asks_what_propagation_says(self, client: Any, form: Form) -> None:
        async def work() -> None:
            pytest.fail("the body ran")

        with pytest.raises(PropagationError, match="mandatory"):
            await form(work, propagation="mandatory")
        async with with_session(collections=[Item]):
            with pytest.raises(PropagationError, match="never"):
                await form(work, propagation="never")


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2]])
class TestAGivenSession:
    async def test_is_used_by_each_attempt_and_not_ended(
        self, client: Any, wire: Wire, database: Any, form: Form
    ) -> None:
        conflict = Conflicts()
        session = await DRIVER.start_session(client)

        async def work() -> None:
            assert Item.get_session() is session
            await Item().insert()
            conflict()

        with wire.record() as seen:
            await form(work, session=session)
            await form(work, session=session)
        assert {bytes(e.command["lsid"]["id"]) for e in seen} == {bytes(session.session_id["id"])}
        assert names(seen) == [
            *["insert", "abortTransaction"] * 2,
            *["insert", "commitTransaction"] * 2,
        ]
        assert not session.has_ended and not session.in_transaction
        await session.end_session()

    async def test_in_a_transaction_is_refused_and_left_alone(
        self, client: Any, wire: Wire, form: Form
    ) -> None:
        session = await DRIVER.start_session(client)
        await DRIVER.start_transaction(session)
        with wire.record() as seen, pytest.raises(PropagationError, match="in a transaction"):
            await form(self._fail, session=session)
        assert seen == []
        assert session.in_transaction
        await session.end_session()

    async def test_of_another_client_is_refused(
        self, client: Any, other_client: Any, wire: Wire, form: Form
    ) -> None:
        session = await DRIVER.start_session(other_client)
        with wire.record() as seen:
            with pytest.raises(ClientMismatchError, match="session="):
                await form(self._fail, session=session, client=client)
            with pytest.raises(ClientMismatchError, match="Item"):
                await form(self._fail, session=session)
        assert seen == []
        await session.end_session()

    async def test_beside_an_open_scope_is_refused(self, client: Any, form: Form) -> None:
        session = await DRIVER.start_session(client)
        async with with_session(collections=[Item]):
            with pytest.raises(PropagationError, match="session="):
                await form(self._fail, session=session)
        await session.end_session()

    async def test_of_the_open_scope_joins_that_one(
        self, client: Any, wire: Wire, form: Form
    ) -> None:
        async def work() -> None:
            await Item().insert()

        with wire.record() as seen:
            async with with_session(collections=[Item]) as session:
                await form(work, session=session)
        assert names(seen) == ["insert", "commitTransaction"]

    @pytest.mark.parametrize("wanted", [True, False])
    async def test_has_its_causal_consistency_already(
        self, client: Any, form: Form, wanted: bool
    ) -> None:
        """To take the option, and do nothing about it, would be quietly wrong."""
        session = await DRIVER.start_session(client, causal_consistency=not wanted)
        with pytest.raises(ValueError, match="causal_consistency"):
            await form(self._fail, session=session, causal_consistency=wanted)
        await session.end_session()

    async def test_that_is_none_of_the_driver_is_refused(self, client: Any, form: Form) -> None:
        with pytest.raises(NotAClientError, match="session"):
            await form(self._fail, session="session")

    async def _fail(self) -> None:
        pytest.fail("the body ran")


class TestTheLoop:
    async def test_numbers_its_attempts(self, client: Any) -> None:
        conflict = Conflicts()
        numbers = []
        async for attempt in transaction_attempts(collections=[Item]):
            numbers.append(attempt.number)
            async with attempt as session:
                assert Item.get_session() is session
                conflict()
        assert numbers == [1, 2, 3]
        assert attempt.state is ScopeState.COMMITTED

    async def test_refuses_to_go_on_when_an_attempt_was_not_entered(self, client: Any) -> None:
        with pytest.raises(RuntimeError, match="async with attempt"):
            async for _ in transaction_attempts(collections=[Item]):
                pass

    async def test_may_be_left_by_break(self, client: Any, database: Any) -> None:
        async for attempt in transaction_attempts(collections=[Item]):
            async with attempt:
                await Item().insert()
                break
        assert attempt.state is ScopeState.COMMITTED
        assert await database["item"].count_documents({}) == 1

    async def test_is_over_when_the_wait_for_its_next_attempt_was_cancelled(
        self, client: Any
    ) -> None:
        """The hooks of the abort have run then, and must not run once more."""
        attempts = transaction_attempts(collections=[Item], jitter=lambda: 1.0)
        aborted: list[int] = []
        async with await attempts.__anext__() as session:
            assert session.in_transaction
            on_abort(lambda: aborted.append(1))
            raise labelled(TRANSIENT)
        waiting = asyncio.ensure_future(attempts.__anext__())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(StopAsyncIteration):
            await attempts.__anext__()
        assert aborted == [1]

    async def test_may_be_left_by_return(self, client: Any, database: Any) -> None:
        conflict = Conflicts()

        async def work() -> str:
            async for attempt in transaction_attempts(collections=[Item]):
                async with attempt:
                    await Item().insert()
                    conflict()
                    return "done"
            raise AssertionError("not reached")

        assert await work() == "done"
        assert await database["item"].count_documents({}) == 1

    async def test_ends_after_an_attempt_that_continue_has_left(
        self, client: Any, database: Any
    ) -> None:
        async for attempt in transaction_attempts(collections=[Item]):
            async with attempt:
                await Item().insert()
                continue
        assert await database["item"].count_documents({}) == 1

    async def test_enters_each_attempt_once(self, client: Any, database: Any) -> None:
        async for attempt in transaction_attempts(collections=[Item]):
            async with attempt:
                await Item().insert()
            with pytest.raises(ScopeReusedError):
                async with attempt:
                    pytest.fail("the body ran")
        assert await database["item"].count_documents({}) == 1

    async def test_runs_once(self, client: Any) -> None:
        """A second loop over the same attempts would do nothing, and seem to have worked."""
        attempts = transaction_attempts(collections=[Item])
        async for attempt in attempts:
            async with attempt:
                pass
        with pytest.raises(ScopeReusedError):
            async for _ in attempts:
                pytest.fail("the body ran")

    async def test_tells_of_an_attempt_that_it_has_failed(self, client: Any) -> None:
        conflict = Conflicts(times=1)
        states = []
        async for attempt in transaction_attempts(collections=[Item]):
            async with attempt:
                conflict()
            states.append(attempt.state)
        assert states == [ScopeState.ABORTED, ScopeState.COMMITTED]


@pytest.mark.parametrize("form", FORMS)
class TestBadInput:
    """Is refused before anything is sent."""

    @pytest.mark.parametrize(
        ("error", "options"),
        [
            (ValueError, {"transaction": False}),
            (ValueError, {"snapshot": True}),
            (ValueError, {"timeout": 0}),
            (ValueError, {"timeout": -1}),
            (ValueError, {"timeout": float("nan")}),
            (ValueError, {"timeout": None}),
            (ValueError, {"propagation": "nested"}),
            (TypeError, {"no_such_option": 1}),
            (NotAClientError, {"client": 1}),
            (ModelNotScopedError, {"collections": Item}),
            (ModelNotScopedError, {"collections": [Plain]}),
            (ModelNotScopedError, {"collections": "item"}),
            (ModelNotScopedError, {"collections": [1]}),
        ],
        ids=lambda value: None if isinstance(value, type) else repr(value),
    )
    async def test_of_an_option(
        self, client: Any, wire: Wire, form: Form, error: type[Exception], options: dict[str, Any]
    ) -> None:
        async def work() -> None:
            pytest.fail("the body ran")

        with wire.record() as seen, pytest.raises(error):
            await form(work, **options)
        assert seen == []


class TestAFunctionThatIsNone:
    @pytest.mark.parametrize("fn", [None, 1, "work"])
    async def test_is_refused(self, client: Any, wire: Wire, fn: Any) -> None:
        with wire.record() as seen, pytest.raises(TypeError, match="function"):
            await run_in_transaction(fn, collections=[Item])
        assert seen == []

    async def test_is_refused_where_it_is_a_coroutine(self, client: Any) -> None:
        async def work() -> None:
            """Not called by the test, but before it."""

        coroutine = work()
        with pytest.raises(TypeError, match="the function itself"):
            await run_in_transaction(coroutine, collections=[Item])  # type: ignore[arg-type]
        coroutine.close()

    async def test_is_refused_where_it_is_no_coroutine_function(
        self, client: Any, wire: Wire
    ) -> None:
        with wire.record() as seen, pytest.raises(TypeError, match="async def"):
            await run_in_transaction(lambda: 1, collections=[Item])  # type: ignore[arg-type, return-value]
        assert seen == []

    async def test_may_be_any_callable_that_returns_an_awaitable(self, client: Any) -> None:
        async def work(number: int) -> int:
            return number

        assert await run_in_transaction(lambda: work(1), collections=[Item]) == 1
