"""Interleaved measurements of two ways to do the same work, and a table of their ratios.

The machines that run this are noisy, so no figure stands alone: both ways run in turns,
in blocks, the order changes with every round, and what is reported is the median over the
rounds of the ratio between the two blocks of a round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import median, quantiles

Block = Callable[[], Awaitable["Spent"]]


@dataclass(frozen=True)
class Spent:
    """Seconds per operation, on the wall and on the CPU (all threads)."""

    wall: float
    cpu: float


class Stopwatch:
    """Measures what happens inside its ``with`` block."""

    def __init__(self, operations: int) -> None:
        self._operations = operations

    def __enter__(self) -> Stopwatch:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.spent = Spent(wall / self._operations, cpu / self._operations)


@dataclass(frozen=True)
class Comparison:
    """One row: the same work by hand and with the library."""

    name: str
    by_hand: float
    with_library: float
    wall_ratio: float
    cpu_ratio: float
    spread: tuple[float, float]

    def row(self) -> str:
        low, high = self.spread
        return (
            f"{self.name:<44}{self.by_hand * 1e6:>11.1f}{self.with_library * 1e6:>11.1f}"
            f"{self.wall_ratio:>8.3f}{self.cpu_ratio:>8.3f}   {low:.3f}..{high:.3f}"
        )


HEADER = (
    f"{'':<44}{'by hand us':>11}{'scoped us':>11}{'wall':>8}{'CPU':>8}   quartiles of the ratio"
)


async def compare(name: str, by_hand: Block, with_library: Block, rounds: int) -> Comparison:
    """Run two blocks in turns.

    Args:
        name: What the work is.
        by_hand: A block without the library.
        with_library: The same with it.
        rounds: How often each runs.
    """
    hand: list[Spent] = []
    library: list[Spent] = []
    await by_hand(), await with_library()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            if turn % 2:
                library.append(await with_library())
                hand.append(await by_hand())
            else:
                hand.append(await by_hand())
                library.append(await with_library())
            gc.collect(0)
    finally:
        gc.enable()
    wall = [b.wall / a.wall for a, b in zip(hand, library, strict=True)]
    cpu = [b.cpu / a.cpu for a, b in zip(hand, library, strict=True) if a.cpu]
    low, _, high = quantiles(wall, n=4)
    return Comparison(
        name,
        median(each.wall for each in hand),
        median(each.wall for each in library),
        median(wall),
        median(cpu) if cpu else float("nan"),
        (low, high),
    )
