"""What the benchmarks have in common: a server, a client, the size of the work, and the output."""

from __future__ import annotations

import argparse
import asyncio
import inspect
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from beanie import init_beanie
from pymongo import MongoClient

from beanie_session_scope.drivers import DRIVER
from beanie_session_scope.testing import ReplicaSet

from .measure import Row
from .models import Plain, PlainCounter, PlainEntry, Scoped, ScopedCounter, ScopedEntry
from .record import RESULTS, Record, load, new_record
from .table import as_text, table_of

DATABASE = "beanie_session_scope_benchmarks"
APP_NAME = "beanie_session_scope_benchmarks"
MODELS: list[Any] = [Plain, PlainCounter, PlainEntry, Scoped, ScopedCounter, ScopedEntry]
SIZES = ("full", "quick", "tiny")

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """What a benchmark runs in.

    Attributes:
        uri: The server's connection string.
        client: A client of the installed driver.
        size: How much to do: one of ``SIZES``.
        replica_set: The servers, where the benchmark has some of its own.
    """

    uri: str
    client: Any
    size: str
    replica_set: ReplicaSet | None = None

    def pick(self, full: T, quick: T, tiny: T) -> T:
        """Return what belongs to the size."""
        return {"full": full, "quick": quick, "tiny": tiny}[self.size]

    @property
    def database(self) -> Any:
        """The database of the benchmarks."""
        return self.client[DATABASE]

    @contextmanager
    def slow(self, command: str, milliseconds: int) -> Iterator[None]:
        """Let the server hold one command of the benchmark for a while before it runs it."""
        data = {
            "failCommands": [command],
            "appName": APP_NAME,
            "blockConnection": True,
            "blockTimeMS": milliseconds,
        }
        with MongoClient[Any](self.uri) as admin:
            point = {"configureFailPoint": "failCommand"}
            admin.admin.command({**point, "mode": {"times": 1}, "data": data})
            try:
                yield
            finally:
                admin.admin.command({**point, "mode": "off"})


@dataclass(frozen=True)
class Benchmark:
    """One of the benchmarks.

    Attributes:
        name: The name of its module.
        title: What it is about.
        rows: Measures, and yields each row when it is done.
        x_name: What the ``x`` of its rows counts.
        plot: How it is drawn: ``"ratios"`` of its rows, ``"lines"`` over ``x``, or ``"bars"``.
        nodes: How many servers it needs of its own; 0 where it may share one.
    """

    name: str
    title: str
    rows: Callable[[Setting], AsyncIterator[Row]]
    x_name: str = ""
    plot: str = "ratios"
    nodes: int = 0


@asynccontextmanager
async def client_of(uri: str) -> AsyncIterator[Any]:
    """Yield a client, the classes initialised on it and their data gone."""
    client = DRIVER.client_class(uri, appname=APP_NAME)
    try:
        await client.drop_database(DATABASE)
        await init_beanie(database=client[DATABASE], document_models=MODELS)
        existing = await client[DATABASE].list_collection_names()
        for model in MODELS:
            if model.__name__ not in existing:
                # Two transactions that both create the collection would conflict.
                await client[DATABASE].create_collection(model.__name__)
        yield client
        await client.drop_database(DATABASE)
    finally:
        closing = client.close()
        if inspect.isawaitable(closing):
            await closing


@contextmanager
def server_of(benchmark: Benchmark) -> Iterator[tuple[str, ReplicaSet | None]]:
    """Yield the connection string of a server, and the replica set if it is the benchmark's own."""
    if (named := os.environ.get("MONGODB_URI")) and not benchmark.nodes:
        yield named, None
    else:
        with ReplicaSet(nodes=benchmark.nodes or 1) as replica_set:
            yield replica_set.uri, replica_set


async def run(benchmark: Benchmark, arguments: argparse.Namespace) -> Record:
    """Run a benchmark, print its table, and write its record.

    Args:
        benchmark: Which.
        arguments: Those of the command line.
    """
    with server_of(benchmark) as (uri, replica_set):
        async with client_of(uri) as client:
            server = (await client.server_info())["version"]
            record = new_record(benchmark.name, arguments.size, arguments.note, server)
            begin = time.monotonic()
            rows = []
            async for row in benchmark.rows(Setting(uri, client, arguments.size, replica_set)):
                rows.append(row)
                print(".", end="", flush=True)
            record = replace(
                record,
                seconds=time.monotonic() - begin,
                rows=tuple(rows),
                machine={**record.machine, "load": [*record.machine["load"], load()]},
            )
    print(f"\n{report(benchmark, record)}\n", flush=True)
    record.write(arguments.results)
    return record


def report(benchmark: Benchmark, record: Record) -> str:
    """Return the table of a record, with a heading."""
    heading = (
        f"{benchmark.title}: {record.driver}, Beanie {record.versions['beanie']}, "
        f"Python {record.versions['python']}, {record.seconds:.0f} s"
    )
    return f"{heading}\n\n{as_text(*table_of(record, benchmark.x_name))}"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the options that all commands have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", choices=SIZES, default="full", help="how much to do")
    size.add_argument(
        "--quick", action="store_const", const="quick", dest="size", help="the same as --size quick"
    )
    parser.add_argument("--note", default="", help="what to say of this run in its record")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the directory for records and plots"
    )
    return parser


def main(benchmark: Benchmark, description: str | None) -> None:
    """Run a benchmark as a command of its own, and draw its plot."""
    options = parser(description)
    options.add_argument("--no-plot", action="store_true", help="write the record only")
    arguments = options.parse_args()
    record = asyncio.run(run(benchmark, arguments))
    if not arguments.no_plot:
        from .plot import draw  # matplotlib is for those who want plots

        draw(benchmark, record, arguments.results)
