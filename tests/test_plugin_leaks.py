"""``--scope-detect-leaks``: operations outside the scope that is open fail their test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from plugin_models import DATABASE
from plugin_runs import Runs, every_flavour, line_of

OPTION = "--scope-detect-leaks"


def leaks_of(done: pytest.RunResult) -> list[str]:
    """Return the lines of the report that say what was found, and where."""
    return [line.strip() for line in done.outlines if re.match(r"  (test_it\.py:|some)", line)]


def expect(runs: Runs, tests: str, *expected: str, flavour: str = "asyncio-strict") -> None:
    """Run one test that leaks; ``expected``: the mark of a line, a comma, what is said of it."""
    done = runs(tests, OPTION, flavour=flavour)

    done.assert_outcomes(failed=1)
    wanted = []
    for each in expected:
        mark, said = each.split(", ", 1)
        wanted.append(f"test_it.py:{line_of(tests, f'# {mark}')} in {said}")
    assert sorted(leaks_of(done)) == sorted(wanted)  # of what is gathered, any may be first


class TestWhere:
    @every_flavour
    def test_the_line_that_asked_the_driver_is_named(self, runs: Runs, flavour: str) -> None:
        tests = """
            async def audit(database):
                await database["bikes"].insert_one(
                    {"name": "raw"}
                )  # end

            async def sell(database):
                await Bike().insert()
                await audit(database)

            @TEST
            async def test_it(database):
                async with with_session(collections=[Bike]):
                    await sell(database)
        """
        done = runs(tests, OPTION, flavour=flavour)

        done.assert_outcomes(failed=1)
        line = line_of(tests, "# end") - 2
        where = f"test_it.py:{line} in audit()"
        assert leaks_of(done) == [f"{where}: insert on {DATABASE}.bikes (class Bike)"]

    def test_every_leak_is_listed_once_and_counted(self, runs: Runs) -> None:
        expect(
            runs,
            """
            @TEST
            async def test_it(database):
                async with with_session(collections=[Bike]):
                    for _ in range(3):
                        await database["bikes"].insert_one({})  # one
                    await database["bikes"].delete_many({})  # two
            """,
            f"one, test_it(): insert on {DATABASE}.bikes (class Bike), 3 times",
            f"two, test_it(): delete on {DATABASE}.bikes (class Bike)",
        )

    def test_a_cursor_and_its_further_batches(self, runs: Runs) -> None:
        expect(
            runs,
            """
            @TEST
            async def test_it(database):
                await database["bikes"].insert_many([{} for _ in range(6)])
                async with with_session(collections=[Bike]):
                    found = database["bikes"].find().batch_size(2)
                    assert len(await found.to_list(6)) == 6  # list
                    async for _ in database["bikes"].find().batch_size(3):  # loop
                        pass
            """,
            f"list, test_it(): find on {DATABASE}.bikes (class Bike)",
            f"list, test_it(): getMore on {DATABASE}.bikes (class Bike), 2 times",
            f"loop, test_it(): find on {DATABASE}.bikes (class Bike)",
            f"loop, test_it(): getMore on {DATABASE}.bikes (class Bike), 2 times",
        )

    def test_a_cursor_that_was_opened_before_the_scope(self, runs: Runs) -> None:
        expect(
            runs,
            """
            @TEST
            async def test_it(database):
                await database["bikes"].insert_many([{} for _ in range(4)])
                found = database["bikes"].find().batch_size(2)
                assert await found.to_list(2)
                async with with_session(collections=[Bike]):
                    await found.to_list(2)  # more
            """,
            f"more, test_it(): getMore on {DATABASE}.bikes (class Bike)",
        )

    def test_operations_that_are_gathered(self, runs: Runs) -> None:
        expect(
            runs,
            """
            @TEST
            async def test_it(database):
                bikes = database["bikes"]
                async with with_session(collections=[Bike]):
                    await asyncio.gather(
                        bikes.insert_one({}),  # first
                        bikes.find_one({}),  # second
                        PlainBike().insert(),  # third
                    )
            """,
            f"first, test_it(): insert on {DATABASE}.bikes (class Bike)",
            f"second, test_it(): find on {DATABASE}.bikes (class Bike)",
            f"third, test_it(): insert on {DATABASE}.bikes (class Bike)",
        )

    def test_a_task_that_was_started_in_the_scope(self, runs: Runs) -> None:
        expect(
            runs,
            """
            async def audit(database):
                await database["bikes"].find_one()  # audit

            @TEST
            async def test_it(database):
                async with with_session(collections=[Bike]):
                    await asyncio.create_task(audit(database))
            """,
            f"audit, audit(): find on {DATABASE}.bikes (class Bike)",
        )

    def test_a_blocking_client_in_a_thread(self, runs: Runs) -> None:
        expect(
            runs,
            """
            from plugin_models import DATABASE
            from pymongo import MongoClient

            def audit(uri):
                with MongoClient(uri) as client:
                    client[DATABASE]["bikes"].insert_one({})  # blocking

            @TEST
            async def test_it(client, mongo_replica_set):
                async with with_session(collections=[Bike]):
                    await asyncio.to_thread(audit, mongo_replica_set.uri)
            """,
            f"blocking, audit(): insert on {DATABASE}.bikes (class Bike)",
        )

    def test_a_fixture(self, runs: Runs) -> None:
        tests = """
            @FIXTURE
            async def scope(database):
                async with with_session(collections=[Bike]):
                    await database["bikes"].insert_one({})  # begin
                yield
                async with with_session(collections=[Bike]):
                    await database["bikes"].delete_many({})  # end

            @TEST
            async def test_it(scope):
                pass
        """
        done = runs(tests, OPTION)

        done.assert_outcomes(errors=2)
        assert [leak.split()[0] for leak in leaks_of(done)] == [
            f"test_it.py:{line_of(tests, '# begin')}",
            f"test_it.py:{line_of(tests, '# end')}",
        ]


class TestWhat:
    def test_a_class_without_the_mixin(self, runs: Runs) -> None:
        expect(
            runs,
            """
            @TEST
            async def test_it(client):
                async with with_session(collections=[Bike]):
                    await PlainBike().insert()  # plain
            """,
            f"plain, test_it(): insert on {DATABASE}.bikes (class Bike)",
        )

    def test_a_class_that_the_scope_does_not_bind(self, runs: Runs) -> None:
        expect(
            runs,
            """
            @TEST
            async def test_it(client):
                async with with_session(collections=[Bike]):
                    await Rider().insert()  # rider
            """,
            f"rider, test_it(): insert on {DATABASE}.riders (class Rider)",
        )

    def test_a_session_that_was_bound_by_hand(self, runs: Runs) -> None:
        expect(
            runs,
            """
            import inspect

            @TEST
            async def test_it(client, database):
                session = client.start_session()
                if inspect.isawaitable(session):
                    session = await session
                with bind_session(session, collections=[Bike]):
                    await Bike.count()
                    await database["bikes"].find_one()  # raw
                await session.end_session()
            """,
            f"raw, test_it(): find on {DATABASE}.bikes (class Bike)",
        )

    def test_another_transaction_of_its_own(self, runs: Runs) -> None:
        expect(
            runs,
            """
            import inspect

            @TEST
            async def test_it(client, database):
                async with with_session(collections=[Bike]):
                    session = client.start_session()
                    if inspect.isawaitable(session):
                        session = await session
                    await database["bikes"].find_one({}, session=session)  # other
                    await session.end_session()
            """,
            f"other, test_it(): find on {DATABASE}.bikes (class Bike)",
        )

    def test_the_rollback_of_a_test(self, runs: Runs) -> None:
        expect(
            runs,
            """
            @TEST
            async def test_it(session_scope_rollback, database):
                await Bike().insert()
                assert await database["bikes"].find_one() is None  # raw
            """,
            f"raw, test_it(): find on {DATABASE}.bikes (class Bike)",
        )

    def test_the_failure_of_a_test_comes_first(self, runs: Runs) -> None:
        done = runs(
            """
            @TEST
            async def test_it(database):
                async with with_session(collections=[Bike]):
                    await database["bikes"].find_one()
                    raise ValueError("the failure")
            """,
            OPTION,
        )

        done.assert_outcomes(failed=1)
        done.stdout.fnmatch_lines(
            ["E * ValueError: the failure", "*session scope leaks call*", "  test_it.py:*: find *"]
        )

    EARLY = """
        from early import client as early
        from plugin_models import DATABASE, MODELS
        from beanie import init_beanie
        from clients import close

        @TEST
        async def test_it():
            await init_beanie(database=early[DATABASE], document_models=MODELS)
            async with with_session(client=early, collections=[Bike]):
                await early[DATABASE]["bikes"].find_one()  # raw
            await close(early)
    """

    def run_early(self, runs: Runs, *arguments: str, conftest: str = "") -> pytest.RunResult:
        """Run tests whose client is created when a plugin, or a conftest.py, is loaded."""
        runs.write(self.EARLY)
        with Path("conftest.py").open("a") as file:
            file.write(conftest)
        runs.pytester.makepyfile(
            early="""
            import os
            from beanie_session_scope.drivers import DRIVER

            client = DRIVER.client_class(os.environ["MONGODB_URI"])
            """
        )
        # In a process of its own: the listener of this one may be there already.
        return runs.in_a_process(*arguments, OPTION)

    def test_the_client_of_a_conftest_is_watched(self, runs: Runs) -> None:
        done = self.run_early(runs, conftest="\nimport early\n")

        done.assert_outcomes(failed=1)
        line = line_of(self.EARLY, "# raw")
        assert leaks_of(done) == [
            f"test_it.py:{line} in test_it(): find on {DATABASE}.bikes (class Bike)"
        ]

    def test_a_client_that_can_not_be_watched_is_reported(self, runs: Runs) -> None:
        done = self.run_early(runs, "-p", "early")

        done.assert_outcomes(failed=1)
        done.stdout.fnmatch_lines(["*the client of this scope was created before*"])


NO_LEAKS = {
    "operations of bound classes": """
        await Bike().insert()
        await Bike.find_one()
        await Bike.find().to_list()
        await Bike.aggregate([]).to_list()
        await Bike.find().update({"$set": {"name": "old"}})
        await Bike.find().delete()
        await asyncio.gather(*(Bike().insert() for _ in range(3)))
    """,
    "the session handed to the driver": """
        await database["bikes"].insert_one({}, session=session)
        await PlainBike().insert(session=session)
    """,
    "a class put outside": """
        with outside_session(Rider):
            await Rider().insert()
            await database["riders"].find_one()
    """,
    "all put outside": """
        with outside_session():
            await Rider().insert()
            await Bike.find_one()
    """,
    "a scope in a scope": """
        async with with_session(collections=[Rider], propagation="requires_new"):
            await Rider().insert()
            await database["bikes"].insert_one({}, session=session)
    """,
    "the session of another open scope": """
        async with with_session(collections=[Bike], propagation="requires_new"):
            await database["bikes"].find_one({}, session=session)
    """,
    "other collections": """
        await database["others"].insert_one({})
        await database.list_collection_names()
    """,
    "metadata": """
        await Bike.inspect_collection()
        await collection_of(Bike).index_information()
    """,
    "a commit in the block": """
        await Bike().insert()
        await current_scope().commit()
        await Bike().insert()
    """,
}


class TestNoLeak:
    @pytest.mark.parametrize("body", NO_LEAKS.values(), ids=list(NO_LEAKS))
    def test_in_a_scope(self, runs: Runs, body: str) -> None:
        head = """
    @TEST
    async def test_it(client, database):
        async with with_session(collections=[Bike]) as session:
"""
        indented = "\n".join(f"    {line}" for line in body.splitlines())
        done = runs(head + indented + "\n", OPTION)

        done.assert_outcomes(passed=1)

    def test_outside_any_scope(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_it(client, database):
                await database["bikes"].insert_one({})
                async with with_session(collections=[Bike]):
                    await Bike.count()
                    on_commit(lambda: database["bikes"].insert_one({}))
                await PlainBike().insert()
                assert await Bike.count() == 3
            """,
            OPTION,
        ).assert_outcomes(passed=1)

    def test_a_task_that_was_started_before_the_scope(self, runs: Runs) -> None:
        runs(
            """
            @TEST
            async def test_it(database):
                go = asyncio.Event()

                async def watch():
                    await go.wait()
                    await database["bikes"].find_one()

                watching = asyncio.ensure_future(watch())
                await asyncio.sleep(0)
                async with with_session(collections=[Bike]):
                    await Bike().insert()
                    go.set()
                    await watching
            """,
            OPTION,
        ).assert_outcomes(passed=1)

    def test_a_test_may_be_spared(self, runs: Runs) -> None:
        runs(
            """
            @pytest.mark.no_detect_leaks
            @TEST
            async def test_one(database):
                async with with_session(collections=[Bike]):
                    await database["bikes"].find_one()

            @TEST
            async def test_two(database):
                pass
            """,
            OPTION,
            "--strict-markers",
        ).assert_outcomes(passed=2)

    def test_nothing_is_looked_at_without_the_option(self, runs: Runs) -> None:
        tests = """
            @TEST
            async def test_it(database):
                async with with_session(collections=[Bike]):
                    await database["bikes"].find_one()
        """
        runs(tests, OPTION).assert_outcomes(failed=1)

        runs(tests).assert_outcomes(passed=1)
