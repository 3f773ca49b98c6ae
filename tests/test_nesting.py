"""Scopes in scopes: what becomes of each, and who may end what."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
from nesting_models import Beside, Here, There
from nesting_scopes import ENDS, Boom, Pair, fail_by
from pymongo.read_concern import ReadConcern

from beanie_session_scope import (
    PropagationError,
    Rollback,
    ScopeState,
    UnexpectedRollbackError,
    current_scope,
    on_commit,
    outside_session,
    with_session,
)

pytestmark = pytest.mark.timeout(30)


@contextmanager
def reported(into: list[str]) -> Iterator[None]:
    """Catch what leaves the block, and keep its name: an empty one where nothing does."""
    try:
        yield
    except Exception as error:
        into.append(type(error).__name__)
    else:
        into.append("")


# What leaves the inner scope, what leaves the outer one, and what is stored, by
# (propagation of the inner scope, how it ends, how the outer one ends).
MATRIX: dict[tuple[str, str, str], tuple[str, str, list[str]]] = {
    ("required", "commit", "commit"): ("", "", ["inner", "outer"]),
    ("required", "commit", "abort"): ("", "", []),
    ("required", "exception", "commit"): ("Boom", "UnexpectedRollbackError", []),
    ("required", "exception", "abort"): ("Boom", "", []),
    ("required", "rollback", "commit"): ("Rollback", "UnexpectedRollbackError", []),
    ("required", "rollback", "abort"): ("Rollback", "", []),
    ("required", "rollback_only", "commit"): ("", "UnexpectedRollbackError", []),
    ("required", "rollback_only", "abort"): ("", "", []),
    ("requires_new", "commit", "commit"): ("", "", ["inner", "outer"]),
    ("requires_new", "commit", "abort"): ("", "", ["inner"]),
    ("requires_new", "exception", "commit"): ("Boom", "", ["outer"]),
    ("requires_new", "exception", "abort"): ("Boom", "", []),
    ("requires_new", "rollback", "commit"): ("", "", ["outer"]),
    ("requires_new", "rollback", "abort"): ("", "", []),
    ("requires_new", "rollback_only", "commit"): ("UnexpectedRollbackError", "", ["outer"]),
    ("requires_new", "rollback_only", "abort"): ("UnexpectedRollbackError", "", []),
}

CASES = pytest.mark.parametrize(
    ("propagation", "inner", "outer"), [pytest.param(*key, id="-".join(key)) for key in MATRIX]
)


class TestTheMatrix:
    """{joined, requires_new} x {commit, abort}^2; what the inner scope raises is caught."""

    @staticmethod
    async def _outer(
        pair: Pair, how: str, inner: str, outer: str, between: list[str], **options: Any
    ) -> None:
        async with pair.scope(**options) as session:
            await Here(name="outer").insert()
            with reported(between):
                async with (scope := pair.scope(propagation=how)):
                    await Here(name="inner").insert()
                    await fail_by(inner, scope)
            assert Here.get_session() is session
            await fail_by(outer, current_scope())

    @CASES
    async def test_plain(self, pair: Pair, propagation: str, inner: str, outer: str) -> None:
        between: list[str] = []
        left: list[str] = []
        with reported(left):
            await self._outer(pair, propagation, inner, outer, between)
        expected = MATRIX[propagation, inner, outer]
        assert (*between, *left, await pair.stored()) == expected
        assert (Here.get_session(), current_scope()) == (None, None)

    @pytest.mark.parametrize("around", ENDS)
    @CASES
    async def test_inside_an_outer_scope_as_an_independent_one(
        self, pair: Pair, propagation: str, inner: str, outer: str, around: str
    ) -> None:
        """Nothing differs from the plain one, and the scope around it ends as it likes."""
        between: list[str] = []
        left: list[str] = []
        async with pair.scope() as session:
            await Here(name="around").insert()
            with reported(left):
                await self._outer(
                    pair, propagation, inner, outer, between, propagation="requires_new"
                )
            assert Here.get_session() is session
            await fail_by(around, current_scope())
        *names, stored = MATRIX[propagation, inner, outer]
        assert (*between, *left) == tuple(names)
        assert await pair.stored() == (["around"] if around == "commit" else []) + stored

    @pytest.mark.parametrize("around", ENDS)
    @CASES
    async def test_inside_an_outer_scope_as_a_joined_one(
        self, pair: Pair, propagation: str, inner: str, outer: str, around: str
    ) -> None:
        """Who fails takes the scope around along; what is independent stays."""
        doomed = outer == "abort" or (propagation == "required" and inner != "commit")
        between: list[str] = []
        left: list[str] = []
        at_last: list[str] = []
        with reported(at_last):
            async with pair.scope():
                await Here(name="around").insert()
                with reported(left):
                    await self._outer(pair, propagation, inner, outer, between)
                assert current_scope().rollback_only is doomed
                await fail_by(around, current_scope())
        assert between == [MATRIX[propagation, inner, outer][0]]
        assert left == ["Rollback" if outer == "abort" else ""]
        committed = around == "commit" and not doomed
        assert at_last == ["UnexpectedRollbackError" if doomed and around == "commit" else ""]
        independent = propagation == "requires_new" and inner == "commit"
        expected = [
            *(["around"] if committed else []),
            *(["inner"] if independent or (committed and inner == "commit") else []),
            *(["outer"] if committed else []),
        ]
        assert await pair.stored() == expected


class TestThreeDeep:
    async def test_a_failure_at_the_bottom_of_joined_ones_reaches_the_owner(
        self, pair: Pair
    ) -> None:
        with pytest.raises(UnexpectedRollbackError, match="Boom"):
            async with pair.scope():
                async with pair.joined():
                    with pytest.raises(Boom):
                        async with pair.joined():
                            await Here().insert()
                            raise Boom
                    assert current_scope().rollback_only
        assert await pair.stored() == []

    async def test_a_failure_of_a_joined_one_dooms_its_own_transaction_only(
        self, pair: Pair
    ) -> None:
        async with pair.scope():
            await Here(name="outer").insert()
            with pytest.raises(UnexpectedRollbackError):
                async with pair.new():
                    with pytest.raises(Boom):
                        async with pair.joined():
                            await Here(name="lost").insert()
                            raise Boom
            assert not current_scope().rollback_only
        assert await pair.stored() == ["outer"]

    async def test_rollback_leaves_the_owner_of_its_own_transaction_only(self, pair: Pair) -> None:
        reached = []
        async with pair.scope():
            async with pair.new():
                async with pair.joined():
                    await Here(name="lost").insert()
                    raise Rollback
                reached.append("after the joined one")
            reached.append("after its owner")
            await Here(name="outer").insert()
        assert reached == ["after its owner"]
        assert await pair.stored() == ["outer"]

    @pytest.mark.parametrize("ends", list(product(ENDS, repeat=3)), ids="-".join)
    async def test_independent_ones_end_each_for_itself(
        self, pair: Pair, ends: tuple[str, ...]
    ) -> None:
        async def nest(level: int) -> None:
            async with pair.new() as session:
                await Here(name=str(level)).insert()
                if level < 2:
                    await nest(level + 1)
                assert Here.get_session() is session
                await fail_by(ends[level], current_scope())

        await nest(0)
        assert await pair.stored() == [str(i) for i, end in enumerate(ends) if end == "commit"]

    async def test_each_level_finds_its_bindings_again(self, pair: Pair) -> None:
        async with pair.scope() as first:
            async with pair.new() as second:
                async with pair.scope(Beside) as joined:
                    assert (Here.get_session(), Beside.get_session()) == (second, joined)
                    assert joined is second
                    with outside_session(Here):
                        assert (Here.get_session(), Beside.get_session()) == (None, second)
                    async with pair.new(Beside) as third:
                        assert (Here.get_session(), Beside.get_session()) == (second, third)
                assert (Here.get_session(), Beside.get_session()) == (second, None)
            assert Here.get_session() is first

    async def test_every_session_has_ended(self, pair: Pair) -> None:
        async with pair.scope() as first, pair.new() as second, pair.other() as third:
            await Here().insert()
        assert all(session.has_ended for session in (first, second, third))


class TestRollbackOnly:
    async def test_is_told_by_both_scopes_once_a_joined_one_was_marked(self, pair: Pair) -> None:
        with pytest.raises(UnexpectedRollbackError, match="no stock"):
            async with (owner := pair.scope()):
                async with (inner := pair.joined()):
                    assert not owner.rollback_only
                    inner.set_rollback_only("no stock")
                    assert (inner.rollback_only, owner.rollback_only) == (True, True)

    async def test_names_the_first_reason(self, pair: Pair) -> None:
        with pytest.raises(UnexpectedRollbackError, match="no stock"):
            async with pair.scope():
                async with pair.joined():
                    current_scope().set_rollback_only("no stock")
                with pytest.raises(Boom):
                    async with pair.joined():
                        raise Boom

    async def test_lets_operations_go_on(self, pair: Pair) -> None:
        async with (owner := pair.scope()):
            owner.set_rollback_only("no stock")
            async with pair.joined():
                await Here().insert()
                assert await Here.find().count() == 1
            raise Rollback
        assert await pair.stored() == []

    async def test_is_over_when_the_owner_has_aborted_and_goes_on(self, pair: Pair) -> None:
        async with (owner := pair.scope()):
            with pytest.raises(Boom):
                async with pair.joined():
                    await Here(name="lost").insert()
                    raise Boom
            await owner.abort()
            assert not owner.rollback_only
            await Here(name="stays").insert()
        assert await pair.stored() == ["stays"]

    async def test_refuses_a_commit_on_the_way(self, pair: Pair) -> None:
        with pytest.raises(UnexpectedRollbackError, match="Boom"):
            async with (owner := pair.scope()):
                with pytest.raises(Boom):
                    async with pair.joined():
                        await Here().insert()
                        raise Boom
                await owner.commit()
        assert owner.state is ScopeState.ABORTED
        assert await pair.stored() == []

    async def test_does_not_reach_an_independent_scope(self, pair: Pair) -> None:
        async with pair.scope():
            current_scope().set_rollback_only("no stock")
            async with pair.new():
                assert not current_scope().rollback_only
                await Here(name="independent").insert()
            raise Rollback
        assert await pair.stored() == ["independent"]

    async def test_is_no_matter_where_the_owner_is_over(self, pair: Pair) -> None:
        """The block that had joined belongs to a task that went on."""
        go_on = asyncio.Event()

        async def late() -> None:
            async with pair.joined():
                await go_on.wait()
                raise Boom

        async with (owner := pair.scope()):
            await Here(name="stays").insert()
            task = asyncio.ensure_future(late())
            await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(Boom):
            await task
        assert (owner.state, owner.rollback_only) == (ScopeState.COMMITTED, False)
        assert await pair.stored() == ["stays"]


class TestWhoMayEndATransaction:
    @pytest.mark.parametrize("how", ENDS)
    async def test_not_a_scope_that_has_joined(self, pair: Pair, how: str) -> None:
        async with pair.scope() as session:
            await Here(name="a").insert()
            async with (inner := pair.joined()):
                with pytest.raises(PropagationError, match=how):
                    await getattr(inner, how)()
                assert session.in_transaction
            await Here(name="b").insert()
        assert await pair.stored() == ["a", "b"]

    @pytest.mark.parametrize("how", ENDS)
    async def test_not_the_owner_while_one_that_has_joined_is_open(
        self, pair: Pair, how: str
    ) -> None:
        async with (owner := pair.scope()):
            await Here(name="a").insert()
            async with pair.joined():
                assert current_scope() is owner
                with pytest.raises(PropagationError, match=how):
                    await getattr(owner, how)()
            await getattr(owner, how)()
            await Here(name="b").insert()
        assert await pair.stored() == (["a", "b"] if how == "commit" else ["b"])

    async def test_not_the_owner_while_another_task_has_joined(self, pair: Pair) -> None:
        leave = asyncio.Event()

        async def child() -> None:
            async with pair.joined():
                await leave.wait()

        async with (owner := pair.scope()):
            task = asyncio.ensure_future(child())
            await asyncio.sleep(0)
            with pytest.raises(PropagationError, match="joined"):
                await owner.commit()
            leave.set()
            await task
            await owner.commit()

    async def test_not_a_joined_scope_after_a_commit_that_failed(self, pair: Pair) -> None:
        """The owner may: its ``abort()`` begins anew."""
        async with (owner := pair.scope()):
            owner.set_rollback_only("no stock")
            with pytest.raises(UnexpectedRollbackError):
                await owner.commit()
            async with (inner := pair.joined()):
                for scope in (inner, owner):
                    with pytest.raises(PropagationError, match="abort"):
                        await scope.abort()
            await owner.abort()
            await Here(name="anew").insert()
        assert await pair.stored() == ["anew"]

    @pytest.mark.parametrize("how", ENDS)
    async def test_an_independent_scope_ends_its_own(self, pair: Pair, how: str) -> None:
        async with pair.scope() as session:
            await Here(name="outer").insert()
            async with (inner := pair.new()):
                await Here(name="inner").insert()
                await getattr(inner, how)()
                raise Rollback
            assert session.in_transaction
        assert await pair.stored() == (["inner", "outer"] if how == "commit" else ["outer"])


class TestOptionsThatConflict:
    @pytest.mark.parametrize("propagation", ["required", "mandatory"])
    async def test_leave_the_outer_scope_as_it_was(self, pair: Pair, propagation: Any) -> None:
        async with pair.scope() as session:
            with pytest.raises(PropagationError, match="read_concern"):
                async with pair.scope(
                    Beside, propagation=propagation, read_concern=ReadConcern("snapshot")
                ):
                    pytest.fail("the body ran")
            assert (Here.get_session(), Beside.get_session()) == (session, None)
            assert not current_scope().rollback_only
            await current_scope().commit()
            await Here(name="stays").insert()
        assert await pair.stored() == ["stays"]

    async def test_are_compared_with_the_owners_and_not_with_those_of_the_block_between(
        self, pair: Pair
    ) -> None:
        snapshot = {"read_concern": ReadConcern("snapshot")}
        async with pair.scope(**snapshot), pair.joined(), pair.joined(**snapshot):
            await Here().insert()
        with pytest.raises(PropagationError, match="read_concern"):
            async with pair.scope(**snapshot), pair.new(), pair.joined(**snapshot):
                pytest.fail("the body ran")

    async def test_do_not_matter_to_an_independent_scope(self, pair: Pair) -> None:
        async with pair.scope(read_concern=ReadConcern("snapshot")):
            async with pair.new(transaction=False):
                await Here(name="at once").insert()
            raise Rollback
        assert await pair.stored() == ["at once"]

    async def test_refuse_a_transaction_in_a_plain_session_and_the_other_way_round(
        self, pair: Pair
    ) -> None:
        async with pair.scope(transaction=False):
            async with pair.new():
                with pytest.raises(PropagationError, match="transaction"):
                    async with pair.joined(transaction=False):
                        pytest.fail("the body ran")
            with pytest.raises(PropagationError, match="transaction"):
                async with pair.joined():
                    pytest.fail("the body ran")


class TestMandatoryAndNever:
    async def test_mandatory_joins_the_innermost(self, pair: Pair) -> None:
        async with pair.scope(), pair.new() as inner:
            async with pair.scope(propagation="mandatory") as session:
                assert session is inner
                await Here(name="lost").insert()
            raise Rollback
        assert await pair.stored() == []

    async def test_mandatory_asks_for_a_scope_on_its_own_client(self, pair: Pair) -> None:
        async with pair.scope():
            with pytest.raises(PropagationError, match="mandatory"):
                async with pair.other(propagation="mandatory"):
                    pytest.fail("the body ran")
            async with pair.other() as session, pair.scope():
                async with pair.other(propagation="mandatory") as joined:
                    assert joined is session

    async def test_mandatory_that_fails_makes_the_owner_rollback_only(self, pair: Pair) -> None:
        with pytest.raises(UnexpectedRollbackError, match="Boom"):
            async with pair.scope():
                with pytest.raises(Boom):
                    async with pair.scope(propagation="mandatory"):
                        raise Boom

    async def test_never_refuses_in_a_joined_and_in_an_independent_one(self, pair: Pair) -> None:
        async with pair.scope():
            for nested in (pair.joined(), pair.new()):
                async with nested as session:
                    with pytest.raises(PropagationError, match="never"):
                        async with pair.scope(propagation="never"):
                            pytest.fail("the body ran")
                    assert Here.get_session() is session
                    await Here().insert()
        assert len(await pair.stored()) == 2

    async def test_never_looks_at_its_own_client(self, pair: Pair) -> None:
        async with pair.scope():
            async with pair.other(propagation="never"):
                await There(name="there").insert()
            raise Rollback
        assert await pair.stored(There) == ["there"]

    @pytest.mark.parametrize("propagation", ["mandatory", "never"])
    async def test_neither_counts_a_scope_that_is_over(self, pair: Pair, propagation: Any) -> None:
        go_on = asyncio.Event()
        left: list[str] = []

        async def late() -> None:
            await go_on.wait()
            with reported(left):
                async with pair.scope(propagation=propagation):
                    await Here(name="late").insert()

        async with pair.scope():
            task = asyncio.ensure_future(late())
            await asyncio.sleep(0)
        go_on.set()
        await task
        assert left == ["PropagationError" if propagation == "mandatory" else ""]
        assert await pair.stored() == ([] if propagation == "mandatory" else ["late"])


class TestOutsideATransaction:
    @pytest.mark.parametrize("inner", ENDS)
    async def test_a_scope_is_independent(self, pair: Pair, inner: str) -> None:
        async with pair.scope() as session:
            await Here(name="lost").insert()
            with outside_session():
                await Here(name="at once").insert()
                async with pair.scope() as other:
                    assert other is not session
                    await Here(name="inner").insert()
                    await fail_by(inner, current_scope())
                assert Here.get_session() is None
            assert Here.get_session() is session
            raise Rollback
        assert await pair.stored() == (["at once", "inner"] if inner == "commit" else ["at once"])

    async def test_a_class_that_was_put_there_comes_back_with_a_joined_scope(
        self, pair: Pair
    ) -> None:
        async with pair.scope(Here, Beside) as session:
            with outside_session(Here):
                assert current_scope().session is session
                async with pair.joined():
                    assert Here.get_session() is session
                assert (Here.get_session(), Beside.get_session()) == (None, session)

    async def test_a_task_that_was_started_there_stays_there_when_the_block_is_over(
        self, pair: Pair
    ) -> None:
        """A job in the background must not join the transaction of whoever started it."""

        async def job() -> None:
            await go_on.wait()
            assert current_scope() is None
            on_commit(lambda: ran.append("at once"))
            with pytest.raises(PropagationError):
                async with pair.scope(propagation="mandatory"):
                    pytest.fail("the body ran")
            async with pair.joined() as session:
                assert session is not outer
                await Here(name="by the job").insert()

        go_on = asyncio.Event()
        ran: list[str] = []
        async with pair.scope() as outer:
            with outside_session():
                task = asyncio.ensure_future(job())
                await asyncio.sleep(0)
            go_on.set()
            await task
            assert ran == ["at once"]
            raise Rollback
        assert await pair.stored() == ["by the job"]


class TestTwoClients:
    @pytest.mark.parametrize(("outer", "inner"), list(product(ENDS, repeat=2)))
    async def test_have_transactions_that_end_each_for_itself(
        self, pair: Pair, outer: str, inner: str
    ) -> None:
        async with pair.scope() as first:
            await Here(name="here").insert()
            async with pair.other() as second:
                await There(name="there").insert()
                await Here(name="here, too").insert()
                assert (Here.get_session(), There.get_session()) == (first, second)
                await fail_by(inner, current_scope())
            assert (Here.get_session(), There.get_session()) == (first, None)
            await fail_by(outer, current_scope())
        assert await pair.stored(Here) == (["here", "here, too"] if outer == "commit" else [])
        assert await pair.stored(There) == (["there"] if inner == "commit" else [])

    async def test_bind_each_its_own_classes_where_none_are_named(self, pair: Pair) -> None:
        async with with_session(client=pair.here) as first:
            assert There.get_session() is None
            async with with_session(client=pair.there) as second:
                sessions = [m.get_session() for m in (Here, Beside, There)]
                assert sessions == [first, first, second]

    async def test_join_each_its_own_scope_from_within_the_other(self, pair: Pair) -> None:
        async with pair.scope() as first, pair.other() as second:
            async with pair.joined() as joined:
                assert joined is first
                assert current_scope().session is first
                async with pair.other() as joined:
                    assert joined is second
                assert current_scope().session is first
            assert current_scope().session is second

    async def test_do_not_make_each_other_rollback_only(self, pair: Pair) -> None:
        async with pair.scope():
            await Here(name="here").insert()
            with pytest.raises(UnexpectedRollbackError):
                async with pair.other():
                    with pytest.raises(Boom):
                        async with pair.other():
                            await There(name="there").insert()
                            raise Boom
            assert not current_scope().rollback_only
        assert (await pair.stored(Here), await pair.stored(There)) == (["here"], [])

    async def test_a_joined_one_across_the_other_marks_its_own_owner(self, pair: Pair) -> None:
        with pytest.raises(UnexpectedRollbackError, match="Boom"):
            async with pair.scope():
                async with pair.other():
                    await There(name="there").insert()
                    with pytest.raises(Boom):
                        async with pair.joined():
                            await Here(name="here").insert()
                            raise Boom
                    assert not current_scope().rollback_only
        assert (await pair.stored(Here), await pair.stored(There)) == ([], ["there"])

    async def test_hooks_belong_to_the_innermost(self, pair: Pair) -> None:
        ran: list[str] = []
        async with (first := pair.scope()):
            async with pair.other():
                on_commit(lambda: ran.append("of the inner one"))
                first.on_commit(lambda: ran.append("of the outer one"))
            assert ran == ["of the inner one"]
        assert ran == ["of the inner one", "of the outer one"]

    async def test_run_side_by_side_in_tasks(self, pair: Pair) -> None:
        async def here(i: int) -> None:
            async with pair.scope():
                await Here(name=str(i)).insert()
                await fail_by(ENDS[i % 2], current_scope())

        async def there(i: int) -> None:
            async with pair.other():
                await There(name=str(i)).insert()
                await fail_by(ENDS[i % 2], current_scope())

        await asyncio.gather(*(work(i) for i in range(4) for work in (here, there)))
        assert (await pair.stored(Here), await pair.stored(There)) == (["0", "2"],) * 2
