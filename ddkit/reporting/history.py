"""How a team got where it is: its evaluations and its zips in the order of time, and the best accuracy so far."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddkit.history import Packed, find_recipe
from ddkit.reporting.charts import Tick, accuracy_axis
from ddkit.reporting.leaderboard import BASELINE_NAMES, latest_of_most_rounds, settings_title
from ddkit.reporting.rows import dataset_title
from ddkit.results import Result
from ddkit.statistics import half_width, mean

_MOST_CHARTS = 6
_MOST_TIME_TICKS = 4
_DAYS_WITHOUT_HOURS = 4  # from which the ticks of the time are days


@dataclass(frozen=True)
class Step:
    """An evaluation or a packing. date: ISO 8601, UTC; "" if it is not known. datasets, settings: in words.

    accuracy: fraction; of a zip the mean over its sets, None unless all were evaluated. half_width: of its 95 % interval.
    is_best: True if no earlier step with the same datasets and settings was better. recipe: a path, or "".
    kind: that of the evaluated Result; "submission" for a zip.
    """

    date: str
    event: str
    name: str
    datasets: str
    settings: str
    accuracy: float | None
    half_width: float | None
    rounds: tuple[int, ...]
    sha256: str
    source: str
    recipe: str = ""
    is_best: bool = False
    kind: str = "submission"

    @property
    def when(self) -> str:
        """Day and minute, in this machine's time zone."""
        moment = _moment(self.date)
        return moment.strftime("%Y-%m-%d %H:%M") if moment else "unknown"


@dataclass(frozen=True)
class TimeMark:
    """A step of a chart. x, y: percent of the plot, y upwards. best_y: of the best so far."""

    step: Step
    x: float
    y: float
    best_y: float


@dataclass(frozen=True)
class TimeChart:
    """The accuracies of one dataset under the same settings over time, two or more."""

    title: str
    marks: tuple[TimeMark, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class History:
    """steps: of the user's own sets, oldest first. charts: of datasets and settings with several evaluations, the latest first.

    baselines: evaluations of real images, which the steps are compared with, oldest first.
    """

    steps: tuple[Step, ...]
    charts: tuple[TimeChart, ...]
    baselines: tuple[Step, ...] = ()

    @property
    def rows(self) -> tuple[Step, ...]:
        """Steps and baselines, oldest first."""
        return _in_order((*self.baselines, *self.steps))

    def as_data(self) -> list[dict[str, Any]]:
        """The rows as plain values for JSON."""
        return [vars(step) for step in self.rows]


NO_HISTORY = History((), ())


def build_history(results: Sequence[Result], packed: Sequence[Packed], tracks: Iterable[int] | None = None) -> History:
    """The history of the user's own sets and of the baselines that the leaderboard shows. tracks: None means all."""
    wanted = None if tracks is None else set(tracks)
    evaluated = [r for r in results if wanted is None or r.track in wanted]
    ours = [r for r in evaluated if r.kind == "submission"]
    steps = [_evaluated(result) for result in ours]
    steps += [_packed(each, ours) for each in packed if wanted is None or each.track in wanted]
    ordered = _in_order(steps)
    best: dict[tuple[str, ...], float] = {}
    marked = []
    for step in ordered:
        key = (step.event, step.datasets, step.settings)
        improves = step.accuracy is not None and step.accuracy > best.get(key, -1.0)
        best[key] = max(best.get(key, -1.0), step.accuracy or 0.0)
        marked.append(replace(step, is_best=improves))
    baselines = _in_order(_evaluated(result) for result in evaluated if result.kind in BASELINE_NAMES)
    return History(tuple(marked), _charts(marked), baselines)


def _in_order(steps: Iterable[Step]) -> tuple[Step, ...]:
    """The steps by time; those of the same time, or of none, stay in their order."""
    return tuple(sorted(steps, key=_seconds))


def _evaluated(result: Result) -> Step:
    return Step(
        date=result.date,
        event="evaluated",
        name=BASELINE_NAMES.get(result.kind, result.name),
        datasets=dataset_title(result.dataset),
        settings=settings_title(result),
        accuracy=result.mean,
        half_width=half_width([result.accuracies]),
        rounds=(result.rounds,),
        sha256=result.sha256,
        source=result.source,
        recipe=find_recipe(result.source, result.sha256),
        kind=result.kind,
    )


def _packed(packed: Packed, results: Sequence[Result]) -> Step:
    """A zip with the accuracy of its sets: their official results, or the latest ones that share settings."""
    wanted = packed.evaluated_as
    datasets = " and ".join(map(dataset_title, wanted))
    known = latest_of_most_rounds(((settings_title(r), r.dataset), r) for r in results if wanted.get(r.dataset) == r.sha256)
    by_settings: dict[str, dict[str, Result]] = {}  # the latest first
    for (title, dataset), result in reversed(known.items()):
        by_settings.setdefault(title, {})[dataset] = result
    whole = [(title, found) for title, found in by_settings.items() if found.keys() == wanted.keys()]
    title, chosen = max(whole, key=lambda each: all(r.official for r in each[1].values()), default=("", {}))
    scores = [chosen[name].accuracies for name in wanted if chosen]
    return Step(
        date=packed.date,
        event="packed",
        name=packed.name,
        datasets=datasets or f"track {packed.track}",
        settings=title,
        accuracy=mean(map(mean, scores)) if scores else None,
        half_width=half_width(scores, 1 / len(scores)) if scores else None,
        rounds=tuple(map(len, scores)),
        sha256=packed.sha256,
        source=packed.path,
        # A recipe may be written after the zip that it made.
        recipe=packed.recipe or next(filter(None, (find_recipe(r.source, r.sha256) for r in chosen.values())), ""),
    )


def _charts(steps: Sequence[Step]) -> tuple[TimeChart, ...]:
    groups: dict[tuple[str, str], list[Step]] = {}
    for step in steps:
        if step.event == "evaluated" and _moment(step.date):
            groups.setdefault((step.datasets, step.settings), []).append(step)
    several = [(key, members) for key, members in groups.items() if len(members) > 1]
    several.sort(key=lambda group: group[1][-1].date, reverse=True)
    return tuple(_chart(f"{name}, {settings}", members) for (name, settings), members in several[:_MOST_CHARTS])


def _chart(title: str, steps: Sequence[Step]) -> TimeChart:
    times, values = [_seconds(step) for step in steps], [step.accuracy or 0.0 for step in steps]
    y_ticks, low, high = accuracy_axis(values)
    start, length = times[0], (times[-1] - times[0]) or 1.0
    marks, best = [], 0.0
    for step, when, value in zip(steps, times, values, strict=True):
        best = max(best, value)
        x = 100 * (when - start) / length
        marks.append(TimeMark(step, x, 100 * (value - low) / (high - low), 100 * (best - low) / (high - low)))
    one_day = steps[0].when[:10] == steps[-1].when[:10]
    form = "%H:%M" if one_day else "%m-%d" if length > _DAYS_WITHOUT_HOURS * 86400 else "%m-%d %H:%M"
    ticks = []
    for k in range(_MOST_TIME_TICKS):
        share = k / (_MOST_TIME_TICKS - 1)
        moment = datetime.datetime.fromtimestamp(start + share * length, datetime.timezone.utc).astimezone()
        ticks.append(Tick(100 * share, moment.strftime(form)))
    return TimeChart(title, tuple(marks), tuple(ticks), y_ticks)


def _moment(date: str) -> datetime.datetime | None:
    """The date in this machine's time zone; None for what is none there."""
    try:
        moment = datetime.datetime.fromisoformat(date)
        return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)).astimezone()
    except (ValueError, OverflowError):  # the latter before year 1 and after 9999
        return None


def _seconds(step: Step) -> float:
    moment = _moment(step.date)
    return moment.timestamp() if moment else 0.0
