"""The content of the HTML page, gathered from the results and from the files that are still there.

A missing file does not stop a report; the page says that it is missing, and shows the rest.
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
from ddkit.reporting.compare import SetsCompared
from ddkit.reporting.details import SetDetails, SetView
from ddkit.reporting.formatting import interval_text
from ddkit.reporting.history import NO_HISTORY, History
from ddkit.reporting.leaderboard import build
from ddkit.reporting.rows import DATASET_TITLES, Estimate, Group, Row, dataset_title, shortened
from ddkit.reporting.runs import RunView, training_runs
from ddkit.results import Result
from ddkit.runtime.progress import Listener, Progress, ignore

if TYPE_CHECKING:
    from ddkit.reporting.quality import SetQuality

_MOST_ENTRIES = 8  # shown in detail; the others are in the leaderboard only
_MOST_ROWS = 100  # of one kind in a table
_MOST_MARKS = 12  # of one kind in a chart


@dataclass(frozen=True)
class Card:
    """A number at the top of the page. tone: "good", "bad" or "", for its color."""

    title: str
    value: str
    note: str
    tone: str = ""


@dataclass(frozen=True)
class GroupView:
    """A table of the leaderboard and its charts. left_out: how many rows the table leaves out."""

    group: Group
    left_out: int
    charts: tuple[IntervalChart, ...]


@dataclass(frozen=True)
class EntryView:
    """One of the user's rows in detail."""

    anchor: str
    row: Row
    group: Group
    sets: tuple[SetView, ...]


@dataclass(frozen=True)
class Page:
    """The whole content of the page."""

    made: str
    version: str
    cards: tuple[Card, ...]
    tables: tuple[GroupView, ...]
    entries: tuple[EntryView, ...]
    entries_left_out: int
    runs: tuple[RunView, ...]
    problems: tuple[str, ...]
    quality: tuple[SetQuality, ...]
    history: History
    comparisons: tuple[SetsCompared, ...]


def gather(
    results: Sequence[Result],
    *,
    problems: Sequence[str] = (),
    tracks: Iterable[int] | None = None,
    runs_folder: Path = Path("runs"),
    quality: Sequence[SetQuality] = (),
    history: History = NO_HISTORY,
    comparisons: Sequence[SetsCompared] = (),
    progress: Listener = ignore,
) -> Page:
    """Gather the content of the page.

    results: oldest first, as read. problems: lines of the results file that could not be used.
    runs_folder: the folder of the generators' run folders, whose training logs are shown.
    """
    groups = build(results, tracks)
    chosen = _rows_to_detail(groups)
    entries = _entry_views(chosen[:_MOST_ENTRIES], SetDetails(results), progress)
    tables = (GroupView(*shortened(group, _MOST_ROWS), interval_charts(shortened(group, _MOST_MARKS)[0])) for group in groups)
    return Page(
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z").strip(),
        version=__version__,
        cards=_cards(groups, sum(result.kind == "submission" for result in results)),
        tables=tuple(tables),
        entries=entries,
        entries_left_out=len(chosen) - len(entries),
        runs=training_runs(runs_folder),
        problems=tuple(problems),
        quality=tuple(quality),
        history=history,
        comparisons=tuple(comparisons),
    )


def _rows_to_detail(groups: Iterable[Group]) -> list[tuple[Group, Row]]:
    """The user's rows, official ones first, then as ranked; only the best of each evaluated name and group."""
    ordered = sorted(groups, key=lambda group: not group.official)
    best: dict[tuple[int, str, str], tuple[Group, Row]] = {}
    for group in ordered:
        for row in group.rows:
            if row.is_local:
                name = next(iter(row.results.values())).name
                best.setdefault((group.track, group.title, name), (group, row))
    return list(best.values())


def _cards(groups: Sequence[Group], evaluations: int) -> tuple[Card, ...]:
    rows = [(group, row) for group in groups for row in group.rows if row.is_local]
    best = max(rows, key=_precedence, default=None)
    cards = _cards_of_best(*best) if best else []
    official = sum(row.official and row.score is not None for _, row in rows)
    entries = "entry" if official == 1 else "entries"
    cards.append(Card("Your evaluations", f"{evaluations:,}", f"{official:,} complete and official {entries}"))
    return tuple(cards)


def _precedence(place: tuple[Group, Row]) -> tuple[bool, bool, int, float]:
    """What makes a row the best one: official, on the challenge's datasets, on both of them; only then its accuracy."""
    _, row = place
    return row.official, row.accuracy.keys() <= DATASET_TITLES.keys(), len(row.accuracy), row.value or 0


def _cards_of_best(group: Group, row: Row) -> list[Card]:
    datasets = " and ".join(dataset_title(name) for name in row.accuracy)
    status = f"{'official' if row.official else 'not official'}: {group.title.partition(': ')[2]}"
    rank = f"rank {row.rank} among the entries with public numbers" if row.rank else status
    half_width = row.spread.half_width if row.spread else None
    interval = "" if half_width is None else f"± {100 * half_width:.2f}; "
    cards = [Card(f"Best entry: {row.name}", f"{100 * (row.value or 0):.2f} %", f"{interval}{datasets}; {rank}")]
    first = max((e for e in PUBLISHED if e.track == group.track and e.score), key=lambda e: e.score or 0, default=None)
    if row.to_first is not None and first is not None:
        cards.append(_difference_card(f"To first place ({first.name})", row.to_first, row.rounds))
    if row.to_random is not None:
        rounds = (*row.rounds, *(each.rounds for each in row.baseline))
        cards.append(_difference_card("To random real images", row.to_random, rounds))
    return cards


def _difference_card(title: str, estimate: Estimate, rounds: Sequence[int]) -> Card:
    """rounds: of the evaluations that it rests on."""
    tone = ("good" if estimate.value > 0 else "bad") if estimate.is_clear else ""
    clear = {True: ": more than the noise", False: ": within the noise", None: ""}[estimate.is_clear]
    note = f"points, interval {interval_text(estimate.half_width, rounds)}{clear}"
    return Card(title, f"{100 * estimate.value:+.2f}", note, tone)


def _entry_views(chosen: Sequence[tuple[Group, Row]], details: SetDetails, progress: Listener) -> tuple[EntryView, ...]:
    total = sum(len(row.results) for _, row in chosen)
    views: list[EntryView] = []
    done = 0
    for number, (group, row) in enumerate(chosen, start=1):
        sets = []
        for result in row.results.values():
            progress(Progress("Reading and checking sets", done, total, "sets"))
            sets.append(details.of(result))
            done += 1
            progress(Progress("Reading and checking sets", done, total, "sets"))
        views.append(EntryView(f"entry-{number}", row, group, tuple(sets)))
    return tuple(views)
