"""The leaderboard, two compared sets and the history as rich renderables, for the width and the characters of a console."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Console, RenderableType
from rich.console import Group as Renderables
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ddkit.challenge import TRACKS
from ddkit.cli._output import has_unicode
from ddkit.errors import counted
from ddkit.reporting.charts import sampled_curve
from ddkit.reporting.compare import SetsCompared, extremes
from ddkit.reporting.formatting import deviation, half_interval, interval_text, percent, points, rounds
from ddkit.reporting.history import History, Step
from ddkit.reporting.leaderboard import BASELINE_NAMES, settings_title
from ddkit.reporting.rows import Estimate, Group, Row, dataset_title, shortened

_WIDE = 150  # columns that the full table needs
_MEDIUM = 96  # below it, the interval of the mean is left out
_NARROW = 78  # below it, a few lines per entry instead of a table
_CURVE_POINTS = 10
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.,-=+*#"
_STYLES = {"submission": "bold cyan", "published": ""}
_BASELINE_STYLE = "dim"
_LEGEND = (
    "Accuracy in % ± standard deviation over the rounds; 95\u00a0%: half the interval of the mean; differences in points, "
    "with 95\u00a0% intervals."
)
_MOST_CLASSES = 8  # of a comparison, at either end
_WIDTH_WITH_HASHES = 100  # columns


def leaderboard_view(
    groups: Sequence[Group], console: Console, *, most_rows: int | None = None, most_groups: int | None = None
) -> RenderableType:
    """A table of each group, or a few lines per entry on a narrow console.

    most_rows: of each kind in a group. most_groups: of each track. None means all.
    """
    bars = _BARS if has_unicode(console) else _ASCII_BARS
    parts: list[RenderableType] = []
    for track, of_track in itertools.groupby(groups, key=lambda group: group.track):
        members = list(of_track)
        parts.append(Text(f"\nTrack {track} ({TRACKS[track].title})", style="bold"))
        for group in members[:most_groups]:
            short, left_out = shortened(group, most_rows)
            parts.append(Text(f"\n{group.title}", style="bold" if group.official else "bold dim"))
            parts += _entries(short, bars) if console.width < _NARROW else [_table(short, console.width, bars)]
            more_entries = [f"{counted(left_out, 'more entry', 'more entries')}: ddkit report --all"] if left_out else []
            parts += [Text(remark, style="dim") for remark in [*more_entries, *group.remarks]]
        if more := len(members) - len(members[:most_groups]):
            more_groups = f"{counted(more, 'more group', 'more groups')} with other settings"
            parts.append(Text(f"\n{more_groups}: ddkit report --all", style="dim"))
    return Renderables(*parts, Text(f"\n{_LEGEND}", style="dim"))


def sparkline(values: Sequence[float], bars: str = _BARS) -> str:
    """Values as a row of bars; the lowest value is the lowest bar."""
    sampled = sampled_curve(values, _CURVE_POINTS)
    if not sampled:
        return ""
    low, high = min(sampled), max(sampled)
    if high == low:
        return bars[0] * len(sampled)
    return "".join(bars[round((v - low) / (high - low) * (len(bars) - 1))] for v in sampled)


def _table(group: Group, width: int, bars: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    cells: list[Callable[[Row], Text]] = []

    def add(
        title: str, cell: Callable[[Row], Text], justify: Literal["left", "right"] = "right", *, free: bool = False
    ) -> None:
        table.add_column(title, justify=justify, no_wrap=not free, overflow="fold", min_width=16 if free else None)
        cells.append(cell)

    def two_lines(first: Text, second: Text) -> Text:
        return Text("\n").join([first, second])

    wide, has_first = width >= _WIDE, any(row.to_first is not None for row in group.rows)
    if any(row.rank is not None for row in group.rows):
        add("#", lambda row: Text("" if row.rank is None else str(row.rank)))
    if wide:
        add("entry", lambda row: Text(row.name), "left", free=True)
    else:
        add("entry", lambda row: two_lines(Text(row.name), Text(_small_print(group, row), style="dim")), "left", free=True)
    for name in group.datasets:
        add(dataset_title(name), functools.partial(_accuracy, name))
    if len(group.datasets) > 1:
        add("mean", lambda row: Text(percent(row.score)))
    if width >= _MEDIUM:
        add("95 %", lambda row: Text(half_interval(row)))
    if not wide and has_first:
        add("to first\nto random", lambda row: two_lines(_difference(row.to_first), _difference(row.to_random)))
    elif not wide:
        add("to random", lambda row: _difference(row.to_random))
    else:
        if has_first:
            add("to first", lambda row: _difference(row.to_first))
        add("to random real", lambda row: _difference(row.to_random))
        add("rounds", lambda row: Text(rounds(row)))
        add("loss", lambda row: Text(_curve(row, bars), style="cyan" if row.is_local else "dim"), "left")
        add("date", lambda row: Text(row.date), "left")
        add("official", lambda row: Text("; ".join([group.verdict(row), *row.remarks])), "left", free=True)
    for row in group.rows:
        table.add_row(*(cell(row) for cell in cells), style=_STYLES.get(row.kind, _BASELINE_STYLE))
    return table


def _entries(group: Group, bars: str) -> Iterable[RenderableType]:
    """A few lines per entry, for a narrow terminal."""
    for row in group.rows:
        rank = "" if row.rank is None else f"{row.rank}. "
        yield Text(f"{rank}{row.name}", style=_STYLES.get(row.kind, _BASELINE_STYLE), overflow="fold")
        facts = [(dataset_title(name), _accuracy(name, row)) for name in row.accuracy]
        if row.score is not None and len(row.accuracy) > 1:
            facts.append(("mean, 95\u00a0%", Text(f"{percent(row.score)} {half_interval(row)}")))
        for title, estimate in (("to first", row.to_first), ("to random real", row.to_random)):
            if estimate is not None:
                facts.append((title, _difference(estimate)))
        if curve := _curve(row, bars):
            facts.append(("loss", Text(curve)))
        for title, value in facts:
            yield Text(f"   {title:<16}").append_text(value)
        yield Padding(Text(_small_print(group, row), style="dim", overflow="fold"), (0, 0, 0, 3))


def _small_print(group: Group, row: Row) -> str:
    count = f"{rounds(row)} {'round' if rounds(row) == '1' else 'rounds'}" if row.results else ""
    return ", ".join(filter(None, [group.verdict(row), count, row.date, *row.remarks]))


def _accuracy(name: str, row: Row) -> Text:
    if name not in row.accuracy:
        return Text("–", style="dim")
    return Text(percent(row.accuracy[name])).append(deviation(row, name), style="dim")


def _difference(estimate: Estimate | None) -> Text:
    """A difference, green or red if zero lies outside its interval."""
    style = ""
    if estimate is not None and estimate.is_clear:
        style = "green" if estimate.value > 0 else "red"
    return Text(points(estimate), style=style)


def _curve(row: Row, bars: str) -> str:
    """The first round's training loss on the first dataset that has a curve."""
    curves = [r.loss_curves[0] for r in row.results.values() if r.loss_curves]
    return sparkline(curves[0], bars) if curves else ""


def comparison_view(compared: SetsCompared, *, show_all: bool = False) -> RenderableType:
    """Two sets side by side, class by class. show_all: all classes instead of those at both ends."""
    names = compared.names
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("class", overflow="fold")
    for heading in (*names, "difference"):
        table.add_column(heading, justify="right", overflow="fold")
    first, second = percent(compared.first.mean), percent(compared.second.mean)
    table.add_row("all", first, second, _difference(compared.difference), end_section=True)
    shown = compared.classes if show_all else extremes(compared.classes, _MOST_CLASSES)
    left_out = len(compared.classes) - len(shown)
    for k, each in enumerate(shown):
        table.add_row(Text(each.name), percent(each.first), percent(each.second), _difference(each.estimate))
        if left_out and k == _MOST_CLASSES - 1:
            table.add_row(Text(f"... {left_out} more: --all", style="dim"))
    estimates = (compared.difference, *(each.estimate for each in compared.classes))
    how = "paired rounds" if compared.paired else "Welch's interval"
    intervals = f", with 95 % intervals ({how})" if any(each.half_width is not None for each in estimates) else ""
    recipes = zip(names, compared.recipes, strict=True)
    remarks = [
        f"Differences in points, the first minus the second{intervals}.",
        *compared.remarks,
        *(f"Recipe of {name}: {recipe}" for name, recipe in recipes if recipe),
    ]
    title = f"\n{compared.title}: {names[0]} and {names[1]}, {settings_title(compared.first)}"
    return Renderables(Text(title, style="bold"), table, *(Text(remark, style="dim") for remark in remarks))


def history_view(history: History, console: Console) -> RenderableType:
    """A table of steps."""
    if not history.rows:
        return Text("Nothing was evaluated or packed yet.")
    columns: list[tuple[str, Callable[[Step], str]]] = [
        ("date", lambda step: step.when),
        ("name", lambda step: step.name if step.event == "evaluated" else f"{step.name} ({step.event})"),
        ("dataset", lambda step: step.datasets),
        ("% ± 95 %", _accuracy_text),
        ("", lambda step: "best" if step.is_best else ""),
        ("settings", lambda step: step.settings),
    ]
    if console.width >= _WIDTH_WITH_HASHES:
        columns.append(("hash", lambda step: step.sha256[:8]))
    if any(step.recipe for step in history.rows):
        columns.append(("recipe", lambda step: step.recipe))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading, _ in columns:
        whole = console.width >= _NARROW and heading in ("date", "% ± 95 %")  # else no room is left for the names
        table.add_column(heading, overflow="fold", no_wrap=whole)
    for step in history.rows:
        style = "bold" if step.is_best else "dim" if step.kind in BASELINE_NAMES else ""
        table.add_row(*(Text(text(step)) for _, text in columns), style=style)
    return table


def _accuracy_text(step: Step) -> str:
    """In percent, with the half width of the 95 % interval where there is one."""
    if step.accuracy is None:
        return ""
    return percent(step.accuracy) + ("" if step.half_width is None else f" {interval_text(step.half_width, step.rounds)}")
