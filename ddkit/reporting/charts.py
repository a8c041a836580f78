"""Positions of the marks of a chart, in percent of the plot, so that templates draw it at any size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddkit.reporting.rows import Group, Row

_POINTS_OF_LINE = 200  # more would not be seen on a screen
_MOST_TICKS = 6  # intervals between them
_MOST_WIDE_TICKS = 4  # along the bottom, where labels stand side by side, on a phone too


@dataclass(frozen=True)
class Tick:
    """position: percent of the axis."""

    position: float
    label: str


@dataclass(frozen=True)
class IntervalMark:
    """One row's accuracy, `value`, and in percent of the plot's width its position and interval, if it has one."""

    row: Row
    value: float  # fraction
    position: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class IntervalChart:
    """Accuracies of one dataset (or the mean, dataset None) with their 95 % intervals, on a common axis."""

    dataset: str | None
    marks: tuple[IntervalMark, ...]
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Line:
    """points: "x,y x,y ..." in a plot of 100 x 100, y downwards, as SVG's polyline takes it."""

    name: str
    points: str
    first: float
    last: float
    best: float  # the lowest value


@dataclass(frozen=True)
class LineChart:
    """Lines over a common horizontal axis; every value is finite."""

    title: str
    x_title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]  # position 0 at the bottom


def interval_charts(group: Group) -> tuple[IntervalChart, ...]:
    """A chart for each dataset that was evaluated here, and one of the mean if there are several.

    Published entries have no intervals, so that a chart of them alone would not show anything.
    """
    charts = []
    for dataset in (*([None] if len(group.datasets) > 1 else []), *group.datasets):
        found = [(row, *known) for row in group.rows if (known := row.value_and_interval(dataset)) is not None]
        if not any(row.results for row, *_ in found):
            continue
        ends = [end for _, value, half in found for end in (value - (half or 0), value + (half or 0))]
        ticks, low, high = accuracy_axis(ends, most=_MOST_WIDE_TICKS)
        marks = tuple(
            IntervalMark(
                row,
                value,
                _percent(value, low, high),
                None if half is None else _percent(max(value - half, low), low, high),
                None if half is None else _percent(min(value + half, high), low, high),
            )
            for row, value, half in found
        )
        charts.append(IntervalChart(dataset, marks, ticks))
    return tuple(charts)


def line_chart(
    title: str, x_title: str, series: Mapping[str, Sequence[tuple[float, float]]], *, from_zero: bool = False
) -> LineChart | None:
    """A chart of series of points (x, y) in the order of x; None if there are no points.

    Points that are NaN or infinite are left out. from_zero: the vertical axis begins at zero.
    """
    finite = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return None
    xs = [x for points in finite.values() for x, _ in points]
    ys = [y for points in finite.values() for _, y in points]
    x_ticks, x_low, x_high = _axis(min(xs), max(xs), most=_MOST_WIDE_TICKS, tight=True)
    y_ticks, y_low, y_high = _axis(0.0 if from_zero else min(ys), max(ys))

    def place(x: float, y: float) -> str:
        return f"{_percent(x, x_low, x_high):.2f},{100 - _percent(y, y_low, y_high):.2f}"

    lines = []
    for name, points in finite.items():
        drawn = " ".join(place(*points[int(i)]) for i in sampled_curve(range(len(points)), _POINTS_OF_LINE))
        values = [y for _, y in points]
        lines.append(Line(name, drawn, values[0], values[-1], min(values)))
    return LineChart(title, x_title, tuple(lines), x_ticks, y_ticks)


def accuracy_axis(values: Sequence[float], *, most: int = _MOST_TICKS) -> tuple[tuple[Tick, ...], float, float]:
    """Ticks in percent for accuracies, which are fractions, and the ends of the axis as fractions."""
    return _axis(max(0.0, min(values)), min(1.0, max(values)), most=most, scale=100, unit=" %")


def sampled_curve(values: Sequence[float], points: int) -> tuple[float, ...]:
    """At most `points` of the values, evenly spaced, with the first and the last; NaN and infinite ones are left out."""
    finite = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    if len(finite) <= points:
        return tuple(finite)
    return tuple(finite[round(i * (len(finite) - 1) / (points - 1))] for i in range(points))


def _axis(
    low: float, high: float, *, most: int = _MOST_TICKS, tight: bool = False, scale: float = 1, unit: str = ""
) -> tuple[tuple[Tick, ...], float, float]:
    """Ticks at round numbers, and the ends of the axis: the outer ticks, or the data's own ends if `tight`."""
    from matplotlib.ticker import MaxNLocator  # imported late, since a leaderboard on a terminal needs no axis

    if high <= low:
        low, high = low - abs(low) * 0.05 - 1e-3, high + abs(high) * 0.05 + 1e-3
    values = MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low * scale, high * scale)
    decimals = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9))
    start, end = (low, high) if tight else (float(values[0]) / scale, float(values[-1]) / scale)
    ticks = [Tick(_percent(value / scale, start, end), f"{value:,.{decimals}f}{unit}") for value in map(float, values)]
    return tuple(tick for tick in ticks if -0.01 <= tick.position <= 100.01), start, end


def _percent(value: float, low: float, high: float) -> float:
    return 100 * (value - low) / (high - low)
