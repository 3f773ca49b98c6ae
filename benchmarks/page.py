"""The tables of docs/benchmarks.md, and the plots, from the records: ``python -m benchmarks.page``.

With ``--check`` nothing is written, and it fails where the page says something else.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from . import (
    batches,
    cancellation,
    concurrency,
    contention,
    failover,
    footprint,
    overhead,
    scaling,
    web,
)
from .record import RESULTS, Record, file_of
from .table import as_markdown, table_of

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (
        overhead,
        footprint,
        concurrency,
        scaling,
        cancellation,
        contention,
        failover,
        batches,
        web,
    )
}
DRIVERS = ("PyMongo Async", "Motor")
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
PLACE = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.S)


def update(results: Path, driver: str, *, with_page: bool) -> None:
    """Draw the plots of a driver's records.

    Args:
        results: The directory of results.
        driver: The name of the driver.
        with_page: Whether to write the tables of the page, too.
    """
    from .plot import draw  # the check of the page needs no matplotlib

    for name, benchmark in BENCHMARKS.items():
        file = file_of(results, driver, name)
        if file.exists():
            draw(benchmark, Record.read(file), results)
    if with_page:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def written(text: str) -> str:
    """Return the page with the figures of the records."""
    return PLACE.sub(lambda found: "\n".join((found[1], *_results(found[2]), "", found[3])), text)


def _results(name: str) -> Iterator[str]:
    """Write what the records of a benchmark, or of all runs, say."""
    if name == "runs":
        yield from _runs()
        return
    benchmark = BENCHMARKS[name]
    for driver in DRIVERS:
        file = file_of(RESULTS, driver, name)
        if not file.exists():
            continue
        record = Record.read(file)
        svg = file.with_suffix(".svg").relative_to(PAGE.parents[1]).as_posix()
        plot = f"![{benchmark.title} with {driver}: the figures of the table below](../{svg})"
        heading = f"**Beanie {record.versions['beanie']}, {driver}**"
        yield "\n\n".join((heading, plot, as_markdown(*table_of(record, benchmark.x_name)), ""))


def _runs() -> Iterator[str]:
    """Write what was measured with, and where."""
    for driver in DRIVERS:
        files = [file_of(RESULTS, driver, name) for name in BENCHMARKS]
        records = [Record.read(file) for file in files if file.exists()]
        if not records:
            continue
        first, machine = records[0], records[0].machine
        loads = [load for record in records for load in record.machine["load"]]
        versions = ", ".join(f"{name} {number}" for name, number in first.versions.items())
        yield (
            f"* **{driver}**, {first.date}: {versions}. {machine['system']} on "
            f"{machine['architecture']}, {machine['processors']} processors, "
            f"{machine['memory_gb']:g} GB of memory; load average {min(loads):g} to "
            f"{max(loads):g}; {sum(record.seconds for record in records) / 60:.0f} minutes in "
            f"all, size: {', '.join(sorted({record.size for record in records}))}. "
            f"{' '.join(sorted({record.note for record in records if record.note}))}"
        ).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        for driver in DRIVERS:
            update(RESULTS, driver, with_page=True)
    elif written(text := PAGE.read_text(encoding="utf-8")) != text:
        sys.exit("docs/benchmarks.md has other figures than the records: python -m benchmarks.page")


if __name__ == "__main__":
    main()
