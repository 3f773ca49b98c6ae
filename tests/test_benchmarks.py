"""The benchmarks, run with so little to do that only what they write can be judged."""

from __future__ import annotations

import math
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from beanie_session_scope.drivers import DRIVER

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last: the package itself may be installed

from benchmarks.measure import Goal, Quartiles, measure, order, row_of  # noqa: E402
from benchmarks.record import RESULTS, Record, file_of  # noqa: E402

pytestmark = [pytest.mark.starts_servers, pytest.mark.timeout(90)]

ON_THREE_NODES = ["failover"]
ON_ONE_NODE = [
    "overhead",
    "footprint",
    "concurrency",
    "scaling",
    "cancellation",
    "contention",
    "batches",
    "web",
]
NAMES = ON_ONE_NODE + ON_THREE_NODES


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", *map(str, arguments)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What all benchmarks write; the one that mostly waits runs beside the others."""
    directory = tmp_path_factory.mktemp("results")
    options = ["--size", "tiny", "--note", "a test", "--results", directory]
    with ExitStack() as stack:
        runs = []
        for number, names in enumerate((ON_THREE_NODES, ON_ONE_NODE)):
            output = stack.enter_context((directory / f"{number}.txt").open("w+"))
            process = stack.enter_context(
                subprocess.Popen(
                    command("benchmarks", *options, *names),
                    cwd=ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
            stack.callback(process.kill)
            runs.append((process, output))
        for process, output in runs:
            code = process.wait()
            output.seek(0)
            assert code == 0, output.read()
        yield directory


def record_of(results: Path, name: str) -> Record:
    return Record.read(file_of(results, DRIVER.name, name))


@pytest.mark.parametrize("name", NAMES)
class TestABenchmark:
    def test_writes_a_record_of_each_way_to_do_the_work(self, results: Path, name: str) -> None:
        record = record_of(results, name)

        assert (record.benchmark, record.driver) == (name, DRIVER.name)
        assert (record.size, record.note) == ("tiny", "a test")
        assert {"python", "mongodb", "beanie", "pymongo"} <= set(record.versions)
        assert record.rows
        for row in record.rows:
            assert len(row.ways) >= 2
            assert set(row.ratios) == set(row.ways[1:])
            for spread in spreads(row):
                assert 0 <= spread.lower <= spread.median <= spread.upper < math.inf

    def test_names_no_host_user_or_directory(self, results: Path, name: str) -> None:
        text = file_of(results, DRIVER.name, name).read_text(encoding="utf-8")

        for secret in (platform.node(), Path.home().name, str(ROOT), str(Path.home())):
            assert not re.search(rf"(?<!\w){re.escape(secret)}(?!\w)", text)

    def test_draws_a_plot_without_a_background(self, results: Path, name: str) -> None:
        file = file_of(results, DRIVER.name, name).with_suffix(".svg")
        svg = ET.parse(file).getroot()
        texts = {element.text for element in svg.iter() if element.tag.endswith("text")}
        record = record_of(results, name)

        assert svg.tag.endswith("svg")
        assert "#ffffff" not in file.read_text(encoding="utf-8")
        assert set(record.rows[0].ways[1:]) <= texts

    def test_prints_its_figures(self, results: Path, name: str) -> None:
        printed = "".join(file.read_text(encoding="utf-8") for file in results.glob("*.txt"))

        for row in record_of(results, name).rows:
            assert f"\n{row.name}" in printed


def spreads(row: Any) -> Iterator[Quartiles]:
    for kind in (row.figures, row.ratios):
        for metrics in kind.values():
            yield from metrics.values()


class TestWhatTheBenchmarksCount:
    """Time is not judged here, but these are right on any machine."""

    def test_a_scope_leaves_no_transaction_open_where_code_by_hand_does(
        self, results: Path
    ) -> None:
        rows = record_of(results, "cancellation").rows
        left = {row.name.split(",")[0]: row.totals for row in rows}

        assert left["in the first operation"]["by hand"]["left_open"] == 1
        assert {totals["with_session"]["left_open"] for totals in left.values()} == {0}

    @pytest.mark.parametrize("name", ["contention", "failover"])
    def test_run_in_transaction_fails_for_no_caller_and_loses_nothing(
        self, results: Path, name: str
    ) -> None:
        for row in record_of(results, name).rows:
            totals = row.totals["run_in_transaction"]
            assert {"failed", "lost"} <= set(totals)
            assert set(totals.values()) == {0}


class TestMeasuring:
    async def test_a_ratio_is_that_of_the_blocks_of_one_round(self) -> None:
        by_hand, other = iter([1.0, 10.0, 100.0]), iter([2.0, 20.0, 300.0])

        async def first() -> dict[str, float]:
            return {"wall": next(by_hand)}

        async def second() -> dict[str, float]:
            return {"wall": next(other)}

        row = await measure("work", {"by hand": first, "other": second}, 3, warm_up=False)

        assert row.ratios["other"]["wall"] == Quartiles(2.0, 2.0, 2.5)
        assert row.figures["by hand"]["wall"].median == 10.0

    def test_every_way_comes_first_and_last_in_turn(self) -> None:
        orders = [order(["a", "b", "c"], turn) for turn in range(6)]

        assert [turned[0] for turned in orders] == ["a", "c", "b", "a", "c", "b"]
        assert sorted(turned[-1] for turned in orders) == ["a", "a", "b", "b", "c", "c"]

    def test_what_should_not_happen_is_counted_over_all_rounds(self) -> None:
        lost = [{"lost": 0}, {"lost": 1}, {"lost": 0}]
        row = row_of("work", {"by hand": [{"lost": 0}] * 3, "other": lost})

        assert row.totals == {"by hand": {"lost": 0}, "other": {"lost": 1}}
        assert row.ratios == {"other": {}}

    def test_a_goal_is_about_the_last_way(self) -> None:
        samples = {"by hand": [{"wall": 1.0}], "other": [{"wall": 9.0}], "ours": [{"wall": 1.5}]}
        row = row_of("work", samples)

        assert row.reached(Goal("wall", 1.1)) == 1.5
        assert row.reached(Goal("wall", 0.1, "difference")) == 0.5


class TestRecords:
    def test_what_is_written_can_be_read(self, results: Path, tmp_path: Path) -> None:
        record = record_of(results, "overhead")

        assert Record.read(record.write(tmp_path)) == record

    def test_another_format_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "old.json"
        file.write_text('{"format": 0}')

        with pytest.raises(ValueError, match="run the benchmark again"):
            Record.read(file)

    @pytest.mark.parametrize("driver", ["PyMongo Async", "Motor"])
    @pytest.mark.parametrize("name", NAMES)
    def test_those_of_a_full_run_are_kept(self, driver: str, name: str) -> None:
        record = Record.read(file_of(RESULTS, driver, name))

        assert (record.driver, record.size) == (driver, "full")

    def test_the_documentation_shows_them(self) -> None:
        subprocess.run(command("benchmarks.page", "--check"), cwd=ROOT, check=True, timeout=60)


class TestTheCommand:
    def test_a_name_that_is_none_is_refused_with_those_that_are(self) -> None:
        done = subprocess.run(
            command("benchmarks", "overheat"),
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )

        assert done.returncode == 2
        assert "no benchmark is called overheat" in done.stderr
        assert all(name in done.stderr for name in NAMES)
