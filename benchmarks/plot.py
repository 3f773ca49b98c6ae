"""The plot of a record, as an SVG file that reads on a light and on a dark page.

The background is transparent, and all colours are of middle brightness: about as far from white
as from black.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figures import METRICS, main_of
from .measure import Quartiles, Row
from .record import Record, file_of
from .suite import Benchmark
from .table import ways_of

INK = "#808080"
COLORS = ("#8a8a8a", "#c77a1f", "#4a90d9", "#2f9e62")
"""By hand is grey; the package's way, the last one, always has the last colour."""

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, and can be searched
    "svg.hashsalt": "benchmarks",  # the same ids in every run
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def draw(benchmark: Benchmark, record: Record, results: Path) -> Path:
    """Draw a record.

    Args:
        benchmark: What it is a record of.
        record: The record.
        results: The directory of results.

    Returns:
        The file.
    """
    with mpl.rc_context(STYLE):
        figure = PLOTS[benchmark.plot](record, benchmark)
        versions = record.versions
        figure.suptitle(
            f"{benchmark.title}: Beanie {versions['beanie']}, {record.driver}", fontsize=11
        )
        file = file_of(results, record.driver, record.benchmark).with_suffix(".svg")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, transparent=True, metadata={"Date": None})
    return file


def colors(record: Record) -> Mapping[str, str]:
    """Return the color of each way."""
    *others, last = ways_of(record)
    return {**dict(zip(others, COLORS, strict=False)), last: COLORS[-1]}


def _figure(panels: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(7.6, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    return figure, list(axes)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _ratios(record: Record, benchmark: Benchmark) -> Figure:
    """Draw the ratio of each row to the one by hand: a point, and a line between the quartiles."""
    figure, (axes,) = _figure(1, 1.6 + 0.36 * len(record.rows))
    ways = ways_of(record)[1:]
    for number, way in enumerate(ways):
        places, spreads = [], []
        for place, row in enumerate(record.rows):
            if way in row.ratios:
                places.append(place + 0.22 * (number - (len(ways) - 1) / 2))
                spreads.append(row.ratios[way][main_of(row)])
        axes.errorbar(
            [spread.median for spread in spreads],
            places,
            xerr=_whiskers(spreads),
            fmt="o",
            markersize=4,
            color=colors(record)[way],
            label=way,
        )
    _mark_goals(axes, record)
    axes.axvline(1.0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(record.rows)), [row.name for row in record.rows])
    axes.invert_yaxis()
    axes.set_xlabel("time, as a ratio to the same work by hand: median and quartiles")
    _legend(figure, axes)
    return figure


def _mark_goals(axes: Axes, record: Record) -> None:
    goals = [
        (goal.most, place)
        for place, row in enumerate(record.rows)
        for goal in row.goals
        if goal.metric == main_of(row) and goal.kind == "ratio"
    ]
    if goals:
        most, places = zip(*goals, strict=True)
        axes.plot(most, places, "|", color=INK, markersize=14, label="goal")


def _whiskers(spreads: Sequence[Quartiles]) -> list[list[float]]:
    """Return how far the quartiles are from the median, as matplotlib wants them."""
    return [
        [each.median - each.lower for each in spreads],
        [each.upper - each.median for each in spreads],
    ]


def _lines(record: Record, benchmark: Benchmark) -> Figure:
    """Draw the figures over ``x``, with a band between the quartiles; a panel for each name."""
    rows = sorted(record.rows, key=lambda row: row.name)
    groups = {name: list(group) for name, group in groupby(rows, key=lambda row: row.name)}
    groups = {name: groups[name] for name in dict.fromkeys(row.name for row in record.rows)}
    figure, panels = _figure(len(groups), 3.4)
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        for way, color in colors(record).items():
            _line(axes, [row for row in group if way in row.figures], way, color)
        axes.set_title(fill(name, 18) if len(groups) > 2 else name)
        axes.set_xlabel(benchmark.x_name)
        axes.set_xscale("log")
        axes.set_xticks([row.x or 0 for row in group], [f"{row.x:,}" for row in group])
        axes.tick_params(axis="x", rotation=60 if len(groups) > 2 else 0)
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: tick("wall", value))
    _legend(figure, panels[0])
    return figure


def _line(axes: Axes, rows: Sequence[Row], way: str, color: str) -> None:
    spreads = [row.figures[way][main_of(row)] for row in rows]
    x = [float(row.x or 0) for row in rows]
    axes.plot(x, [each.median for each in spreads], "o-", color=color, markersize=3, label=way)
    lower, upper = [each.lower for each in spreads], [each.upper for each in spreads]
    axes.fill_between(x, lower, upper, color=color, alpha=0.2, linewidth=0)


def _bars(record: Record, benchmark: Benchmark) -> Figure:
    """Draw the figures of each row as bars; a panel for each row, because units differ."""
    figure, panels = _figure(len(record.rows), 2.9)
    for axes, row in zip(panels, record.rows, strict=True):
        metric = main_of(row)
        for place, way in enumerate(row.ways):
            spread = row.figures[way][metric]
            axes.bar(
                place,
                spread.median,
                yerr=_whiskers([spread]),
                color=colors(record)[way],
                ecolor=INK,
                label=way,
            )
            axes.annotate(
                METRICS[metric].written(spread.median),
                (place, spread.upper),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
        axes.margins(y=0.15)
        axes.set_xlim(-1, len(row.ways))
        axes.set_title(fill(row.name, 20), fontsize=9)
        axes.set_xticks(range(len(row.ways)), [_left_open(row, way) for way in row.ways])
        axes.tick_params(axis="x", labelsize=7, length=0)
        axes.yaxis.set_major_formatter(_formatter(metric))
        axes.tick_params(axis="y", labelsize=7)
    _legend(figure, max(panels, key=lambda axes: len(axes.patches)))
    return figure


def _formatter(metric: str) -> Callable[[float, object], str]:
    return lambda value, _: tick(metric, value)


def tick(metric: str, value: float) -> str:
    """Write a figure at an axis, where it is a round one."""
    if not value:
        return "0"
    number, unit = METRICS[metric].written(value).split()
    return f"{float(number.replace(',', '')):,g} {unit}"


def _left_open(row: Row, way: str) -> str:
    left = row.totals[way].get("left_open")
    return "" if left is None else f"{left:g} left\nopen"


PLOTS: Mapping[str, Callable[[Record, Benchmark], Figure]] = {
    "ratios": _ratios,
    "lines": _lines,
    "bars": _bars,
}
