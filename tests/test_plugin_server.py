"""``mongo_replica_set``: one server for a test run, whatever number of processes it has."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugin_models import DATABASE
from plugin_runs import Runs, line_of
from pymongo.uri_parser import parse_uri

CREDENTIALS = "someone:secret"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let processes that are started listen to Ctrl-C, also where this one runs in the background.

    A shell has those ignore the signal, and they hand that on.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def is_listening(uri: str) -> bool:
    (address,) = parse_uri(uri)["nodelist"]
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


class TestNamedServer:
    """The environment variable ``MONGODB_URI`` names one."""

    def test_it_is_used(self, runs: Runs) -> None:
        runs(
            f"""
            def test_it(mongo_replica_set):
                assert mongo_replica_set.uri == {runs.uri!r}
                assert {runs.uri!r} not in repr(mongo_replica_set)
            """
        ).assert_outcomes(passed=1)

    def test_what_only_its_owner_can_do_is_explained(self, runs: Runs) -> None:
        runs(
            """
            def test_it(mongo_replica_set):
                with pytest.raises(AttributeError, match="starts one of its own"):
                    mongo_replica_set.fail_point("insert", error_code=1)
                assert not hasattr(mongo_replica_set, "urii")
            """
        ).assert_outcomes(passed=1)

    @pytest.mark.parametrize("named", [f"http://{CREDENTIALS}@server", CREDENTIALS])
    def test_what_is_no_connection_string_is_refused_and_not_shown(
        self, runs: Runs, monkeypatch: pytest.MonkeyPatch, named: str
    ) -> None:
        runs.write("def test_it(mongo_replica_set): pass")
        monkeypatch.setenv("MONGODB_URI", named)
        done = runs.in_a_process()

        done.assert_outcomes(errors=1)
        done.stdout.fnmatch_lines(["*MONGODB_URI is no connection string*"])
        assert "secret" not in done.stdout.str()


NOTED = """
    import os
    from pathlib import Path

    def note(mongo_replica_set):
        Path(f"uri-{os.getpid()}").write_text(mongo_replica_set.uri)
"""


def noted() -> list[str]:
    """Return the connection string that each process of a run has noted."""
    return [path.read_text() for path in Path().glob("uri-*")]


@pytest.mark.starts_servers
class TestOwnServer:
    @pytest.fixture(autouse=True)
    def _no_server_is_named(self, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MONGODB_URI")

    def test_it_is_started_once_and_is_gone_after_the_run(self, runs: Runs) -> None:
        done = runs(
            f"""{NOTED}
    @pytest.mark.parametrize("n", [1, 2])
    def test_it(mongo_replica_set, n):
        note(mongo_replica_set)
        assert mongo_replica_set.primary.alive

    @TEST
    async def test_its_client(client):
        assert await Bike.count() == 0
            """
        )

        done.assert_outcomes(passed=3)
        (uri,) = noted()
        assert not is_listening(uri)

    @pytest.mark.timeout(60)
    @pytest.mark.usefixtures("interruptible")
    def test_it_is_gone_after_an_interrupt(self, runs: Runs) -> None:
        runs.write(
            f"""{NOTED}
    import signal

    def test_it(mongo_replica_set):
        note(mongo_replica_set)
        os.kill(os.getpid(), signal.SIGINT)
            """
        )
        done = runs.in_a_process()

        assert done.ret == pytest.ExitCode.INTERRUPTED
        (uri,) = noted()
        assert not is_listening(uri)


class TestWorkers:
    """The processes of pytest-xdist."""

    @pytest.mark.starts_servers
    @pytest.mark.timeout(90)
    def test_all_share_one_server_which_outlives_them(
        self, runs: Runs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MONGODB_URI")
        done = runs(
            f"""{NOTED}
    @TEST
    @pytest.mark.parametrize("n", range(4))
    async def test_it(client, mongo_replica_set, n):
        note(mongo_replica_set)
        await Bike().insert()
        if n == 0:
            os._exit(1)  # the worker that used the server first, perhaps
            """,
            *("-p", "xdist", "-n", "2"),
        )

        done.assert_outcomes(passed=3, failed=1)
        assert len(noted()) >= 2
        (uri,) = set(noted())
        assert not is_listening(uri)

    @pytest.mark.timeout(90)
    def test_the_options_hold_in_each(self, runs: Runs) -> None:
        tests = """
            @TEST
            @pytest.mark.parametrize("n", range(2))
            async def test_it(database, n):
                calls = []

                async def sell():
                    calls.append(1)
                    await database["bikes"].find_one()  # raw

                await run_in_transaction(sell, collections=[Bike])
                assert len(calls) == 2
        """
        runs.write(tests)
        done = runs.in_a_process(
            *("-p", "xdist", "-n", "2", "--scope-detect-leaks", "--scope-force-retry")
        )

        done.assert_outcomes(failed=2)
        leak = f"  test_it.py:{line_of(tests, '# raw')} in sell(): find on {DATABASE}.bikes *"
        done.stdout.fnmatch_lines([leak, leak])

    @pytest.mark.starts_servers
    @pytest.mark.timeout(90)
    @pytest.mark.usefixtures("interruptible")
    def test_the_server_is_gone_after_an_interrupt(
        self, runs: Runs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MONGODB_URI")
        runs.write(
            f"""{NOTED}
    import signal

    def test_it(mongo_replica_set):
        note(mongo_replica_set)
        os.kill(os.getppid(), signal.SIGINT)
            """
        )
        done = runs.in_a_process("-p", "xdist", "-n", "1")

        assert done.ret == pytest.ExitCode.INTERRUPTED
        (uri,) = noted()
        assert not is_listening(uri)
