"""Interleaved measurements of several ways to do the same work.

The machines that run this are noisy, so no figure stands alone. All ways run in turns, in blocks,
and the order changes with every round. What is compared are the blocks of one round: a ratio is
the median over the rounds of the ratios within a round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles

Sample = Mapping[str, float]
"""What one block took, by metric; those that are known are in ``figures.METRICS``."""

Block = Callable[[], Awaitable[Sample]]

COUNTS = ("left_open", "failed", "lost", "twice", "halves")
"""The metrics of what should not happen at all: of these the sum counts, not the median."""


class Stopwatch:
    """Measures what happens inside its ``with`` block.

    Args:
        operations: How many operations the block has.

    Attributes:
        spent: Seconds per operation, on the wall and on the CPU (all threads of this process).
    """

    def __init__(self, operations: int = 1) -> None:
        self._operations = operations
        self.spent: dict[str, float] = {}

    def __enter__(self) -> Stopwatch:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.spent = {"wall": wall / self._operations, "cpu": cpu / self._operations}


@dataclass(frozen=True)
class Quartiles:
    """The spread of a figure over the rounds."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Return the quartiles of some values, which are all there are: no extrapolation."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Goal:
    """What the package's way shall cost at most, compared with the one by hand.

    Attributes:
        metric: Which figure.
        most: The limit.
        kind: ``"ratio"`` to the one by hand, or ``"difference"`` from it.
    """

    metric: str
    most: float
    kind: str = "ratio"


@dataclass(frozen=True)
class Row:
    """The same work, done in several ways.

    Attributes:
        name: What the work is.
        x: How much of something there was (the benchmark says of what), if that varies.
        rounds: How often each way ran.
        figures: The spread of each metric, by way. The first way is the one by hand, and the
            last one is the package's.
        ratios: The spread of the ratios to the first way, by way.
        totals: The sum of each count over all rounds, by way.
        goals: What the last way shall cost.
    """

    name: str
    x: int | None
    rounds: int
    figures: Mapping[str, Mapping[str, Quartiles]]
    ratios: Mapping[str, Mapping[str, Quartiles]]
    totals: Mapping[str, Mapping[str, float]]
    goals: tuple[Goal, ...] = ()

    @property
    def ways(self) -> list[str]:
        """The ways, the one by hand first and the package's last."""
        return list(self.figures)

    def reached(self, goal: Goal) -> float:
        """Return what a goal is about, as it came out."""
        first, *_, last = self.ways
        if goal.kind == "ratio":
            return self.ratios[last][goal.metric].median
        return self.figures[last][goal.metric].median - self.figures[first][goal.metric].median


async def measure(
    name: str,
    ways: Mapping[str, Block],
    rounds: int,
    *,
    x: int | None = None,
    goals: Sequence[Goal] = (),
    warm_up: bool = True,
) -> Row:
    """Run blocks in turns.

    Args:
        name: What the work is.
        ways: A block for each way to do it, the one by hand first, the package's last.
        rounds: How often each runs.
        x: How much of something there is, if that varies.
        goals: What the last one shall cost.
        warm_up: Whether each runs once before that.
    """
    samples: dict[str, list[Sample]] = {way: [] for way in ways}
    if warm_up:
        for block in ways.values():
            await block()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for way in order(list(ways), turn):
                samples[way].append(await ways[way]())
            gc.collect(0)
    finally:
        gc.enable()
    return row_of(name, samples, x, goals)


def order(ways: list[str], turn: int) -> list[str]:
    """Return the order of a round: each way comes first, and next to each other one, in turn."""
    first = (turn // 2) % len(ways)
    turned = ways[first:] + ways[:first]
    return turned[::-1] if turn % 2 else turned


def row_of(
    name: str,
    samples: Mapping[str, Sequence[Sample]],
    x: int | None = None,
    goals: Sequence[Goal] = (),
) -> Row:
    """Make a row of the samples of each way, which belong together by their place."""
    first, *others = samples
    return Row(
        name=name,
        x=x,
        rounds=len(samples[first]),
        figures={
            way: {
                metric: Quartiles.of([sample[metric] for sample in taken])
                for metric in taken[0]
                if metric not in COUNTS
            }
            for way, taken in samples.items()
        },
        ratios={way: _ratios(samples[first], samples[way]) for way in others},
        totals={
            way: {
                metric: sum(sample[metric] for sample in taken)
                for metric in taken[0]
                if metric in COUNTS
            }
            for way, taken in samples.items()
        },
        goals=tuple(goals),
    )


def _ratios(by_hand: Sequence[Sample], other: Sequence[Sample]) -> dict[str, Quartiles]:
    """Compare round by round."""
    return {
        metric: Quartiles.of([b[metric] / a[metric] for a, b in zip(by_hand, other, strict=True)])
        for metric in by_hand[0]
        if metric not in COUNTS
    }
