"""The table of a record, as text for a terminal and in Markdown."""

from __future__ import annotations

from .figures import MAIN, METRICS, goal, main_of, ratio, times
from .measure import COUNTS, Row
from .record import Record

Cells = list[str]


def table_of(record: Record, x_name: str) -> tuple[Cells, list[Cells]]:
    """Return the head and the rows of a table.

    Args:
        record: The record.
        x_name: What the ``x`` of its rows counts.
    """
    ways = ways_of(record)
    others = dict.fromkeys(
        metric
        for row in record.rows
        for metric in (*row.figures[row.ways[0]], *row.totals[row.ways[0]])
        if metric not in MAIN
    )
    has_goals = any(row.goals for row in record.rows)
    head = ["", *ways, *(f"ratio: {way}" for way in ways[1:])]
    head += [_title(record, name) for name in others]
    rows = [
        [
            name_of(row, x_name),
            *(_figure(row, way) for way in ways),
            *(_ratio(row, way) for way in ways[1:]),
            *(_all_ways(row, metric) for metric in others),
            *(["; ".join(goal(row, each) for each in row.goals)] if has_goals else []),
        ]
        for row in record.rows
    ]
    return [*head, *(["goal"] if has_goals else [])], rows


def name_of(row: Row, x_name: str) -> str:
    """Return the name of a row, with its ``x``."""
    return row.name if row.x is None else f"{row.name}, {row.x:,} {x_name}"


def _title(record: Record, name: str) -> str:
    title = METRICS[name].title
    if name in COUNTS:
        rounds = {row.rounds for row in record.rows}
        return f"{title} in {max(rounds)} rounds" if len(rounds) == 1 else title
    return f"ratio: {title}" if METRICS[name].compared else title


def _figure(row: Row, way: str) -> str:
    main = main_of(row)
    return METRICS[main].written(row.figures[way][main].median) if way in row.figures else ""


def _ratio(row: Row, way: str) -> str:
    return ratio(row.ratios[way][main_of(row)]) if way in row.ratios else ""


def _all_ways(row: Row, name: str) -> str:
    """Write the figures, or ratios, of all ways in one cell."""
    metric = METRICS[name]
    written = times if metric.compared else metric.written
    if name in COUNTS:
        return " / ".join(written(totals[name]) for totals in row.totals.values())
    figures = row.ratios if metric.compared else row.figures
    return " / ".join(written(each[name].median) for each in figures.values() if name in each)


def ways_of(record: Record) -> list[str]:
    """Return all ways of a record, the package's last."""
    ways = dict.fromkeys(way for row in record.rows for way in row.ways)
    last = record.rows[0].ways[-1]
    return [*(way for way in ways if way != last), last]


def as_text(head: Cells, rows: list[Cells]) -> str:
    """Write a table for a terminal."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]

    def line(cells: Cells) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join((first, *others)).rstrip()

    return "\n".join(map(line, (head, *rows)))


def as_markdown(head: Cells, rows: list[Cells]) -> str:
    """Write a table in Markdown."""
    rule = ["---", *("--:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))
