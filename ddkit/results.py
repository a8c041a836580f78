"""The record of an evaluation, and the file of such records as JSON lines."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ddkit.challenge import TRACKS
from ddkit.errors import BadFileError
from ddkit.runtime.html import html_table
from ddkit.runtime.jsonl import append_line, parse_lines, require_appendable
from ddkit.runtime.records import Count, read_record
from ddkit.statistics import mean_interval, sample_std

FORMAT_VERSION = 1
RESULTS_FILE = Path("runs/results.jsonl")
IN_MEMORY = "tensor in memory"  # the source of a set without a file


class Scores:
    """Mean and spread of the accuracies of some rounds, which are fractions of the test set."""

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
        """95 % confidence interval of the mean by Student's t; None for a single round, and for equal ones."""
        return mean_interval(self.accuracies)


@dataclass(frozen=True, kw_only=True)
class Outcome(Scores):
    """The outcome of an evaluation. Accuracies are fractions of the test set, 0 to 1.

    images_per_class: smallest and largest number of images of any class.
    official: True if nothing differs from PROTOCOL.md; `deviations` says what does.
    loss_curves: per round, the mean training loss of evenly spaced epochs, first and last included.
    per_class: mean accuracy of each class over the rounds. class_rounds: accuracies by round and class.
    confusions: the most frequent mistakes, as (true class, predicted class, mean count per round).
    """

    dataset: str
    images: Count
    images_per_class: tuple[Count, Count]
    accuracies: tuple[float, ...]
    official: bool = False
    deviations: tuple[str, ...] = ()
    seconds: float = 0.0  # of training and testing, all rounds
    generation_seconds: tuple[float, ...] = ()  # track 2: of the generator, per round
    generated: tuple[Count, ...] = ()  # track 2: how many images it made, per round
    time_budget: float | None = None  # track 2: seconds for each round; None in old records
    test_images: Count | None = None  # None in old records
    device: str = ""
    loss_curves: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    per_class: tuple[float, ...] = field(default=(), repr=False)
    confusions: tuple[tuple[Count, Count, float], ...] = field(default=(), repr=False)
    class_rounds: tuple[tuple[float, ...], ...] = field(default=(), repr=False)  # by round and class; () in old records
    test_sha256: str = ""  # of the pixels and labels of the test images; "" in old records


@dataclass(frozen=True, kw_only=True)
class Result(Outcome):
    """The record of one evaluated set: its outcome, and what was evaluated in which way.

    kind: "submission", or a baseline of real images: "random-real" (as many real images per class, drawn at
        random), "first-real" (the first ones of each class) or "full-real" (the whole training set).
    sha256: of the evaluated file, or of pixels and labels if there was no file.
    epochs_setting: E of PROTOCOL.md; E + 1 epochs ran.
    """

    name: str
    track: Annotated[int, TRACKS]
    sha256: str
    source: str
    epochs_setting: Count
    kind: str = "submission"
    network: str = "convnet"
    augment: bool = True
    precision: str = "float32"
    seed: Count = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""  # ISO 8601, UTC, when the evaluation ended
    made_by: Mapping[str, Any] = field(default_factory=dict, repr=False)  # the provenance of the evaluated set
    format: Count = FORMAT_VERSION

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        spread = "" if self.std is None else f" ± {100 * self.std:.2f}"
        interval = "none" if self.interval is None else " to ".join(f"{100 * end:.2f} %" for end in self.interval)
        rows = [
            ("set", self.source),
            ("dataset", self.dataset),
            ("accuracy", f"{100 * self.mean:.2f} %{spread}"),
            ("95 % interval", interval),
            ("rounds", ", ".join(f"{100 * accuracy:.2f} %" for accuracy in self.accuracies)),
            ("epochs setting", f"E = {self.epochs_setting}"),
            ("official", "yes" if self.official else f"no: {'; '.join(self.deviations)}"),
        ]
        return html_table(rows)


@dataclass(frozen=True)
class Reading:
    """The usable records of a results file in its order, and a text on each line that is not usable."""

    results: tuple[Result, ...]
    problems: tuple[str, ...]


def append(result: Result, path: str | os.PathLike[str] = RESULTS_FILE) -> None:
    """Append one record and wait until it is on the disk. Raises BadFileError if the system refuses."""
    append_line(path, dataclasses.asdict(result))


def read(path: str | os.PathLike[str] = RESULTS_FILE) -> Reading:
    """Read all records. Lines that cannot be used are reported and skipped; a missing file is empty.

    Raises BadFileError if the file is there and cannot be read.
    """
    return Reading(*parse_lines(path, _from_json))


class Records:
    """A results file with its records in memory. A record that it holds is not written again.

    problems: a text on each line that cannot be used; these lines stay in the file.
    writes: False keeps new records in memory only, in all but the main process of a group.
    Raises BadFileError, before anything is computed, if the file cannot be read or written.
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
        """All records, oldest first."""
        return tuple(self._results.values())

    def add(self, result: Result) -> bool:
        """Add a result, and append it to the file, unless it holds the same result of the same evaluation of that path.

        Returns whether the result was added.
        """
        known = self._results.get(_identity(result))
        if known is not None and len(known.class_rounds) >= len(result.class_rounds):
            return False  # an old record is written again if it does not have the accuracies by class and round
        self._results[_identity(result)] = result
        if self._writes:
            append(result, self._path)
        return True


def _identity(result: Result) -> tuple[Any, ...]:
    """Equal for a result that was only read back from the state of a finished evaluation.

    A file that was renamed since is another one, since the report looks for it where the latest record says.
    """
    return (
        result.name, result.kind, result.sha256, result.source, result.dataset, result.track, result.epochs_setting,
        result.network, result.augment, result.precision, result.seed, result.accuracies, result.test_sha256,
    )  # fmt: skip


def _from_json(value: Any) -> Result:
    """The record of a line. Raises BadFileError if it is not one, or of another version."""
    if isinstance(value, dict) and value.get("format") != FORMAT_VERSION:
        raise BadFileError(f"format version {value.get('format')!r}, this ddkit reads {FORMAT_VERSION}")
    result = read_record(Result, value)
    if not result.accuracies or not all(0 <= accuracy <= 1 for accuracy in result.accuracies):
        raise BadFileError(f"accuracies cannot be {list(result.accuracies)}, which are not fractions of the test set")
    return result
