"""``--scope-force-retry``: every transaction that may be run again is run again."""

from __future__ import annotations

from plugin_runs import Runs, every_flavour

OPTION = "--scope-force-retry"


class TestForms:
    @every_flavour
    def test_each_runs_twice_and_is_stored_once(self, runs: Runs, flavour: str) -> None:
        runs(
            """
            calls = []

            async def sell(form):
                calls.append(form)
                await Bike().insert()

            decorated = transactional(sell)

            @TEST
            async def test_it(client):
                await run_in_transaction(sell, "function", client=client)
                await transactional(client=client)(sell)("decorator")
                async for attempt in transaction_attempts(client=client):
                    async with attempt:
                        await sell("loop")
                assert calls == ["function"] * 2 + ["decorator"] * 2 + ["loop"] * 2
                assert await Bike.count() == 3
            """,
            OPTION,
            flavour=flavour,
        ).assert_outcomes(passed=1)

        assert runs.stored() == 3

    def test_a_plain_scope_runs_once(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_it(client):
                async with with_session(collections=[Bike]):
                    await Bike().insert()
            """,
            OPTION,
        ).assert_outcomes(passed=1)

        assert runs.stored() == 1

    def test_a_form_that_joins_runs_once(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_it(client):
                calls = []

                async def sell():
                    calls.append(1)

                async with with_session(collections=[Bike]):
                    await run_in_transaction(sell, collections=[Bike])
                assert calls == [1]
            """,
            OPTION,
        ).assert_outcomes(passed=1)

    def test_an_attempt_that_fails_by_itself_is_left_alone(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_it(client):
                calls = []

                async def sell():
                    calls.append(1)
                    raise ValueError

                with pytest.raises(ValueError):
                    await run_in_transaction(sell, collections=[Bike])
                assert calls == [1]
            """,
            OPTION,
        ).assert_outcomes(passed=1)

    def test_nothing_is_forced_without_the_option(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_it(client):
                calls = []

                async def sell():
                    calls.append(1)

                await run_in_transaction(sell, collections=[Bike])
                assert calls == [1]
            """
        ).assert_outcomes(passed=1)


class TestFirstAttempt:
    def test_it_fails_after_an_abort_in_it_too(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_it(client):
                calls = []

                async def sell():
                    calls.append(1)
                    await Bike().insert()
                    await current_scope().abort()
                    await Bike().insert()

                await run_in_transaction(sell, collections=[Bike])
                assert calls == [1, 1]
                assert await Bike.count() == 1
            """,
            OPTION,
        ).assert_outcomes(passed=1)

    def test_it_is_rolled_back_on_the_server(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_it(client):
                seen = []

                async def sell():
                    seen.append(await Bike.count())
                    await Bike().insert()
                    seen.append(await Bike.count())

                await run_in_transaction(sell, collections=[Bike])
                assert seen == [0, 1, 0, 1]
            """,
            OPTION,
        ).assert_outcomes(passed=1)

    def test_it_fails_after_the_hooks_of_the_user(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_it(client):
                ran = []

                async def last():
                    ran.append("last")

                def first():
                    ran.append("first")
                    current_scope().before_commit(last)

                async def sell():
                    current_scope().before_commit(first)
                    on_commit(lambda: ran.append("committed"))

                await run_in_transaction(sell, collections=[Bike])
                assert ran == ["first", "last", "first", "last", "committed"]
            """,
            OPTION,
        ).assert_outcomes(passed=1)

    def test_its_error_is_that_of_a_write_conflict(self, runs: Runs) -> None:
        runs(
            """
            from pymongo.errors import OperationFailure

            @TEST
            async def test_it(client):
                errors = []

                class Seen(ScopeObserver):
                    def scope_left(self, scope, error, retry_in):
                        errors.append(error)

                stop = observe(Seen())
                async for attempt in transaction_attempts(collections=[Bike]):
                    async with attempt:
                        pass
                stop()
                error, nothing = errors
                assert nothing is None
                assert isinstance(error, OperationFailure)
                assert error.code == 112
                assert error.has_error_label("TransientTransactionError")
            """,
            OPTION,
        ).assert_outcomes(passed=1)


class TestFinding:
    UNSAFE = """
        {mark}
        @TEST
        async def test_it(client):
            mails = []

            async def sell():
                await Bike().insert()
                mails.append("sold")

            await run_in_transaction(sell, collections=[Bike])
            assert mails == ["sold"]
    """

    def test_a_callback_that_is_not_safe_to_retry_is_found(self, runs: Runs) -> None:
        runs(self.UNSAFE.format(mark="")).assert_outcomes(passed=1)
        done = runs(self.UNSAFE.format(mark=""), OPTION)

        done.assert_outcomes(failed=1)
        done.stdout.fnmatch_lines(
            [
                f"beanie_session_scope: every first attempt of a transaction fails ({OPTION})",
                "*Captured session scope call*",
                f"{OPTION} made the first attempt of 1 transactions fail*",
            ]
        )

    def test_a_test_may_be_spared(self, runs: Runs) -> None:
        tests = self.UNSAFE.format(mark="@pytest.mark.no_force_retry")

        runs(tests, OPTION, "--strict-markers").assert_outcomes(passed=1)

    def test_nothing_is_forced_once_the_run_is_over(self, runs: Runs) -> None:
        runs(self.UNSAFE.format(mark=""), OPTION).assert_outcomes(failed=1)

        runs(self.UNSAFE.format(mark="")).assert_outcomes(passed=1)
