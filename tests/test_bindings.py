"""G8: after a block, every binding is what it was before it, in whichever context."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import sys
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from models import Item, Leaf, Linked, Root, Sibling, Unlisted

from beanie_session_scope import (
    Rollback,
    ScopeClosedError,
    ScopeState,
    UnexpectedRollbackError,
    bind_session,
    current_scope,
    is_outside,
    outside_session,
    with_session,
)
from beanie_session_scope.drivers import DRIVER


@pytest.fixture
async def session(client: Any) -> AsyncIterator[Any]:
    session = await DRIVER.start_session(client)
    yield session
    await session.end_session()


class TestSetSession:
    async def test_binds_the_class_until_it_is_cleared(self, session: Any) -> None:
        Item.set_session(session)
        assert Item.get_session() is session

        Item.clear_session()
        assert Item.get_session() is None

    async def test_runs_the_operations_of_the_class_in_the_session(
        self, session: Any, wire: Any
    ) -> None:
        token = Item.set_session(session)
        with wire.record() as seen:
            await Item.find_one()
        Item.clear_session(token)
        assert seen[0].command["lsid"] == session.session_id

    async def test_with_a_token_restores_what_was_bound_before(
        self, client: Any, session: Any
    ) -> None:
        other = await DRIVER.start_session(client)
        Item.set_session(session)
        token = Item.set_session(other)
        assert Item.get_session() is other

        Item.clear_session(token)
        assert Item.get_session() is session
        Item.clear_session()
        await other.end_session()

    async def test_is_undone_in_any_order(self, client: Any, session: Any) -> None:
        sessions = [session, *[await DRIVER.start_session(client) for _ in range(2)]]
        for order in itertools.permutations(range(3)):
            tokens = [Item.set_session(each) for each in sessions]
            for place in order:
                Item.clear_session(tokens[place])
            assert Item.get_session() is None, order
        for other in sessions[1:]:
            await other.end_session()

    async def test_binds_subclasses_too(self, session: Any) -> None:
        token = Root.set_session(session)
        assert Leaf.get_session() is session
        assert Item.get_session() is None
        Root.clear_session(token)
        assert Leaf.get_session() is None

    async def test_of_the_nearest_class_wins(self, client: Any, session: Any) -> None:
        other = await DRIVER.start_session(client)
        Leaf.set_session(other)
        Root.set_session(session)
        assert Leaf.get_session() is other
        assert Sibling.get_session() is session

        Leaf.clear_session()
        assert Leaf.get_session() is None, "cleared means without a session, parent or not"
        Root.clear_session()
        await other.end_session()

    async def test_clearing_leaves_nothing_behind_for_a_later_binding(self, session: Any) -> None:
        Leaf.set_session(session)
        Leaf.clear_session()
        Root.set_session(session)
        assert Leaf.get_session() is session
        Root.clear_session()

    async def test_a_token_clears_once(self, session: Any) -> None:
        token = Item.set_session(session)
        Item.clear_session(token)
        with pytest.raises(RuntimeError, match="used already"):
            Item.clear_session(token)

    async def test_a_token_clears_only_its_own_class(self, session: Any) -> None:
        token = Item.set_session(session)
        with pytest.raises(ValueError, match="Linked"):
            Linked.clear_session(token)
        assert Item.get_session() is session
        Item.clear_session(token)

    async def test_a_token_shows_its_class_and_nothing_else(self, session: Any) -> None:
        token = Item.set_session(session)
        assert repr(token) == "<Token of Item>"
        Item.clear_session(token)

    async def test_in_a_task_stays_in_that_task(self, session: Any) -> None:
        async def bind() -> None:
            Item.set_session(session)

        await asyncio.ensure_future(bind())
        assert Item.get_session() is None

    async def test_is_inherited_by_tasks_and_outlives_its_clearing_there(
        self, session: Any
    ) -> None:
        go_on = asyncio.Event()

        async def look() -> Any:
            await go_on.wait()
            return Item.get_session()

        token = Item.set_session(session)
        task = asyncio.ensure_future(look())
        Item.clear_session(token)
        go_on.set()
        assert await task is session

    async def test_keeps_no_session_that_was_bound_over(self, client: Any) -> None:
        """A worker that binds one session after the other, and never clears."""
        for _ in range(50):
            session = await DRIVER.start_session(client)
            Item.set_session(session)
            await session.end_session()
        binding = Item._scope_variable.get()
        assert binding is not None
        assert binding.previous is None
        Item.clear_session()


@asynccontextmanager
async def by_hand(client: Any) -> AsyncIterator[None]:
    session = await DRIVER.start_session(client)
    token = Item.set_session(session)
    try:
        yield
    finally:
        Item.clear_session(token)
        await session.end_session()


@asynccontextmanager
async def by_hand_and_forgotten(client: Any) -> AsyncIterator[None]:
    session = await DRIVER.start_session(client)
    async with with_session(client=client, collections=[Item], propagation="requires_new"):
        Item.set_session(session)
        yield
    await session.end_session()


@asynccontextmanager
async def cleared_by_hand(client: Any) -> AsyncIterator[None]:
    async with with_session(client=client, collections=[Item], propagation="requires_new"):
        Item.clear_session()
        yield


@asynccontextmanager
async def scope(client: Any) -> AsyncIterator[None]:
    async with with_session(client=client, collections=[Item], propagation="requires_new"):
        yield


@asynccontextmanager
async def joined(client: Any) -> AsyncIterator[None]:
    async with with_session(client=client, collections=[Item]):
        yield


@asynccontextmanager
async def bound(client: Any) -> AsyncIterator[None]:
    session = await DRIVER.start_session(client)
    with bind_session(session, collections=[Item]):
        yield
    await session.end_session()


@asynccontextmanager
async def outside(client: Any) -> AsyncIterator[None]:
    with outside_session(Item):
        yield


@asynccontextmanager
async def all_outside(client: Any) -> AsyncIterator[None]:
    with outside_session():
        yield


WAYS = [
    by_hand,
    by_hand_and_forgotten,
    cleared_by_hand,
    scope,
    joined,
    bound,
    outside,
    all_outside,
]


class TestNesting:
    @pytest.mark.parametrize("second", WAYS)
    @pytest.mark.parametrize("first", WAYS)
    async def test_in_any_order_restores_what_was_bound(
        self, client: Any, first: Any, second: Any
    ) -> None:
        async with scope(client):
            before = Item.get_session(), current_scope()
            try:
                async with first(client):
                    inner = Item.get_session(), current_scope()
                    try:
                        async with second(client):
                            pass
                    except ValueError:
                        pytest.fail("a binding could not be restored")
                    assert (Item.get_session(), current_scope()) == inner
            except Exception as error:
                # A default scope may not join a plain session: refused, and nothing bound.
                assert type(error).__name__ == "PropagationError"  # noqa: PT017
            assert (Item.get_session(), current_scope()) == before
        assert (Item.get_session(), current_scope()) == (None, None)

    async def test_two_scopes_may_be_left_in_the_order_of_their_entry(self, client: Any) -> None:
        first = with_session(client=client, collections=[Item])
        second = with_session(client=client, collections=[Item], propagation="requires_new")
        await first.__aenter__()
        session = await second.__aenter__()

        await first.__aexit__(None, None, None)
        assert Item.get_session() is session, "the second is still open"
        assert current_scope() is second
        await Item(name="second").insert()

        await second.__aexit__(None, None, None)
        assert Item.get_session() is None
        assert current_scope() is None
        assert await Item.count() == 1

    async def test_current_scope_is_the_innermost_or_that_of_a_class(self, client: Any) -> None:
        outer = with_session(client=client, collections=[Item])
        inner = with_session(client=client, collections=[Linked], propagation="requires_new")
        async with outer:
            async with inner:
                assert current_scope() is inner
                assert current_scope(Item) is outer
                assert current_scope(Linked) is inner
                assert current_scope(Unlisted) is None
            assert current_scope() is outer


class TestOtherContexts:
    async def test_a_scope_that_is_left_in_another_task_is_over_here(self, client: Any) -> None:
        scope = with_session(client=client, collections=[Item])
        await scope.__aenter__()
        await asyncio.ensure_future(scope.__aexit__(None, None, None))

        assert scope.state is ScopeState.COMMITTED
        assert Item.get_session() is None
        await Item(name="outside").insert()

    async def test_a_scope_that_is_left_in_another_task_can_be_forgotten_for_new_tasks(
        self, client: Any
    ) -> None:
        async def insert() -> None:
            await Item(name="outside").insert()
            assert current_scope() is None

        scope = with_session(client=client, collections=[Item])
        await scope.__aenter__()
        await asyncio.ensure_future(scope.__aexit__(None, None, None))
        with pytest.raises(ScopeClosedError):
            await asyncio.ensure_future(insert())

        scope.forget()
        await asyncio.ensure_future(insert())

    async def test_a_scope_that_is_open_is_not_forgotten(self, client: Any) -> None:
        scope = with_session(client=client, collections=[Item])
        scope.forget()
        async with scope as session:
            scope.forget()
            assert Item.get_session() is session
            assert current_scope() is scope

    async def test_a_task_that_inherited_a_scope_does_not_forget_it(self, client: Any) -> None:
        scope = with_session(client=client, collections=[Item])
        over = asyncio.Event()

        async def late() -> None:
            await over.wait()
            scope.forget()
            await Item().insert()

        async with scope:
            task = asyncio.ensure_future(late())
            await asyncio.sleep(0)
        over.set()
        with pytest.raises(ScopeClosedError):
            await task

    async def test_a_scope_that_is_left_in_another_task_restores_what_was_before(
        self, client: Any
    ) -> None:
        async with with_session(client=client, collections=[Item]) as session:
            inner = with_session(client=client, collections=[Item], propagation="requires_new")
            await inner.__aenter__()
            assert Item.get_session() is not session
            await asyncio.ensure_future(inner.__aexit__(None, None, None))
            assert Item.get_session() is session

    async def test_a_scope_that_was_entered_in_another_task_does_not_commit_here(
        self, client: Any
    ) -> None:
        scope = with_session(client=client, collections=[Item])
        session = await asyncio.ensure_future(scope.__aenter__())
        assert Item.get_session() is None
        await Item().insert(session=session)
        with pytest.raises(UnexpectedRollbackError, match="never bound"):
            await scope.__aexit__(None, None, None)
        assert scope.state is ScopeState.ABORTED
        assert Item.get_session() is None
        assert await Item.count() == 0

    @pytest.mark.parametrize("joined", [False, True], ids=["its own scope", "a joined one"])
    async def test_a_generator_whose_steps_are_tasks_does_not_commit(
        self, client: Any, database: Any, joined: bool
    ) -> None:
        async def inserted() -> AsyncIterator[str]:
            async with with_session(client=client, collections=[Item]):
                for name in ("in it", "outside"):
                    await Item(name=name).insert()
                    yield name

        async def consume() -> None:
            steps = inserted()
            with suppress(StopAsyncIteration):
                while True:
                    await asyncio.ensure_future(steps.__anext__())

        with pytest.raises(UnexpectedRollbackError, match="never bound"):
            if joined:
                async with with_session(client=client, collections=[Linked]):
                    await consume()
            else:
                await consume()
        assert [each["name"] async for each in database["item"].find()] == ["outside"]

    async def test_nor_may_a_generator_whose_steps_are_tasks_commit_in_between(
        self, client: Any
    ) -> None:
        async def inserted() -> AsyncIterator[None]:
            async with (scope := with_session(client=client, collections=[Item])) as session:
                await Item().insert()
                yield
                await Item().insert(session=session)
                await scope.commit()

        steps = inserted()
        await asyncio.ensure_future(steps.__anext__())
        with pytest.raises(UnexpectedRollbackError, match="never bound"):
            await asyncio.ensure_future(steps.__anext__())
        assert await Item.count() == 0

    async def test_a_scope_may_be_entered_and_left_in_two_tasks_of_one_context(
        self, client: Any
    ) -> None:
        """As plugins of pytest run the two halves of a fixture, and the test between them."""
        if sys.version_info < (3, 11):  # whose tasks take no context
            return
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        scope = with_session(client=client, collections=[Item])

        async def read() -> Any:
            await Item.find_one()
            return Item.get_session()

        session = await loop.create_task(scope.__aenter__(), context=context)  # type: ignore[call-arg, unused-ignore]
        assert await loop.create_task(read(), context=context) is session  # type: ignore[call-arg, unused-ignore]
        await loop.create_task(scope.__aexit__(None, None, None), context=context)  # type: ignore[call-arg, unused-ignore]
        assert context.run(Item.get_session) is None

    @pytest.mark.parametrize("how", ["closed", "collected"])
    async def test_an_abandoned_generator_leaves_nothing_in_its_consumer(
        self, client: Any, database: Any, how: str
    ) -> None:
        scope = with_session(client=client, collections=[Item])

        async def generate() -> AsyncIterator[int]:
            async with scope:
                await Item(name="lost").insert()
                yield 1
                yield 2

        generator = generate()
        async for _ in generator:
            break
        if how == "closed":
            await generator.aclose()  # type: ignore[attr-defined]
        else:
            del generator
            gc.collect()
            while Item.get_session() is not None:
                await asyncio.sleep(0)

        assert scope.state is ScopeState.ABORTED
        assert current_scope() is None
        await Item(name="after").insert()
        assert [each["name"] for each in await database["item"].find().to_list(None)] == ["after"]

    async def test_a_generator_that_goes_on_keeps_its_scope(
        self, client: Any, database: Any
    ) -> None:
        async def generate() -> AsyncIterator[int]:
            async with with_session(client=client, collections=[Item]):
                for n in range(3):
                    await Item(n=n).insert()
                    yield n

        assert [n async for n in generate()] == [0, 1, 2]
        assert await database["item"].count_documents({}) == 3
        assert Item.get_session() is None


class TestALateTask:
    """One that inherited a scope which is over, whatever it does on its own."""

    @pytest.mark.parametrize("block", ["outside", "scope", "by hand", "bind"])
    async def test_does_not_escape_through_a_block_of_its_own(
        self, client: Any, database: Any, session: Any, block: str
    ) -> None:
        go_on = asyncio.Event()

        async def late() -> None:
            await go_on.wait()
            if block == "outside":
                with outside_session(Item):
                    pass
            elif block == "scope":
                async with with_session(client=client, collections=[Item]):
                    await Item(name="its own").insert()
            elif block == "bind":
                with bind_session(session, collections=[Item]):
                    pass
            else:
                Item.clear_session(Item.set_session(session))
            await Item(name="escaped").insert()

        async with with_session(client=client, collections=[Item]):
            task = asyncio.ensure_future(late())
            await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(ScopeClosedError):
            await task
        names = {each["name"] for each in await database["item"].find().to_list(None)}
        assert names == ({"its own"} if block == "scope" else set())

    async def test_started_by_a_callback_does_not_escape_when_the_first_task_is_gone(
        self, client: Any, database: Any
    ) -> None:
        """A callback runs in no task, and the task that opened the scope may be collected."""
        loop = asyncio.get_running_loop()
        late: asyncio.Future[Any] = loop.create_future()
        scheduled: list[contextvars.Context] = []

        def callback() -> None:
            try:
                Item.get_session()
            except ScopeClosedError:
                late.set_result(asyncio.ensure_future(Item(name="escaped").insert()))
            else:
                late.set_exception(AssertionError("the callback is taken for the first task"))

        async def work() -> None:
            async with with_session(client=client, collections=[Item]):
                scheduled.append(contextvars.copy_context())

        await asyncio.ensure_future(work())
        await asyncio.sleep(0)
        gc.collect()
        loop.call_soon(callback, context=scheduled[0])
        with pytest.raises(ScopeClosedError):
            await (await late)
        assert await database["item"].count_documents({}) == 0

    async def test_does_not_keep_the_task_that_opened_the_scope(self, client: Any) -> None:
        context: list[contextvars.Context] = []

        async def work() -> None:
            async with with_session(client=client, collections=[Item]):
                context.append(contextvars.copy_context())

        task = asyncio.ensure_future(work())
        await task
        kept = weakref.ref(task)
        del task
        await asyncio.sleep(0)  # the loop still holds the task that just woke this one
        gc.collect()
        assert kept() is None


class TestBindSession:
    async def test_neither_commits_nor_ends_the_session(
        self, client: Any, session: Any, database: Any
    ) -> None:
        await DRIVER.start_transaction(session)
        with bind_session(session, collections=[Item]) as same:
            assert same is session
            await Item(name="x").insert()
        assert session.in_transaction
        assert not session.has_ended
        await session.abort_transaction()
        assert await database["item"].count_documents({}) == 0

    async def test_binds_all_classes_of_the_client_where_none_are_named(
        self, client: Any, session: Any
    ) -> None:
        with bind_session(session):
            assert Item.get_session() is Unlisted.get_session() is session
        assert Item.get_session() is None

    async def test_is_joined_by_a_scope_inside_it(
        self, client: Any, session: Any, database: Any
    ) -> None:
        await DRIVER.start_transaction(session)
        with bind_session(session, collections=[Item]):
            async with with_session(collections=[Linked]) as inner:
                assert inner is session
                await Linked().insert()
        await session.abort_transaction()
        assert await database["linked"].count_documents({}) == 0

    async def test_a_task_that_goes_on_after_it_raises(self, client: Any, session: Any) -> None:
        go_on = asyncio.Event()

        async def late() -> None:
            await go_on.wait()
            await Item.find_one()

        with bind_session(session, collections=[Item]):
            task = asyncio.ensure_future(late())
            await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(ScopeClosedError, match="block is over"):
            await task

    async def test_works_where_no_loop_runs(self) -> None:
        with outside_session():
            pass

        def bind() -> Iterator[bool]:
            with outside_session(Item):
                yield Item.get_session() is None

        assert await asyncio.to_thread(lambda: list(bind())) == [True]


class TestOutsideSession:
    async def test_takes_the_subclasses_along(self, client: Any) -> None:
        async with with_session(client=client, collections=[Leaf]) as session:
            with outside_session(Root):
                assert Leaf.get_session() is None
            assert Leaf.get_session() is session

    async def test_can_be_told_from_a_class_that_no_scope_binds(self, client: Any) -> None:
        async with with_session(client=client, collections=[Root]):
            assert not is_outside(Item)
            assert not is_outside(Leaf)
            with outside_session(Root):
                assert is_outside(Leaf)
                assert not is_outside(Item)
            assert not is_outside(Leaf)

    async def test_ends_where_a_session_is_bound_by_hand(self, session: Any) -> None:
        """Also for a task that inherited that, when its parent has cleared it again."""
        go_on = asyncio.Event()

        async def child() -> tuple[Any, bool]:
            await go_on.wait()
            return Item.get_session(), is_outside(Item)

        with outside_session(Item):
            token = Item.set_session(session)
            task = asyncio.ensure_future(child())
            Item.clear_session(token)
            assert is_outside(Item)
            go_on.set()
            assert await task == (session, False)

    async def test_holds_in_tasks_created_there(self, client: Any, database: Any) -> None:
        async with with_session(client=client, collections=[Item]):
            with outside_session(Item):
                await asyncio.gather(*(Item(n=n).insert() for n in range(5)))
            raise Rollback
        assert await database["item"].count_documents({}) == 5

    async def test_of_all_classes_hides_the_scope_itself(self, client: Any) -> None:
        async with with_session(client=client, collections=[Item]) as session:
            with outside_session():
                assert current_scope() is None
                async with with_session(client=client, collections=[Item]) as other:
                    assert other is not session
            assert current_scope() is not None

    async def test_is_a_binding_that_a_scope_inside_it_may_replace(self, client: Any) -> None:
        with outside_session(Item):
            async with with_session(client=client, collections=[Item]) as session:
                assert Item.get_session() is session
            assert Item.get_session() is None
