"""The rows of a leaderboard, with their accuracies, intervals and differences, and groups of comparable rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ddkit.results import Result
from ddkit.statistics import half_width, mean

DATASET_TITLES = {"cifar100": "CIFAR-100", "tinyimagenet": "TinyImageNet"}


@dataclass(frozen=True)
class Estimate:
    """A fraction, and half the width of its 95 % interval; None for a single round, and for equal ones."""

    value: float
    half_width: float | None

    @property
    def is_clear(self) -> bool | None:
        """True if zero lies outside the interval; None without an interval."""
        return None if self.half_width is None else abs(self.value) > self.half_width


@dataclass(frozen=True)
class Row:
    """A row: a published entry, one of the user's sets, or a baseline that these are compared with.

    kind: "published", or a Result's kind ("submission", "random-real", "first-real", "full-real").
    accuracy: dataset -> fraction. score: the mean over both datasets of the challenge, None until both are evaluated;
        for other datasets the accuracy.
    results: the latest evaluation for each dataset; empty for published entries.
    rank: among official scores; None for baselines, for incomplete rows, and for those that are not official.
    best_published: the best published mean over the datasets of this row; None if there is none.
    baseline: random real images under the same settings, in the order of `results`; empty if there are none.
    """

    name: str
    kind: str
    accuracy: Mapping[str, float]
    score: float | None
    results: Mapping[str, Result] = field(default_factory=dict)
    rank: int | None = None
    source: str = ""
    best_published: float | None = None
    baseline: tuple[Result, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def spread(self) -> Estimate | None:
        """The mean of this row's accuracies with its interval; None for published entries."""
        if not self.results:
            return None
        evaluated = tuple(self.results.values())
        return Estimate(mean(self.accuracy.values()), half_width([r.accuracies for r in evaluated], 1 / len(evaluated)))

    @property
    def to_first(self) -> Estimate | None:
        """Difference to the best published entry. Its spread is not public, so the interval is that of our mean."""
        if self.best_published is None or self.spread is None:
            return None
        return Estimate(self.spread.value - self.best_published, self.spread.half_width)

    @property
    def to_random(self) -> Estimate | None:
        """Difference to random real images, over the datasets of this row."""
        return _difference(tuple(self.results.values()), self.baseline) if self.baseline else None

    def value_and_interval(self, dataset: str | None) -> tuple[float, float | None] | None:
        """The accuracy on a dataset, or the score (None), with half its interval if there is one; None if it is unknown."""
        if dataset is None:
            return None if self.score is None else (self.score, self.spread.half_width if self.spread else None)
        if dataset not in self.accuracy:
            return None
        interval = self.results[dataset].interval if dataset in self.results else None
        return self.accuracy[dataset], None if interval is None else (interval[1] - interval[0]) / 2

    @property
    def is_local(self) -> bool:
        """True for the user's own sets."""
        return self.kind == "submission"

    @property
    def official(self) -> bool:
        return self.kind == "published" or bool(self.results) and all(r.official for r in self.results.values())

    @property
    def date(self) -> str:
        """ISO day of the latest evaluation, empty where unknown."""
        return max((r.date for r in self.results.values()), default="")[:10]

    @property
    def rounds(self) -> tuple[int, ...]:
        """Rounds of each dataset's evaluation, in the order of `results`."""
        return tuple(r.rounds for r in self.results.values())

    @property
    def deviations(self) -> tuple[str, ...]:
        """The differences from the protocol in any of the evaluations, each once."""
        return tuple(dict.fromkeys(d for r in self.results.values() for d in r.deviations))

    @property
    def value(self) -> float | None:
        """The value that rows are sorted by: the score, else the mean of the accuracies that are known."""
        if self.score is not None or not self.accuracy:
            return self.score
        return mean(self.accuracy.values())


@dataclass(frozen=True)
class Group:
    """Rows obtained under the same settings, best first.

    title: the settings in words. datasets: those for which a row has an accuracy.
    shared_deviations: differences from the protocol that all rows have in common.
    """

    track: int
    official: bool
    title: str
    datasets: tuple[str, ...]
    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()
    shared_deviations: tuple[str, ...] = ()

    def verdict(self, row: Row) -> str:
        """The row's status: "official", where it was published, or why it is not official unless all rows share that."""
        if row.kind == "published":
            return f"published, {row.source}"
        own = [d for d in row.deviations if d not in self.shared_deviations]
        return "official" if row.official else "; ".join(own) or "not official"


def dataset_title(name: str) -> str:
    """The dataset's name as it is usually written."""
    return DATASET_TITLES.get(name, name)


def shortened(group: Group, most_rows: int | None) -> tuple[Group, int]:
    """The group with the best `most_rows` rows of each kind (published ones all stay), and how many were left out."""
    if most_rows is None:
        return group, 0
    kept: list[Row] = []
    counts: dict[str, int] = {}
    for row in group.rows:
        counts[row.kind] = counts.get(row.kind, 0) + 1
        if row.kind == "published" or counts[row.kind] <= most_rows:
            kept.append(row)
    return replace(group, rows=tuple(kept)), len(group.rows) - len(kept)


def _difference(ours: Sequence[Result], theirs: Sequence[Result]) -> Estimate:
    """Mean accuracy of `ours` minus that of `theirs`, with Welch's interval (Welch 1947).

    Both hold the same datasets in the same order, which count equally.
    """
    weight = 1 / len(ours)
    value = weight * (sum(r.mean for r in ours) - sum(r.mean for r in theirs))
    return Estimate(value, half_width([r.accuracies for r in (*ours, *theirs)], weight))
