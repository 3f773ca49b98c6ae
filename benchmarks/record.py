"""The record of a run: what was measured, with what, and where, as a JSON file.

It names no host, user or directory, so that it can be published.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from beanie_session_scope.drivers import DRIVER

from .measure import Goal, Quartiles, Row

RESULTS = Path(__file__).parent / "results"
FORMAT = 1
PACKAGES = ("beanie_session_scope", "beanie", "motor", "pymongo", "pydantic")


@dataclass(frozen=True)
class Record:
    """One run of a benchmark.

    Attributes:
        benchmark: Its name.
        driver: The driver that the installed Beanie uses.
        date: The day of the run, in UTC.
        size: ``"full"``, ``"quick"`` or ``"tiny"``; the latter two say little.
        note: What else there is to know of this run.
        seconds: How long it took.
        versions: What it ran with.
        machine: What it ran on; ``load`` is the load average of the minute before it began
            and of the one before it ended.
        rows: What was measured.
        format: The version of this format.
    """

    benchmark: str
    driver: str
    date: str
    size: str
    note: str
    seconds: float
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    rows: tuple[Row, ...] = field(default=())
    format: int = FORMAT

    def write(self, results: Path) -> Path:
        """Store it in a directory of results.

        Returns:
            The file.
        """
        file = file_of(results, self.driver, self.benchmark)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_rounded(asdict(self)), indent=1) + "\n", encoding="utf-8")
        return file

    @classmethod
    def read(cls, file: Path) -> Record:
        """Return a stored record.

        Raises:
            ValueError: If it is not in this format.
        """
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored.get("format") != FORMAT:
            raise ValueError(f"{file.name} is not in format {FORMAT}: run the benchmark again.")
        rows = tuple(_row(row) for row in stored.pop("rows"))
        return cls(**stored, rows=rows)


def file_of(results: Path, driver: str, benchmark: str) -> Path:
    """Return where a record is stored."""
    return results / driver.lower().replace(" ", "-") / f"{benchmark}.json"


def new_record(benchmark: str, size: str, note: str, server: str) -> Record:
    """Return the head of a record, before the run.

    Args:
        benchmark: The name of the benchmark.
        size: Its size.
        note: What else there is to know of the run.
        server: The version of the server.
    """
    return Record(
        benchmark=benchmark,
        driver=DRIVER.name,
        date=datetime.now(timezone.utc).date().isoformat(),
        size=size,
        note=note,
        seconds=0.0,
        versions={"python": platform.python_version(), "mongodb": server, **_installed()},
        machine={
            "system": platform.system(),
            "architecture": platform.machine(),
            "implementation": platform.python_implementation(),
            "processors": os.cpu_count(),
            "memory_gb": round(_memory() / 1e9, 1),
            "load": [load()],
        },
    )


def load() -> float:
    """Return how many processes of the whole machine wanted to run, in the minute past."""
    return round(os.getloadavg()[0], 1)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _installed() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # Motor, with Beanie 2
    return found


def _row(stored: dict[str, Any]) -> Row:
    return Row(
        name=stored["name"],
        x=stored["x"],
        rounds=stored["rounds"],
        figures=_spreads(stored["figures"]),
        ratios=_spreads(stored["ratios"]),
        totals=stored["totals"],
        goals=tuple(Goal(**goal) for goal in stored["goals"]),
    )


def _spreads(stored: dict[str, Any]) -> dict[str, dict[str, Quartiles]]:
    return {
        way: {metric: Quartiles(**spread) for metric, spread in metrics.items()}
        for way, metrics in stored.items()
    }


def _rounded(value: Any) -> Any:
    """Keep five digits: the rest is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value
