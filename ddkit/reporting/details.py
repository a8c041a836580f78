"""One evaluated set in detail: its images, how it was made, its findings, and its mistakes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddkit.challenge import DatasetSpec
from ddkit.errors import DDKitError
from ddkit.history import find_recipe
from ddkit.metrics import ddranking
from ddkit.reporting.charts import LineChart, line_chart
from ddkit.reporting.rows import dataset_title
from ddkit.results import IN_MEMORY, Result
from ddkit.runtime.files import sha256_of
from ddkit.runtime.html import data_uri
from ddkit.sets.findings import Finding

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_MOST_SHEETS = 3  # sets of a dataset whose images are shown, so that the page stays small
_MOST_PER_CLASS = 10  # images of a sheet
_LARGEST_LOSSLESS = 48  # pixels; larger images are compressed with losses, for the same reason
_MOST_CONFUSIONS = 15
_LARGEST_RECIPE = 20_000  # letters that the page shows


class ClassPictures(NamedTuple):
    """The pictures of one class, as data URIs."""

    name: str
    pictures: tuple[str, ...]


class ClassAccuracy(NamedTuple):
    """Mean accuracy of one class over the rounds."""

    name: str
    accuracy: float


@dataclass(frozen=True)
class Confusion:
    """A frequent mistake. count: mean per round."""

    truth: str
    predicted: str
    count: float


@dataclass(frozen=True)
class SetView:
    """One evaluated set.

    gone: why the images are not shown; empty if they are. facts: how it was made, as (name, value).
    checked: True if the evaluated file is still there, and was checked for `findings`.
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
    recipe: RecipeView | None = None


class RecipeView(NamedTuple):
    """The recipe that made a set: its path, and what it says."""

    path: str
    text: str


class SetDetails:
    """Gathers one set after another; it shows the images of few sets of a dataset, and checks each file once."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._results = results
        self._shown: dict[str, set[str]] = {}
        self._findings: dict[str, tuple[Finding, ...]] = {}

    def of(self, result: Result) -> SetView:
        """All that is known of an evaluated set."""
        titles = class_titles(result)
        path = Path(result.source)
        published = result.made_by.get("kind") == "published"
        changed = _why_gone(path, result)
        sheet, gone = ((), changed) if changed and not published else self._pictures(result, titles)
        checked = not changed and not published
        if checked and result.sha256 not in self._findings:
            self._findings[result.sha256] = _findings(path, result)  # of `ddkit check`, which takes seconds
        loss = {
            f"round {number}": [(result.epochs_setting * i / max(1, len(curve) - 1), value) for i, value in enumerate(curve)]
            for number, curve in enumerate(result.loss_curves, start=1)
        }
        accuracies = (ClassAccuracy(class_name(titles, label), value) for label, value in enumerate(result.per_class))
        return SetView(
            result=result,
            title=dataset_title(result.dataset),
            sheet=sheet,
            gone=gone,
            facts=_facts(result),
            checked=checked,
            findings=self._findings[result.sha256] if checked else (),
            recipe=_recipe(find_recipe(result.source, result.sha256)),
            loss=line_chart("Training loss", "epoch", loss, from_zero=True),
            classes=tuple(sorted(accuracies, key=lambda one: -one.accuracy)),
            confusions=tuple(
                Confusion(class_name(titles, truth), class_name(titles, predicted), count)
                for truth, predicted, count in result.confusions[:_MOST_CONFUSIONS]
            ),
            ranking=ddranking.of_result(result, self._results) if result.augment and result.track == 1 else None,
        )

    def _pictures(self, result: Result, titles: Sequence[str]) -> tuple[tuple[ClassPictures, ...], str]:
        """The images of the set, or why they are not shown."""
        shown = self._shown.setdefault(result.dataset, set())
        if result.sha256 in shown:
            return (), "The images are shown with an entry above."
        if len(shown) >= _MOST_SHEETS:
            return (), f"Images are shown for at most {_MOST_SHEETS} sets of each dataset."
        shown.add(result.sha256)
        return pictures_of(result, titles)


def _why_gone(path: Path, result: Result) -> str:
    if result.track == 2:
        return "The generator makes other images for each round."
    if result.source == IN_MEMORY:
        return "The set was evaluated in memory, without a file whose images could be shown."
    try:
        if not path.is_file():
            return f"The evaluated file, {path}, is no longer there."
        if sha256_of(path) != result.sha256:
            return f"{path} has changed since this evaluation."
    except (DDKitError, OSError) as error:
        return f"The evaluated file cannot be read: {error}"
    return ""


def pictures_of(
    result: Result, titles: Sequence[str], classes: Sequence[int] | None = None
) -> tuple[tuple[ClassPictures, ...], str]:
    """The images of these classes of an evaluated set, or of all (None), or why they cannot be shown."""
    from PIL.Image import fromarray

    from ddkit.data.images import denormalize, to_uint8

    evaluated = evaluated_images(result)
    if evaluated is None:
        return (), _why_gone(Path(result.source), result) or "The images of the set cannot be read."
    images, labels, spec = evaluated
    lossless = spec.image_size <= _LARGEST_LOSSLESS
    sheet = []
    for label in range(spec.num_classes) if classes is None else classes:
        shown = images[(labels == label).nonzero().flatten()[:_MOST_PER_CLASS]]
        pixels = to_uint8(denormalize(shown, spec)).permute(0, 2, 3, 1).contiguous().numpy()
        pictures = tuple(data_uri(fromarray(image), lossless) for image in pixels)
        sheet.append(ClassPictures(class_name(titles, label), pictures))
    return tuple(sheet), ""


def evaluated_images(result: Result) -> tuple[Tensor, Tensor, DatasetSpec] | None:
    """The images (N, 3, S, S) that were evaluated, normalized, and their labels; None if the file cannot be read as it was.

    A published set is read and converted as it was for the evaluation.
    """
    from ddkit.data.store import dataset_spec
    from ddkit.evaluation.published import KIND_PUBLISHED, Conversion, open_published
    from ddkit.sets.distilled import read_set

    path = Path(result.source)
    try:
        spec = dataset_spec(result.dataset)
        if result.made_by.get("kind") == KIND_PUBLISHED and path.exists():
            published = open_published(path, result.dataset, Conversion(**result.made_by.get("conversion", {})))
            if published.sha256 == result.sha256:
                return published.images, published.labels, spec
        elif not _why_gone(path, result):
            one = read_set(path, result.dataset)
            return one.images, one.labels, spec
    except (DDKitError, TypeError) as error:
        log.warning("%s", error)
    return None


def _recipe(path: str) -> RecipeView | None:
    """The recipe at a path that `find_recipe` gave."""
    if not path:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return RecipeView(path, text[:_LARGEST_RECIPE])


def _findings(path: Path, result: Result) -> tuple[Finding, ...]:
    from ddkit.checks.check import check_path

    try:
        report = check_path(path, dataset=result.dataset, ipc=None)
    except DDKitError as error:
        return (Finding("error", "–", error.message),)
    return tuple(report.findings)


def class_titles(result: Result) -> tuple[str, ...]:
    """The classes' names for people: of the prepared dataset, else of the provenance; empty if unknown."""
    from ddkit.data import store

    try:
        names: Any = store.class_titles(result.dataset)
    except DDKitError:
        names = result.made_by.get("class_names", ())
    return tuple(str(name).replace("_", " ") for name in names) if isinstance(names, (list, tuple)) else ()


def _facts(result: Result) -> tuple[tuple[str, str], ...]:
    """The origin of the set and how it was evaluated."""
    low, high = result.images_per_class
    settings = [f"E = {result.epochs_setting}", result.network, result.precision, f"seed {result.seed}"]
    evaluation = [
        ("file", result.source),
        ("SHA-256", result.sha256),
        ("images", f"{result.images:,}, {low if low == high else f'{low} to {high}'} a class"),
        ("accuracies", ", ".join(f"{100 * a:.2f} %" for a in result.accuracies)),
        ("evaluated", ", ".join(settings + ([] if result.augment else ["no augmentation"]))),
        ("took", f"{result.seconds:,.0f} s on {result.device or 'an unnamed device'}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
    ]
    return (*_flat(result.made_by), *((name, value) for name, value in evaluation if value))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as (name, text); of long lists only the length."""
    for key, item in value.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(item, Mapping):
            yield from _flat(item, f"{name}: ")
        elif isinstance(item, (list, tuple)) and len(item) > 12:
            yield name, f"{len(item):,} values"
        elif item not in (None, "", [], ()):
            yield name, ", ".join(map(str, item)) if isinstance(item, (list, tuple)) else str(item)


def class_name(titles: Sequence[str], label: int) -> str:
    return titles[label] if 0 <= label < len(titles) else f"class {label}"
