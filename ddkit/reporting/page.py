"""What the HTML page tells, gathered from the results and from what still lies on the disk.

Nothing that is gone stops a report: a folder that was deleted since is said to be, and the rest is shown.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ddkit import __version__
from ddkit.challenge import PUBLISHED
from ddkit.reporting.charts import IntervalChart, interval_charts
from ddkit.reporting.details import SetDetails, SetView
from ddkit.reporting.leaderboard import build
from ddkit.reporting.rows import Estimate, Group, Row, dataset_title, shortened
from ddkit.reporting.runs import RunView, training_runs
from ddkit.results import Result
from ddkit.runtime.progress import Listener, Progress, ignore

if TYPE_CHECKING:
    from ddkit.reporting.quality import QualityView

_MOST_ENTRIES = 8  # told in detail; the rest stays in the leaderboard
_MOST_ROWS = 100  # of our own in a table
_MOST_MARKS = 12  # of our own in a chart


@dataclass(frozen=True)
class Card:
    """A number worth seeing first. tone: "good", "bad" or "" for the color."""

    title: str
    value: str
    note: str
    tone: str = ""


@dataclass(frozen=True)
class GroupView:
    """A table of the leaderboard and its charts. left_out: rows that were too many for the table."""

    group: Group
    left_out: int
    charts: tuple[IntervalChart, ...]


@dataclass(frozen=True)
class EntryView:
    """One of our entries in detail."""

    anchor: str
    row: Row
    group: Group
    sets: tuple[SetView, ...]


@dataclass(frozen=True)
class Page:
    """All that the page shows."""

    made: str
    version: str
    cards: tuple[Card, ...]
    tables: tuple[GroupView, ...]
    entries: tuple[EntryView, ...]
    entries_left_out: int
    runs: tuple[RunView, ...]
    problems: tuple[str, ...]
    quality: tuple[QualityView, ...] = ()


def gather(
    results: Sequence[Result],
    *,
    problems: Sequence[str] = (),
    tracks: Iterable[int] | None = None,
    runs_folder: Path = Path("runs"),
    quality: Sequence[QualityView] = (),
    progress: Listener = ignore,
) -> Page:
    """Everything the page shows.

    results: as read, oldest first. problems: lines of the results file that could not be used.
    runs_folder: holds a folder a trained generator, with its training log.
    """
    groups = build(results, tracks)
    chosen = _entries_to_tell(groups)
    entries = _entry_views(chosen[:_MOST_ENTRIES], SetDetails(results), progress)
    return Page(
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z").strip(),
        version=__version__,
        cards=_cards(groups, sum(result.kind == "submission" for result in results)),
        tables=tuple(_table(group) for group in groups),
        entries=entries,
        entries_left_out=len(chosen) - len(entries),
        runs=training_runs(runs_folder),
        problems=tuple(problems),
        quality=tuple(quality),
    )


def _entries_to_tell(groups: Iterable[Group]) -> list[tuple[Group, Row]]:
    """Our own entries: official before others, then as ranked; of each name and group the best only."""
    ordered = sorted(groups, key=lambda group: not group.official)
    best: dict[tuple[int, str, str], tuple[Group, Row]] = {}
    for group in ordered:
        for row in group.rows:
            if row.is_local:
                best.setdefault((group.track, group.title, row.name), (group, row))
    return list(best.values())


def _cards(groups: Sequence[Group], evaluations: int) -> tuple[Card, ...]:
    rows = [(group, row) for group in groups for row in group.rows if row.is_local]
    official = [(group, row) for group, row in rows if row.official and row.score is not None]
    cards = []
    if official:
        cards += _cards_of_best(*official[0])
    elif rows:
        cards += _cards_of_best(*rows[0])
    entries = "entry" if len(official) == 1 else "entries"
    cards.append(Card("Your evaluations", f"{evaluations:,}", f"{len(official):,} complete and official {entries}"))
    return tuple(cards)


def _cards_of_best(group: Group, row: Row) -> list[Card]:
    datasets = " and ".join(dataset_title(name) for name in row.accuracy)
    rank = f"rank {row.rank} among the entries with public numbers" if row.rank else group.verdict(row)
    half_width = row.spread.half_width if row.spread else None
    interval = "" if half_width is None else f"± {100 * half_width:.2f}; "
    cards = [Card(f"Best entry: {row.name}", f"{100 * (row.value or 0):.2f} %", f"{interval}{datasets}; {rank}")]
    first = max((e for e in PUBLISHED if e.track == group.track and e.score), key=lambda e: e.score or 0, default=None)
    if row.to_first is not None and first is not None:
        cards.append(_difference_card(f"To first place ({first.name})", row.to_first))
    if row.to_random is not None:
        cards.append(_difference_card("To random real images", row.to_random))
    return cards


def _difference_card(title: str, estimate: Estimate) -> Card:
    tone = ("good" if estimate.value > 0 else "bad") if estimate.is_clear else ""
    if estimate.half_width is None:
        return Card(title, f"{100 * estimate.value:+.2f}", "points; the rounds leave no interval")
    clear = "clear of zero" if estimate.is_clear else "within the noise"
    return Card(title, f"{100 * estimate.value:+.2f}", f"points, ± {100 * estimate.half_width:.2f}: {clear}", tone)


def _table(group: Group) -> GroupView:
    short, left_out = shortened(group, _MOST_ROWS)
    # Published entries alone, without an interval, would make a chart of lonely dots.
    ours = any(row.results for row in group.rows)
    return GroupView(short, left_out, interval_charts(shortened(group, _MOST_MARKS)[0]) if ours else ())


def _entry_views(chosen: Sequence[tuple[Group, Row]], details: SetDetails, progress: Listener) -> tuple[EntryView, ...]:
    total = sum(len(row.results) for _, row in chosen)
    views: list[EntryView] = []
    done = 0
    for group, row in chosen:
        sets = []
        for result in row.results.values():
            progress(Progress("Reading and checking sets", done, total, "sets"))
            sets.append(details.of(result))
            done += 1
        views.append(EntryView(f"entry-{len(views) + 1}", row, group, tuple(sets)))
    if total:
        progress(Progress("Reading and checking sets", total, total, "sets"))
    return tuple(views)
