"""What the HTML page tells, gathered from the results and from what still lies on the disk.

Nothing that is gone stops a report: a folder that was deleted since is said to be, and the rest is shown.
"""

from __future__ import annotations

import base64
import datetime
import io
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddkit import __version__
from ddkit.challenge import PUBLISHED
from ddkit.errors import DDKitError
from ddkit.files import read_json, sha256_of
from ddkit.metrics import ddranking
from ddkit.progress import Listener, Progress, ignore
from ddkit.report.charts import IntervalChart, LineChart, interval_charts, line_chart
from ddkit.report.console import shortened
from ddkit.report.leaderboard import Estimate, Group, Row, build, dataset_title
from ddkit.results import Result
from ddkit.submission.findings import Finding

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
_MOST_ENTRIES = 8  # told in detail; the rest stays in the leaderboard
_MOST_ROWS = 100  # of our own in a table
_MOST_MARKS = 12  # of our own in a chart
_MOST_SHEETS = 3  # sets of a dataset whose pictures are shown: one file has to be sent around
_MOST_PER_CLASS = 10  # pictures of a class
_MOST_CONFUSIONS = 15
_LARGEST_PNG = 48  # pixels; larger pictures are compressed with losses, or the page would be too heavy to send


@dataclass(frozen=True)
class Card:
    """A number worth seeing first. tone: "good", "bad" or "" for the colour."""

    title: str
    value: str
    note: str
    tone: str = ""


@dataclass(frozen=True)
class ClassAccuracy:
    """Mean accuracy of one class over the rounds."""

    name: str
    accuracy: float


@dataclass(frozen=True)
class Confusion:
    """A frequent mistake. count: per round."""

    truth: str
    predicted: str
    count: float


@dataclass(frozen=True)
class ClassPictures:
    """One row of a contact sheet. pictures: data URIs."""

    name: str
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class SetView:
    """One evaluated set of an entry.

    gone: why the pictures are not shown, empty where they are. facts: how it was made, (name, value) pairs.
    checked: whether `findings` are of this very file.
    """

    result: Result
    title: str
    sheet: tuple[ClassPictures, ...] = ()
    gone: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    checked: bool = False
    findings: tuple[Finding, ...] = ()
    loss: LineChart | None = None
    classes: tuple[ClassAccuracy, ...] = ()  # best first
    confusions: tuple[Confusion, ...] = ()
    ranking: ddranking.Ranking | None = None


@dataclass(frozen=True)
class EntryView:
    """One of our entries in detail."""

    anchor: str
    row: Row
    group: Group
    sets: tuple[SetView, ...]


@dataclass(frozen=True)
class RunView:
    """The training of a generator, from the log in its run folder."""

    name: str
    steps: int
    charts: tuple[LineChart, ...]


@dataclass(frozen=True)
class QualityLine:
    """One metric of a set, and of real images."""

    metric: str
    ours: float | None
    real: float | None
    reading: str


@dataclass(frozen=True)
class QualityPicture:
    """A sheet that goes with the metrics. uri: a data URI."""

    title: str
    note: str
    uri: str


@dataclass(frozen=True)
class QualityView:
    """The metrics of one set's pictures. images: in the set."""

    name: str
    images: int
    lines: tuple[QualityLine, ...]
    pictures: tuple[QualityPicture, ...] = ()


@dataclass(frozen=True)
class Page:
    """All that the page shows."""

    made: str
    version: str
    cards: tuple[Card, ...]
    groups: tuple[Group, ...]
    groups_left_out: tuple[int, ...]  # rows, for each group
    charts: tuple[tuple[IntervalChart, ...], ...]  # for each group
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
    told = chosen[:_MOST_ENTRIES]
    budget = _PictureBudget()
    entries = []
    for place, (group, row) in enumerate(told):
        progress(Progress("Gathering sets and pictures", place, len(told), "entries"))
        entries.append(_entry_view(place, group, row, results, budget))
    progress(Progress("Gathering sets and pictures", len(told), len(told), "entries"))
    return Page(
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z").strip(),
        version=__version__,
        cards=_cards(groups, sum(result.kind == "submission" for result in results)),
        groups=tuple(shortened(group, _MOST_ROWS)[0] for group in groups),
        groups_left_out=tuple(shortened(group, _MOST_ROWS)[1] for group in groups),
        charts=tuple(interval_charts(shortened(group, _MOST_MARKS)[0]) for group in groups),
        entries=tuple(entries),
        entries_left_out=len(chosen) - len(told),
        runs=training_runs(runs_folder),
        problems=tuple(problems),
        quality=tuple(quality),
    )


def training_runs(folder: Path) -> tuple[RunView, ...]:
    """The training logs in `folder`, one a sub-folder; unreadable lines are passed over, missing folders are none."""
    if not folder.is_dir():
        return ()
    logs = sorted(folder.glob(f"*/{METRICS_FILE}"))
    return tuple(view for path in logs if (view := _run_view(path)) is not None)


def class_titles(result: Result) -> tuple[str, ...]:
    """Names of a result's classes for people: of the prepared store, else of its JSON; empty where unknown."""
    from ddkit.data import store

    try:
        names: Any = store.class_titles(result.dataset)
    except DDKitError:
        names = result.made_by.get("class_names", ())
    return tuple(str(name).replace("_", " ") for name in names) if isinstance(names, (list, tuple)) else ()


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
        return Card(title, f"{100 * estimate.value:+.2f}", "points; a single round leaves no interval")
    clear = "clear of zero" if estimate.is_clear else "within the noise"
    return Card(title, f"{100 * estimate.value:+.2f}", f"points, ± {100 * estimate.half_width:.2f}: {clear}", tone)


class _PictureBudget:
    """So many sets of each dataset may bring their pictures, each file once."""

    def __init__(self) -> None:
        self._shown: dict[str, set[str]] = {}

    def grants(self, result: Result) -> str:
        """An empty text when the pictures may be shown, else why not."""
        shown = self._shown.setdefault(result.dataset, set())
        if result.sha256 in shown:
            return "The pictures are shown with an entry above."
        if len(shown) >= _MOST_SHEETS:
            return f"Pictures are shown of {_MOST_SHEETS} sets of a dataset at most."
        shown.add(result.sha256)
        return ""


def _entry_view(place: int, group: Group, row: Row, results: Sequence[Result], budget: _PictureBudget) -> EntryView:
    sets = tuple(_set_view(result, results, budget) for result in row.results.values())
    return EntryView(f"entry-{place + 1}", row, group, sets)


def _set_view(result: Result, results: Sequence[Result], budget: _PictureBudget) -> SetView:
    titles = class_titles(result)
    path = Path(result.source)
    gone = changed = _why_gone(path, result)
    sheet: tuple[ClassPictures, ...] = ()
    if not changed and not (gone := budget.grants(result)):
        sheet, gone = _sheet(path, result, titles)
    return SetView(
        result=result,
        title=dataset_title(result.dataset),
        sheet=sheet,
        gone=gone,
        facts=_facts(result),
        checked=not changed,
        findings=() if changed else _findings(path),
        loss=_loss_chart(result),
        classes=_classes(result, titles),
        confusions=_confusions(result, titles),
        ranking=ddranking.of_result(result, results) if result.augment else None,
    )


def _why_gone(path: Path, result: Result) -> str:
    try:
        if not path.is_file():
            return f"The evaluated file, {path}, is no longer there."
        if sha256_of(path) != result.sha256:
            return f"{path} has changed since this evaluation."
    except (DDKitError, OSError) as error:
        return f"The evaluated file cannot be read: {error}"
    return ""


def _sheet(path: Path, result: Result, titles: Sequence[str]) -> tuple[tuple[ClassPictures, ...], str]:
    """The pictures of a set class by class; without any, why."""
    from ddkit.report.sets import read_set

    try:
        images, labels = read_set(path, result.dataset)
    except DDKitError as error:
        return (), f"The pictures cannot be shown: {error.message}"
    rows = []
    for label in labels.unique().tolist():
        members = images[labels == label][:_MOST_PER_CLASS]
        rows.append(ClassPictures(_name(titles, label), tuple(_data_uri(picture) for picture in members)))
    return tuple(rows), ""


def _data_uri(picture: Any) -> str:
    """(3, S, S) uint8 -> a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    kind = "png" if max(image.size) <= _LARGEST_PNG else "webp"
    if kind == "png":
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="WEBP", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _findings(path: Path) -> tuple[Finding, ...]:
    from ddkit.submission.check import check_path

    try:
        report = check_path(path)
    except DDKitError as error:
        return (Finding("error", "–", error.message),)
    return tuple(report.findings)


def _facts(result: Result) -> tuple[tuple[str, str], ...]:
    """How the set was made: what the result remembers, else the JSON beside the file."""
    made_by: Any = result.made_by
    beside = Path(result.source).with_suffix(".json")
    if not made_by and beside.is_file():
        try:
            made_by = read_json(beside)
        except DDKitError as error:
            log.warning("%s", error.message)
    known = list(_flat(made_by)) if isinstance(made_by, Mapping) else []
    return (*known, *_evaluation_facts(result))


def _evaluation_facts(result: Result) -> list[tuple[str, str]]:
    low, high = result.images_per_class
    settings = [f"E = {result.epochs_setting}", result.network, result.precision, f"seed {result.seed}"]
    facts = [
        ("file", result.source),
        ("SHA-256", result.sha256),
        ("images", f"{result.images:,}, {low if low == high else f'{low} to {high}'} a class"),
        ("accuracies", ", ".join(f"{100 * a:.2f} %" for a in result.accuracies)),
        ("evaluated", ", ".join(settings + ([] if result.augment else ["no augmentation"]))),
        ("took", f"{result.seconds:,.0f} s on {result.device or 'an unnamed device'}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
    ]
    return [(name, value) for name, value in facts if value]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as (name, text); long lists by their length."""
    for key, item in value.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(item, Mapping):
            yield from _flat(item, f"{name}: ")
        elif isinstance(item, (list, tuple)) and len(item) > 12:
            yield name, f"{len(item):,} values"
        elif item not in (None, "", [], ()):
            yield name, ", ".join(map(str, item)) if isinstance(item, (list, tuple)) else str(item)


def _loss_chart(result: Result) -> LineChart | None:
    rounds = {f"round {i}": list(_over_epochs(curve, result)) for i, curve in enumerate(result.loss_curves, start=1)}
    return line_chart("Training loss", "epoch", rounds, from_zero=True)


def _over_epochs(curve: Sequence[float], result: Result) -> Iterable[tuple[float, float]]:
    """Evenly spaced epochs, first and last included: 0 ... E."""
    for i, loss in enumerate(curve):
        yield result.epochs_setting * i / max(1, len(curve) - 1), loss


def _classes(result: Result, titles: Sequence[str]) -> tuple[ClassAccuracy, ...]:
    known = [ClassAccuracy(_name(titles, label), value) for label, value in enumerate(result.per_class)]
    return tuple(sorted(known, key=lambda c: -c.accuracy))


def _confusions(result: Result, titles: Sequence[str]) -> tuple[Confusion, ...]:
    return tuple(
        Confusion(_name(titles, truth), _name(titles, predicted), count)
        for truth, predicted, count in result.confusions[:_MOST_CONFUSIONS]
    )


def _name(titles: Sequence[str], label: int) -> str:
    return titles[label] if 0 <= label < len(titles) else f"class {label}"


def _run_view(path: Path) -> RunView | None:
    records = _read_log(path)
    losses = _series(records, lambda key: "loss" in key and "time" not in key)
    distances = _series(records, lambda key: "frechet" in key or "fid" in key.split("_"))
    charts = (
        line_chart("Training loss", "step", losses),
        line_chart("Frechet distance to real images", "step", distances, from_zero=True),
    )
    shown = tuple(chart for chart in charts if chart is not None)
    if not shown:
        return None
    return RunView(path.parent.name, int(max(record["step"] for record in records)), shown)


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a training log that have a step; torn and foreign lines are passed over."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error)
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and _is_number(record.get("step")):
            records.append(record)
    return records


def _series(
    records: Sequence[Mapping[str, Any]], wanted: Callable[[str], bool]
) -> dict[str, list[tuple[float, float]]]:
    """The numbers of the wanted keys over the steps, in order of the steps.

    A resumed training repeats the steps after its checkpoint: the later record is the one that counted.
    """
    series: dict[str, dict[float, float]] = {}
    for record in records:
        for key, value in record.items():
            if wanted(key.lower()) and _is_number(value):
                series.setdefault(key.replace("_", " "), {})[record["step"]] = value
    return {name: sorted(values.items()) for name, values in series.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
