"""Two evaluated sets side by side: their difference, class by class, and their images of each class."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddkit.errors import MissingDataError, UsageError, did_you_mean
from ddkit.history import find_recipe
from ddkit.reporting.details import ClassPictures, class_name, class_titles, pictures_of
from ddkit.reporting.leaderboard import BASELINE_NAMES, conditions, latest_of_most_rounds, settings_title
from ddkit.reporting.rows import Estimate, dataset_title
from ddkit.results import Result
from ddkit.runtime.files import sha256_of
from ddkit.statistics import CONFIDENCE, compare

if TYPE_CHECKING:
    from PIL.Image import Image

_FEWEST_DIGITS = 6  # of a hash that stands for a set
_MOST_PICTURED = 12  # classes with images, at either end


@dataclass(frozen=True)
class ClassDifference:
    """The accuracies of one class, and how much the first exceeds the second."""

    label: int
    name: str
    first: float
    second: float
    estimate: Estimate


@dataclass(frozen=True)
class SetsCompared:
    """Two results under the same settings. Differences are the first's accuracy minus the second's.

    difference: of the means. classes: largest difference first. paired: True if round i of both began with the same
    network, so that the intervals are those of paired differences. remarks: sentences on what limits the comparison.
    pictures: of the classes that differ most, those of the first and of the second. recipes: paths, or "".
    """

    first: Result
    second: Result
    title: str
    difference: Estimate
    paired: bool
    classes: tuple[ClassDifference, ...]
    remarks: tuple[str, ...]
    pictures: tuple[tuple[ClassPictures, ClassPictures], ...]
    recipes: tuple[str, str]

    @property
    def names(self) -> tuple[str, str]:
        """What the two are called: their names, or their files if those are the same."""
        first, second = self.first, self.second
        if first.name != second.name:
            return first.name, second.name
        if first.source != second.source:
            return first.source, second.source
        return f"{first.name}, {first.sha256[:6]}", f"{second.name}, {second.sha256[:6]}"

    def as_data(self) -> dict[str, Any]:
        """Plain values for JSON; accuracies and differences are fractions."""
        return {
            "first": _identity(self.first, self.recipes[0]),
            "second": _identity(self.second, self.recipes[1]),
            "difference": vars(self.difference),
            "paired": self.paired,
            "classes": [
                {"label": each.label, "name": each.name, "first": each.first, "second": each.second, **vars(each.estimate)}
                for each in self.classes
            ],
            "remarks": list(self.remarks),
        }


def compare_sets(
    first: str, second: str, results: Sequence[Result], tracks: Collection[int] | None = None
) -> tuple[SetsCompared, ...]:
    """Compare two evaluated sets on each dataset on which both were evaluated under the same settings.

    first, second: each the name of a result, a set's file, or the beginning of its SHA-256. tracks: whose results are
    compared; None means all. Of several evaluations the official one is taken, else the latest of those with the most rounds.
    Raises UsageError for names that nothing was recorded under on these tracks, and for two sets without common settings,
    MissingDataError for a file that was not evaluated, and BadFileError for one that cannot be read.
    """
    ours, theirs = (
        latest_of_most_rounds((conditions(each), each) for each in _named(word, results, tracks)) for word in (first, second)
    )
    common = [key for key in ours if key in theirs and ours[key] != theirs[key]]
    if not common:
        if ours == theirs:
            raise UsageError(f"'{first}' and '{second}' are the same results.", "Name two different sets.")
        settings = _settings(ours), _settings(theirs)
        differ = "tested on the same images" if len(set(settings)) == 1 else "evaluated under the same settings"
        raise UsageError(
            f"'{first}' and '{second}' were not {differ}: {settings[0]} and {settings[1]}.",
            "Evaluate both in the same way: ddkit evaluate A.pt B.pt",
        )
    chosen: dict[str, tuple[Result, Result]] = {}
    for key in sorted(common, key=lambda key: (ours[key].official, min(ours[key].rounds, theirs[key].rounds), ours[key].date)):
        chosen[ours[key].dataset] = ours[key], theirs[key]  # the last one is the best
    return tuple(_compared(*chosen[name]) for name in sorted(chosen))


def _named(word: str, results: Sequence[Result], tracks: Collection[int] | None) -> list[Result]:
    """The results on these tracks that a word on the command line means."""
    found = _recorded(word, results)
    wanted = [each for each in found if tracks is None or each.track in tracks]
    if not wanted:
        track = found[-1].track
        raise UsageError(f"'{word}' was evaluated on track {track} only.", f"Compare it with --track {track}.")
    return wanted


def _recorded(word: str, results: Sequence[Result]) -> list[Result]:
    """The results of any track that a word means, one or more."""
    path = Path(word)
    if path.is_file():
        sha256 = sha256_of(path)
        if found := [each for each in results if each.sha256 == sha256]:
            return found
        if path.suffix == ".zip":
            raise MissingDataError(f"No results are recorded with the hash of {word}.", "Give the name it was evaluated under.")
        raise MissingDataError(f"{word} was not evaluated as it is.", f"Evaluate it: ddkit evaluate {shlex.quote(word)}")
    found = [each for each in results if word in _names(each)]
    if not found and len(word) >= _FEWEST_DIGITS:
        found = [each for each in results if each.sha256.startswith(word.lower())]
    if not found:
        known = tuple(dict.fromkeys(name for each in results for name in _names(each)))
        remedy = did_you_mean(word, known) if known else "Evaluate a set first: ddkit evaluate"
        raise UsageError(f"Nothing was recorded under the name '{word}', and there is no such file.", remedy)
    return found


def _names(result: Result) -> tuple[str, ...]:
    """The name that it was recorded under, and the leaderboard's for real images."""
    return tuple(filter(None, (result.name, BASELINE_NAMES.get(result.kind))))


def _settings(results: dict[tuple[Any, ...], Result]) -> str:
    return " or ".join(dict.fromkeys(f"{dataset_title(r.dataset)}, {settings_title(r)}" for r in results.values()))


def _compared(first: Result, second: Result) -> SetsCompared:
    titles = class_titles(first)
    paired = (first.seed, first.rounds) == (second.seed, second.rounds) and first.track == 1
    whole = _estimate(first.accuracies, second.accuracies, paired)
    remarks = []
    single = min(first.rounds, second.rounds) == 1
    if single:
        remarks.append("A single round gives no interval: it does not tell how much others would differ.")
    elif whole.half_width is None:
        same = "The difference is the same in every round" if paired else "The rounds do not vary"
        remarks.append(f"{same}, so no interval can be given: rounds that agree do not tell how much others would differ.")
    recorded = bool(first.class_rounds and second.class_rounds)
    if first.per_class and second.per_class and not recorded and not single:
        remarks.append(
            "The records do not hold the accuracy of each class in each round, so the classes have no intervals. Run the same "
            "ddkit evaluate again: finished rounds are read and not repeated."
        )
    classes = []
    for label, (ours, theirs) in enumerate(zip(first.per_class, second.per_class, strict=False)):
        estimate = Estimate(ours - theirs, None)
        if recorded:
            by_round = [[each[label] for each in result.class_rounds] for result in (first, second)]
            estimate = _estimate(by_round[0], by_round[1], paired)
        classes.append(ClassDifference(label, class_name(titles, label), ours, theirs, estimate))
    classes.sort(key=lambda each: -each.estimate.value)
    if any(each.estimate.half_width is not None for each in classes):
        clear, by_chance = sum(bool(each.estimate.is_clear) for each in classes), round((1 - CONFIDENCE) * len(classes))
        remarks.append(
            f"{clear} of {len(classes)} classes differ by more than their interval; about {by_chance} would by chance."
        )
    pictures, problems = _pictures(first, second, [each.label for each in extremes(classes, _MOST_PICTURED)], titles)
    return SetsCompared(
        first, second, dataset_title(first.dataset), whole, paired, tuple(classes), (*remarks, *problems), pictures,
        recipes=(find_recipe(first.source, first.sha256), find_recipe(second.source, second.sha256)),
    )  # fmt: skip


def _estimate(first: Sequence[float], second: Sequence[float], paired: bool) -> Estimate:
    """The difference of the means with its interval; without one for single rounds, and for rounds that all agree."""
    if min(len(first), len(second)) < 2:
        return Estimate(sum(first) / len(first) - sum(second) / len(second), None)
    found = compare(first, second, paired=paired)
    return Estimate(found.difference, found.half_width)


def extremes(classes: Sequence[ClassDifference], most: int) -> list[ClassDifference]:
    """The `most` classes at either end."""
    return list(classes) if len(classes) <= 2 * most else [*classes[:most], *classes[-most:]]


def _pictures(
    first: Result, second: Result, labels: Sequence[int], titles: Sequence[str]
) -> tuple[tuple[tuple[ClassPictures, ClassPictures], ...], list[str]]:
    """The images of these classes of both sets, and why there are none."""
    sheets, problems = zip(*(pictures_of(result, titles, labels) for result in (first, second)), strict=True)
    without = tuple(ClassPictures(class_name(titles, label), ()) for label in labels)
    pairs = tuple(zip(sheets[0] or without, sheets[1] or without, strict=True))
    return (pairs if any(sheets) else ()), [problem for problem in problems if problem]


def _identity(result: Result, recipe: str) -> dict[str, Any]:
    return {
        "name": result.name, "dataset": result.dataset, "source": result.source, "sha256": result.sha256, "mean": result.mean,
        "accuracies": list(result.accuracies), "official": result.official, "recipe": recipe,
    }  # fmt: skip


def comparison_sheet(compared: SetsCompared) -> Image | None:
    """The images of both sets next to each other, the same class on the same row; None if those are no longer there."""
    from ddkit.data.images import denormalize, to_uint8
    from ddkit.reporting.details import evaluated_images
    from ddkit.sets.contact_sheet import side_by_side

    found = [sheet for result in (compared.first, compared.second) if (sheet := evaluated_images(result))]
    if len(found) < 2:
        return None
    titles = class_titles(compared.first) or [f"class {each.label}" for each in sorted(compared.classes, key=lambda c: c.label)]
    first, second = ((to_uint8(denormalize(images, spec)), labels) for images, labels, spec in found)
    return side_by_side(first, second, titles, titles=compared.names)
