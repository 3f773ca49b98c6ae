"""How figures are written, in tables and plots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .measure import Goal, Quartiles, Row


def seconds(value: float) -> str:
    """Write a time with three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= size:
            return f"{_digits(value / size)} {unit}"
    return f"{_digits(value / 1e-6)} µs"


def amount(value: float) -> str:
    """Write a number of something."""
    return f"{value:,.0f}" if value == round(value) else _digits(value)


def size(value: float) -> str:
    """Write an amount of memory."""
    return f"{value:,.0f} B"


def _digits(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


@dataclass(frozen=True)
class Metric:
    """What a figure says.

    Attributes:
        title: The head of its column.
        written: How it is written.
        compared: Whether its ratio is of interest, and not the figure itself.
    """

    title: str
    written: Callable[[float], str]
    compared: bool = False


METRICS = {
    "wall": Metric("time", seconds),
    "memory": Metric("memory", size),
    "cpu": Metric("CPU time", seconds, compared=True),
    "attempts": Metric("attempts", amount),
    "left_open": Metric("left open", amount),
    "failed": Metric("failed", amount),
    "lost": Metric("lost", amount),
    "twice": Metric("stored twice", amount),
    "halves": Metric("stored by half", amount),
}
"""All metrics; the first one of a row is what it is about."""

MAIN = ("wall", "memory")
"""The metrics that rows are about; they share columns."""


def main_of(row: Row) -> str:
    """Return the metric that a row is about."""
    return next(metric for metric in MAIN if metric in row.figures[row.ways[0]])


def ratio(spread: Quartiles) -> str:
    """Write a ratio and its spread."""
    return f"{times(spread.median)} ({times(spread.lower)} to {times(spread.upper)})"


def times(value: float) -> str:
    """Write a ratio."""
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def goal(row: Row, goal: Goal) -> str:
    """Write a goal, and whether it is missed."""
    metric = METRICS[goal.metric]
    missed = "" if row.reached(goal) <= goal.most else ", missed"
    title = "" if goal.metric in MAIN else f"{metric.title} "
    if goal.kind == "ratio":
        return f"{title}{goal.most:.2f}{missed}"
    return f"{title}+{metric.written(goal.most)}{missed}"
