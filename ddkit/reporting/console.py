"""The leaderboard for the terminal: a table, or a few lines per entry on a narrow one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ddkit.challenge import TRACKS
from ddkit.reporting.charts import sampled_curve
from ddkit.reporting.formatting import LEGEND, deviation, half_interval, percent, points, rounds
from ddkit.reporting.rows import Estimate, Group, Row, dataset_title, shortened

_WIDE = 150  # columns that the full table needs
_MEDIUM = 96  # below it, the interval of the mean is left out
_NARROW = 78  # below it, a few lines per entry instead of a table
_CURVE_POINTS = 10
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.,-=+*#"
_STYLES = {"submission": "bold cyan", "published": ""}
_BASELINE_STYLE = "dim"


class LeaderboardView:
    """Groups as a rich renderable, for any width.

    most_rows, most_groups: how many are shown; None means all.
    """

    def __init__(self, groups: Sequence[Group], *, most_rows: int | None = None, most_groups: int | None = None) -> None:
        self._groups = groups
        self._most_rows = most_rows
        self._most_groups = most_groups

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        bars = _BARS if options.encoding.lower().startswith("utf") else _ASCII_BARS
        shown = self._groups[: self._most_groups]
        track = None
        for group in shown:
            if group.track != track:
                track = group.track
                yield Text(f"\nTrack {track} ({TRACKS[track].title})", style="bold")
            short, left_out = shortened(group, self._most_rows)
            yield Text(f"\n{group.title}", style="bold" if group.official else "bold dim")
            yield from _entries(short, bars) if options.max_width < _NARROW else [_table(short, options.max_width, bars)]
            more_entries = [f"{left_out:,} more entries: ddkit report --all"] if left_out else []
            for remark in [*more_entries, *group.remarks]:
                yield Text(remark, style="dim")
        if more := len(self._groups) - len(shown):
            yield Text(f"\n{more:,} more groups with other settings: ddkit report --all", style="dim")
        yield Text(f"\n{LEGEND}", style="dim")


def sparkline(values: Sequence[float], points: int = _CURVE_POINTS, bars: str = _BARS) -> str:
    """Values as a row of bars; the lowest value is the lowest bar."""
    sampled = sampled_curve(values, points)
    if not sampled:
        return ""
    low, high = min(sampled), max(sampled)
    if high == low:
        return bars[0] * len(sampled)
    return "".join(bars[round((v - low) / (high - low) * (len(bars) - 1))] for v in sampled)


def _table(group: Group, width: int, bars: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for title, justify in _columns(group, width):
        free = title in ("entry", "official")
        table.add_column(title, justify=justify, no_wrap=not free, overflow="fold", min_width=16 if free else None)
    for row in group.rows:
        table.add_row(*_cells(row, group, width, bars), style=_STYLES.get(row.kind, _BASELINE_STYLE))
    return table


def _columns(group: Group, width: int) -> list[tuple[str, Literal["left", "right"]]]:
    wide = width >= _WIDE
    numbers = [*map(dataset_title, group.datasets), *(["mean"] if len(group.datasets) > 1 else [])]
    numbers += ["95 %"] if width >= _MEDIUM else []
    if wide:
        numbers += [*(["to first"] if _has_first(group) else []), "to random real", "rounds"]
    else:  # both differences in one column, one above the other
        numbers.append("to first\nto random" if _has_first(group) else "to random")
    ranks: list[tuple[str, Literal["left", "right"]]] = [("#", "right")] if _has_ranks(group) else []
    texts = ["loss", "date", "official"] if wide else []
    return [*ranks, ("entry", "left"), *((title, "right") for title in numbers), *((title, "left") for title in texts)]


def _cells(row: Row, group: Group, width: int, bars: str) -> list[Text]:
    wide = width >= _WIDE
    name = Text(row.name)
    differences = [*([_difference(row.to_first)] if _has_first(group) else []), _difference(row.to_random)]
    curve = Text(_curve(row, bars), style="cyan" if row.is_local else "dim")
    wide_only = [Text(rounds(row)), curve, Text(row.date), Text("; ".join([group.verdict(row), *row.remarks]))]
    return [
        *([Text("" if row.rank is None else str(row.rank))] if _has_ranks(group) else []),
        name if wide else Text("\n").join([name, Text(_small_print(group, row), style="dim")]),
        *(_accuracy(row, dataset) for dataset in group.datasets),
        *([Text(percent(row.score))] if len(group.datasets) > 1 else []),
        *([Text(half_interval(row))] if width >= _MEDIUM else []),
        *(differences if wide else [Text("\n").join(differences)]),
        *(wide_only if wide else []),
    ]


def _entries(group: Group, bars: str) -> Iterable[RenderableType]:
    """A few lines per entry, for a narrow terminal."""
    for row in group.rows:
        rank = "" if row.rank is None else f"{row.rank}. "
        yield Text(f"{rank}{row.name}", style=_STYLES.get(row.kind, _BASELINE_STYLE), overflow="fold")
        facts = [(dataset_title(name), _accuracy(row, name)) for name in row.accuracy]
        if row.score is not None and len(row.accuracy) > 1:
            facts.append(("mean", Text(f"{percent(row.score)} {half_interval(row)}")))
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


def _has_ranks(group: Group) -> bool:
    return any(row.rank is not None for row in group.rows)


def _has_first(group: Group) -> bool:
    return any(row.to_first is not None for row in group.rows)


def _accuracy(row: Row, name: str) -> Text:
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
    return sparkline(curves[0], bars=bars) if curves else ""
