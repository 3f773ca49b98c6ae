"""The shop as its documentation says: one command, and what that tells the reader to try."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pymongo import MongoClient

pytestmark = pytest.mark.timeout(90)

ROOT = Path(__file__).parents[1]


@contextmanager
def command(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run ``python -m examples.shop``; kill it if it has not ended by itself."""
    with subprocess.Popen(
        [sys.executable, "-m", "examples.shop", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[str]) -> tuple[str, list[str]]:
    """Return the URL of a shop that has opened, and the commands that it tells to try."""
    assert process.stdout is not None
    url, commands = "", []
    while len(commands) < 3:
        line = process.stdout.readline()
        assert line, "the shop has closed at once"
        url = line.split()[-1] if "is open" in line else url
        commands += [line.strip()] if line.startswith("  curl") else []
    return url, commands


def curl(line: str) -> httpx.Response:
    """Do what ``curl`` does with the few options that the shop tells to use."""
    parser = ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("-X", dest="method")
    parser.add_argument("-H", dest="headers", action="append", default=[])
    parser.add_argument("-d", dest="data")
    options = parser.parse_args(shlex.split(line)[1:])
    method = options.method or ("POST" if options.data else "GET")
    headers = dict(header.split(": ", 1) for header in options.headers)
    return httpx.request(method, options.url, headers=headers, content=options.data, timeout=30)


def processes() -> dict[int, tuple[int, str]]:
    """Return the parent and the name of every process, by its id."""
    listed = subprocess.check_output(["ps", "-A", "-o", "pid=,ppid=,comm="], text=True)
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return {int(pid): (int(parent), name) for pid, parent, name in rows}


def processes_below(pid: int) -> dict[int, str]:
    return {child: name for child, (parent, name) in processes().items() if parent == pid}


def close(process: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> None:
    """Close a shop as Ctrl-C, or a service manager, does."""
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.endswith("The shop is closed.\n")
    assert "Traceback" not in errors


def databases(uri: str) -> set[str]:
    with MongoClient[Any](uri) as client:
        return {name for name in client.list_database_names() if "_shop_" in name}


class TestOneCommand:
    def test_opens_a_shop_in_which_what_it_says_works(self, server_uri: str) -> None:
        with command("--port", "0", MONGODB_URI=server_uri) as process:
            url, commands = told(process)
            answers = [curl(line) for line in commands]
            close(process)

        assert url.startswith("http://127.0.0.1:")
        assert [answer.status_code for answer in answers] == [200, 200, 201]
        assert answers[2].json()["total"] == 3900

    def test_leaves_no_database_behind_where_a_server_is_named(self, server_uri: str) -> None:
        before = databases(server_uri)
        with command("--port", "0", MONGODB_URI=server_uri) as process:
            url, _ = told(process)
            httpx.get(f"{url}/products", timeout=30).raise_for_status()
            meanwhile = databases(server_uri)
            close(process)

        assert len(meanwhile - before) == 1
        assert databases(server_uri) == before

    @pytest.mark.starts_servers
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_leaves_no_server_behind_where_none_is_named(self, number: signal.Signals) -> None:
        with command("--port", "0", MONGODB_URI="") as process:
            told(process)
            started = processes_below(process.pid)
            close(process, number)

        assert any("mongod" in name for name in started.values())
        assert started.keys() & processes().keys() == set()

    def test_says_so_where_its_port_is_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with command("--port", str(port)) as process:
                output, errors = process.communicate()

        assert process.returncode == 1
        assert f"Can't use port {port}" in errors
        assert "Traceback" not in errors
        assert output == ""
