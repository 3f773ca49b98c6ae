"""``session_scope_rollback``: a test in a transaction that is always rolled back."""

from __future__ import annotations

import pytest
from plugin_runs import Runs, every_flavour

SEEN_EVERYWHERE = """
    order = []

    @FIXTURE
    async def before(client):
        assert current_scope() is None
        yield
        assert current_scope() is None
        order.append("before")

    @FIXTURE
    async def stored(before, session_scope_rollback):
        assert current_scope() is session_scope_rollback.scope
        bike = await Bike(name="of the fixture").insert()
        yield bike
        assert current_scope() is session_scope_rollback.scope
        assert await Bike.count() == 2
        order.append("after")

    @FIXTURE
    async def returned(stored):
        assert current_scope() is not None
        return await Bike.find_one()

    @TEST
    async def test_one(before, session_scope_rollback, returned, database):
        assert returned.name == "of the fixture"
        assert current_scope() is current_scope(Bike) is session_scope_rollback.scope
        async with with_session(collections=[Bike]) as session:
            assert session is session_scope_rollback.session
            await Bike(name="of the test").insert()
        assert await Bike.count() == 2
        assert await database["bikes"].count_documents({}) == 0

    @TEST
    async def test_two(client):
        assert order == ["after", "before"]
        assert current_scope() is None
        assert Bike.get_session() is None
        assert await Bike.count() == 0
"""


class TestContext:
    @every_flavour
    def test_test_and_fixtures_are_in_the_scope_and_nothing_stays(
        self, runs: Runs, flavour: str
    ) -> None:
        runs(SEEN_EVERYWHERE, flavour=flavour).assert_outcomes(passed=2)

        assert runs.stored() == 0

    def test_an_event_loop_that_lives_longer_than_the_test_is_used(self, runs: Runs) -> None:
        runs(
            """
            from plugin_models import DATABASE, MODELS
            from beanie import init_beanie
            from beanie_session_scope.drivers import DRIVER
            from clients import close

            pytestmark = pytest.mark.asyncio(loop_scope="module")

            @pytest_asyncio.fixture(loop_scope="module", scope="module")
            async def client(mongo_replica_set):
                client = DRIVER.client_class(mongo_replica_set.uri)
                await init_beanie(database=client[DATABASE], document_models=MODELS)
                yield client
                await close(client)

            @pytest.mark.parametrize("n", [1, 2])
            async def test_it(session_scope_rollback, n):
                assert await Bike.count() == 0
                await Bike().insert()
            """
        ).assert_outcomes(passed=2)

        assert runs.stored() == 0

    def test_a_client_is_found_by_the_classes_where_no_fixture_names_it(self, runs: Runs) -> None:
        runs.write(
            """
            @pytest.fixture
            def session_scope_client():
                return None

            @TEST
            async def test_it(client, session_scope_rollback):
                assert session_scope_rollback.scope.client is client
                await Bike().insert()
            """
        )
        # In a process of its own: here other tests have initialised classes on other clients.
        done = runs.in_a_process()

        done.assert_outcomes(passed=1)
        assert runs.stored() == 0


class TestRollback:
    @every_flavour
    def test_a_failed_test_is_rolled_back(self, runs: Runs, flavour: str) -> None:
        done = runs(
            """
            @TEST
            async def test_it(session_scope_rollback):
                await Bike().insert()
                raise ValueError
            """,
            flavour=flavour,
        )

        done.assert_outcomes(failed=1)
        assert runs.stored() == 0

    @every_flavour
    def test_a_test_that_is_timed_out_is_rolled_back(self, runs: Runs, flavour: str) -> None:
        done = runs(
            """
            @TEST
            async def test_it(session_scope_rollback):
                await Bike().insert()
                await asyncio.wait_for(asyncio.Event().wait(), 0.01)
            """,
            flavour=flavour,
        )

        done.assert_outcomes(failed=1)
        assert runs.stored() == 0

    # Not on anyio: its plugin can't end any async fixture after such an interrupt.
    def test_a_test_that_pytest_timeout_interrupts_is_rolled_back(self, runs: Runs) -> None:
        runs.write(
            """
            @TEST
            @pytest.mark.timeout(1)
            async def test_it(session_scope_rollback):
                await Bike().insert()
                await asyncio.Event().wait()

            @TEST
            async def test_the_next(session_scope_rollback):
                assert await Bike.count() == 0
            """
        )
        done = runs.in_a_process("-p", "timeout", "-o", "timeout_method=signal")

        done.assert_outcomes(failed=1, passed=1)
        done.stdout.fnmatch_lines(["*Timeout*"])
        assert runs.stored() == 0

    def test_a_failed_fixture_is_rolled_back(self, runs: Runs) -> None:
        done = runs(
            """
            @FIXTURE
            async def broken(session_scope_rollback):
                await Bike().insert()
                raise ValueError

            @TEST
            async def test_it(broken):
                pass
            """
        )

        done.assert_outcomes(errors=1)
        assert runs.stored() == 0

    def test_a_transaction_that_the_server_has_ended_is_rolled_back(self, runs: Runs) -> None:
        runs(
            """
            from pymongo.errors import DuplicateKeyError

            @TEST
            async def test_it(session_scope_rollback):
                bike = await Bike().insert()
                with pytest.raises(DuplicateKeyError):
                    await Bike(id=bike.id).insert()
                with pytest.raises(TransactionAbortedError):
                    await Bike.count()
            """
        ).assert_outcomes(passed=1)

        assert runs.stored() == 0

    def test_retrying_forms_join_it(self, runs: Runs) -> None:
        runs(
            """
            @transactional(collections=[Bike])
            async def sell():
                await Bike().insert()

            @TEST
            async def test_it(session_scope_rollback):
                await sell()
                await run_in_transaction(sell, collections=[Bike])
                async for attempt in transaction_attempts(collections=[Bike]):
                    async with attempt:
                        await sell()
                assert await Bike.count() == 3
            """
        ).assert_outcomes(passed=1)

        assert runs.stored() == 0

    def test_commit_in_the_test_is_refused(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_it(session_scope_rollback):
                await Bike().insert()
                with pytest.raises(PropagationError, match="rolls back after the test"):
                    await current_scope().commit()
            """
        ).assert_outcomes(passed=1)

        assert runs.stored() == 0

    def test_abort_in_the_test_leaves_the_protection_in_force(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_it(session_scope_rollback):
                await Bike().insert()
                await current_scope().abort()
                assert await Bike.count() == 0
                await Bike().insert()
                with pytest.raises(PropagationError, match="rolls back after the test"):
                    await current_scope().commit()
            """
        ).assert_outcomes(passed=1)

        assert runs.stored() == 0

    def test_a_commit_by_hand_is_reported(self, runs: Runs) -> None:
        done = runs(
            """
            @TEST
            async def test_it(session_scope_rollback):
                await Bike().insert()
                await session_scope_rollback.session.commit_transaction()

            @TEST
            async def test_the_next(client):
                assert Bike.get_session() is current_scope() is None
            """
        )

        done.assert_outcomes(passed=2, errors=1)
        done.stdout.fnmatch_lines(["*session_scope_rollback could not roll back*"])


class TestIndependentScopes:
    REQUIRES_NEW = """
        {mark}
        @TEST
        async def test_it(session_scope_rollback):
            async with with_session(collections=[Bike], propagation="requires_new"):
                await Bike().insert()
    """

    def test_requires_new_is_refused(self, runs: Runs) -> None:
        done = runs(self.REQUIRES_NEW.format(mark=""))

        done.assert_outcomes(failed=1)
        done.stdout.fnmatch_lines(["*PropagationError: This scope would be independent*"])
        assert runs.stored() == 0

    def test_requires_new_may_be_allowed(self, runs: Runs) -> None:
        mark = "@pytest.mark.session_scope(allow_requires_new=True)"

        runs(self.REQUIRES_NEW.format(mark=mark)).assert_outcomes(passed=1)

        assert runs.stored() == 1

    def test_a_scope_that_does_not_see_that_of_the_test_is_refused(self, runs: Runs) -> None:
        runs(
            """
            from contextvars import Context

            async def sell():
                async with with_session(collections=[Bike]):
                    await Bike().insert()

            @TEST
            async def test_it(session_scope_rollback):
                with pytest.raises(PropagationError, match="started before the fixture"):
                    await Context().run(asyncio.ensure_future, sell())
                with outside_session(), pytest.raises(PropagationError):
                    await sell()
            """
        ).assert_outcomes(passed=1)

        assert runs.stored() == 0

    def test_a_scope_after_the_test_is_not_refused(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_one(session_scope_rollback):
                await Bike().insert()

            @TEST
            async def test_two(client):
                async with with_session(collections=[Bike]):
                    await Bike().insert()
            """
        ).assert_outcomes(passed=2)

        assert runs.stored() == 1


class TestCollections:
    def test_the_marker_names_the_classes(self, runs: Runs) -> None:
        runs(
            """
            @pytest.mark.session_scope(collections=[Bike])
            @TEST
            async def test_it(session_scope_rollback):
                assert current_scope(Bike) is not None
                assert current_scope(Rider) is None
            """
        ).assert_outcomes(passed=1)

    def test_a_fixture_names_the_classes(self, runs: Runs) -> None:
        runs(
            """
            @pytest.fixture
            def session_scope_collections():
                return [Rider]

            @TEST
            async def test_it(session_scope_rollback):
                assert current_scope(Bike) is None
                assert current_scope(Rider) is not None
            """
        ).assert_outcomes(passed=1)


class TestHooks:
    def test_they_are_listed_and_not_run(self, runs: Runs) -> None:
        runs(
            """
            ran = []

            def mail():
                ran.append("mail")

            def sorry():
                ran.append("sorry")

            @TEST
            async def test_one(session_scope_rollback):
                async with with_session(collections=[Bike]):
                    on_commit(mail)
                    on_abort(sorry)
                assert session_scope_rollback.commit_hooks == [mail]

            @TEST
            async def test_two(session_scope_rollback):
                assert session_scope_rollback.commit_hooks == []
                assert ran == []
            """
        ).assert_outcomes(passed=2)

    @every_flavour
    def test_they_run_in_order_and_see_what_was_written(self, runs: Runs, flavour: str) -> None:
        runs(
            """
            @TEST
            async def test_it(session_scope_rollback):
                ran = []

                async def count():
                    ran.append(await Bike.count())
                    on_commit(lambda: ran.append("nested"))

                async with with_session(collections=[Bike]):
                    await Bike().insert()
                    current_scope().before_commit(lambda: ran.append("before"))
                    on_commit(count)
                    on_commit(lambda: ran.append("second"))
                await session_scope_rollback.run_commit_hooks()
                assert ran == ["before", 1, "second", "nested"]
                await session_scope_rollback.run_commit_hooks()
                assert ran == ["before", 1, "second", "nested"]
            """,
            flavour=flavour,
        ).assert_outcomes(passed=1)

    def test_all_run_and_their_errors_come_together(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_it(session_scope_rollback):
                ran = []

                def fail():
                    raise ValueError

                for hook in (fail, lambda: ran.append(1), fail):
                    on_commit(hook)
                with pytest.raises(HookError, match="2 on_commit hooks failed") as raised:
                    await session_scope_rollback.run_commit_hooks()
                assert ran == [1]
                assert raised.value.committed
                assert [type(error) for error in raised.value.errors] == [ValueError] * 2
                assert isinstance(raised.value.__cause__, ValueError)
            """
        ).assert_outcomes(passed=1)

    def test_a_veto_lets_none_run(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_it(session_scope_rollback):
                ran = []

                def veto():
                    raise ValueError

                current_scope().before_commit(veto)
                on_commit(lambda: ran.append(1))
                with pytest.raises(ValueError):
                    await session_scope_rollback.run_commit_hooks()
                assert ran == session_scope_rollback.commit_hooks == []
            """
        ).assert_outcomes(passed=1)

    def test_none_run_after_a_block_has_failed(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_it(session_scope_rollback):
                with pytest.raises(ValueError):
                    async with with_session(collections=[Bike]):
                        on_commit(print)
                        raise ValueError
                assert session_scope_rollback.commit_hooks == []
                with pytest.raises(SessionScopeError, match="no savepoints"):
                    await session_scope_rollback.run_commit_hooks()
            """
        ).assert_outcomes(passed=1)


class TestRefusals:
    def expect(self, runs: Runs, tests: str, message: str, flavour: str = "asyncio-strict") -> None:
        done = runs(tests, flavour=flavour)

        done.assert_outcomes(errors=1)
        done.stdout.fnmatch_lines([f"*{message}*"])

    def test_a_sync_test(self, runs: Runs) -> None:
        self.expect(
            runs, "def test_it(session_scope_rollback): pass", "is for async tests, and this one"
        )

    def test_a_test_that_no_plugin_runs(self, runs: Runs) -> None:
        self.expect(
            runs, "async def test_it(session_scope_rollback): pass", "no plugin runs this async"
        )

    def test_a_test_on_trio(self, runs: Runs) -> None:
        tests = """
            @pytest.fixture
            def anyio_backend():
                return "trio"

            @pytest.fixture
            def session_scope_client():
                return None

            @TEST
            async def test_it(session_scope_rollback):
                pass
        """

        self.expect(runs, tests, "this test runs on trio", flavour="anyio")

    @pytest.mark.parametrize(
        "arguments", ["allow_requires_new=1", "client=None", "[Bike]", "requires_new=True"]
    )
    def test_a_marker_with_other_arguments(self, runs: Runs, arguments: str) -> None:
        tests = f"""
            @pytest.mark.session_scope({arguments})
            @TEST
            async def test_it(session_scope_rollback):
                pass
        """

        self.expect(runs, tests, "it takes nothing else")

    def test_a_class_without_the_mixin(self, runs: Runs) -> None:
        tests = """
            @pytest.mark.session_scope(collections=[PlainBike])
            @TEST
            async def test_it(session_scope_rollback):
                pass
        """

        self.expect(runs, tests, "PlainBike has no SessionScopeMixin")

    def test_a_class_that_is_not_initialised_yet(self, runs: Runs) -> None:
        tests = """
            from beanie import Document

            class Late(SessionScopeMixin, Document):
                pass

            @pytest.mark.session_scope(collections=[Late])
            @TEST
            async def test_it(session_scope_rollback):
                pass
        """

        self.expect(runs, tests, "override the fixture session_scope_client")
