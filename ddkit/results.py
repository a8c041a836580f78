"""The record of an evaluation, and the file of records: one JSON object a line, only ever appended to."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddkit.errors import BadFileError
from ddkit.runtime.jsonl import append_line, read_lines, require_appendable
from ddkit.statistics import mean_interval, sample_std

FORMAT_VERSION = 1
_LARGEST = 2**63
RESULTS_FILE = Path("runs/results.jsonl")


class Scores:
    """What the accuracies of some rounds, fractions of the test set, come to."""

    accuracies: tuple[float, ...]

    @property
    def rounds(self) -> int:
        return len(self.accuracies)

    @property
    def mean(self) -> float:
        """Mean accuracy over the rounds: the score."""
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the rounds (n - 1); None for a single round."""
        return sample_std(self.accuracies)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean by Student's t; None for a single round, or where all came to the same."""
        return mean_interval(self.accuracies)


@dataclass(frozen=True)
class Result(Scores):
    """One evaluated set. Accuracies are fractions of the test set, 0 to 1.

    kind: what was evaluated: "submission", or a reference to hold it against: "random-real"
        (as many real images a class, drawn at random), "first-real" (the first ones of each class instead) or
        "full-real" (the whole training set).
    sha256: of the evaluated file; of the pixels and labels where there was no file.
    images_per_class: smallest and largest number of images of any class.
    epochs_setting: E of PROTOCOL.md; E + 1 epochs ran.
    loss_curves: per round, the mean training loss of evenly spaced epochs, first and last included.
    per_class: mean accuracy of each class over the rounds.
    confusions: the most frequent mistakes, as (true class, predicted class, mean count per round).
    official: true only where nothing differs from PROTOCOL.md; otherwise `deviations` says what does.
    """

    name: str
    dataset: str
    track: int
    sha256: str
    source: str
    images: int
    images_per_class: tuple[int, int]
    epochs_setting: int
    accuracies: tuple[float, ...]
    kind: str = "submission"
    network: str = "convnet"
    augment: bool = True
    precision: str = "float32"
    seed: int = 0
    official: bool = False
    deviations: tuple[str, ...] = ()
    seconds: float = 0.0  # of training and testing, all rounds
    generation_seconds: tuple[float, ...] = ()  # track 2: of the generator, per round
    generated: tuple[int, ...] = ()  # track 2: how many images it made, per round
    time_budget: float | None = None  # track 2: seconds it had for each round; None where the record is older than that
    test_images: int | None = None  # None where the record is older than that
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""  # ISO 8601, UTC, when the evaluation ended
    loss_curves: tuple[tuple[float, ...], ...] = ()
    per_class: tuple[float, ...] = ()
    confusions: tuple[tuple[int, int, float], ...] = ()
    made_by: Mapping[str, Any] = field(default_factory=dict)  # the JSON beside the evaluated set
    format: int = FORMAT_VERSION


@dataclass(frozen=True)
class Reading:
    """What a results file held: the usable records in file order, and a line on each that was not."""

    results: tuple[Result, ...]
    problems: tuple[str, ...]


def append(result: Result, path: str | os.PathLike[str] = RESULTS_FILE) -> None:
    """Append one record and sync it. A torn last line stays as it is; the record begins on a new line."""
    append_line(path, dataclasses.asdict(result))


def read(path: str | os.PathLike[str] = RESULTS_FILE) -> Reading:
    """Read all records; unusable lines are reported, never fatal. A missing file reads as empty.

    Raises BadFileError when the file is there and cannot be read.
    """
    results: list[Result] = []
    problems: dict[int, str] = {}
    for number, value in read_lines(path, problems.__setitem__):
        try:
            results.append(_from_json(value))
        except (ValueError, BadFileError) as error:
            problems[number] = str(error)
    return Reading(tuple(results), tuple(f"{path}, line {number}: {problems[number]}" for number in sorted(problems)))


class Records:
    """A file of results that is added to while it is worked with; what it holds already is not written twice.

    problems: a line on each of the file's that cannot be used; they stay as they are.
    writes: False in the processes of a group that do not speak for it; they remember without writing.
    Raises BadFileError when the file is there and cannot be read, or cannot be written to: before anything is computed.
    """

    def __init__(self, path: str | os.PathLike[str] = RESULTS_FILE, *, writes: bool = True) -> None:
        reading = read(path)
        if writes:
            require_appendable(path)
        self.problems = reading.problems
        self._path, self._writes = path, writes
        self._results = {_identity(result): result for result in reading.results}

    @property
    def results(self) -> tuple[Result, ...]:
        """All of them, oldest first."""
        return tuple(self._results.values())

    def add(self, result: Result) -> None:
        """Remember a result and write it to the end of the file, unless the same came out of the same before."""
        if _identity(result) in self._results:
            return
        self._results[_identity(result)] = result
        if self._writes:
            append(result, self._path)


def _identity(result: Result) -> tuple[Any, ...]:
    """The same for a result that was only read back from an evaluation's finished state."""
    return (
        result.name, result.kind, result.sha256, result.dataset, result.track, result.epochs_setting, result.network,
        result.augment, result.precision, result.seed, result.accuracies,
    )  # fmt: skip


def _from_json(value: Any) -> Result:
    if not isinstance(value, dict):
        raise BadFileError("not a result record")
    if value.get("format") != FORMAT_VERSION:
        raise BadFileError(f"format version {value.get('format')!r}, this ddkit reads {FORMAT_VERSION}")
    known = {f.name for f in dataclasses.fields(Result)}
    if unknown := sorted(set(value) - known):
        raise BadFileError(f"unknown fields {', '.join(unknown)}")
    required = {f.name for f in dataclasses.fields(Result) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(value)):
        raise BadFileError(f"fields missing: {', '.join(missing)}")
    values = {name: _tuples(item) for name, item in value.items()}
    for name, item in values.items():
        if not _FORMS[name](item):
            raise BadFileError(f"{name} cannot be {json.dumps(item):.60}")
    return Result(**values)


def _tuples(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    # Lists of numbers, the bulk of a record, are converted whole: files of thousands of records stay quick to read.
    return tuple(map(_tuples, value)) if value and isinstance(value[0], list) else tuple(value)


def _is_text(value: Any) -> bool:
    """JSON can hold halves of characters, which cannot be written."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_number(value: Any) -> bool:
    """What JSON has, where a bool is none; its integers know no end, ours do."""
    return type(value) is float or (type(value) is int and abs(value) < _LARGEST)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, tuple) and set(map(type, value)) <= {int, float}


def _each(form: Callable[[Any], bool], *, least: int = 0, most: int | None = None) -> Callable[[Any], bool]:
    """The form of a tuple of so many items."""

    def holds(value: Any) -> bool:
        return isinstance(value, tuple) and least <= len(value) <= (most or len(value)) and all(map(form, value))

    return holds


# What the fields of a record look like, so that a line from elsewhere is named and not met later on.
_FORMS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("name", "dataset", "sha256", "source", "kind", "network", "precision", "device", "date"), _is_text),
    **dict.fromkeys(("track", "images", "epochs_setting", "seed", "format"), _is_count),
    **dict.fromkeys(("augment", "official"), lambda value: isinstance(value, bool)),
    **dict.fromkeys(("versions", "made_by"), _is_mapping),
    "images_per_class": _each(_is_count, least=2, most=2),
    "accuracies": _each(_is_fraction, least=1),
    "deviations": _each(_is_text),
    "seconds": _is_number,
    "time_budget": lambda value: value is None or _is_number(value),
    "test_images": lambda value: value is None or _is_count(value),
    "generation_seconds": _each(_is_number),
    "generated": _each(_is_count),
    "loss_curves": _each(_each(_is_number)),
    "per_class": _each(_is_number),
    "confusions": _each(lambda value: _each(_is_number, least=3, most=3)(value) and all(map(_is_count, value[:2]))),
}
