"""Who stands where: results beside the published entries, in groups within which numbers can be compared.

Nothing here imports torch, so that a leaderboard of thousands of results is there at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ddkit.challenge import CHALLENGE_DATASETS, PUBLISHED, TRACKS, Entry
from ddkit.results import Result

DATASET_TITLES = {"cifar100": "CIFAR-100", "tinyimagenet": "TinyImageNet"}
_CHALLENGE_NAMES = tuple(spec.name for spec in CHALLENGE_DATASETS)
_REFERENCE_NAMES = {"random-real": "random real images", "full-real": "all real images"}
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A fraction, and half the width of its 95 % interval; None where a single round leaves no spread."""

    value: float
    half_width: float | None

    @property
    def is_clear(self) -> bool | None:
        """Whether zero lies outside the interval; None without one."""
        return None if self.half_width is None else abs(self.value) > self.half_width


@dataclass(frozen=True)
class Row:
    """One entry: published, ours, or a reference to hold the others against.

    kind: "published", or a Result's kind ("submission", "random-real", "full-real").
    accuracy: dataset -> fraction. score: the mean over both datasets of the challenge, None until both are there;
        of a dataset outside the challenge its accuracy.
    results: the latest evaluation for each dataset; empty for published entries.
    rank: among official scores; None for references, for incomplete entries and whatever is not official.
    best_published: the best published mean over the datasets of this row; None where none can be compared with.
    baseline: random real images under the same settings, in the order of `results`; empty where there are none.
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
        """The mean of this row's accuracies with its interval; None for published entries, which have none."""
        if not self.results:
            return None
        evaluated = tuple(self.results.values())
        return Estimate(_mean(self.accuracy.values()), _half_width(evaluated, 1 / len(evaluated)))

    @property
    def to_first(self) -> Estimate | None:
        """Difference to the best published entry. That has no spread: the interval is our own mean's."""
        if self.best_published is None or self.spread is None:
            return None
        return Estimate(self.spread.value - self.best_published, self.spread.half_width)

    @property
    def to_random(self) -> Estimate | None:
        """Difference to random real images, over the datasets that this row has."""
        return difference(tuple(self.results.values()), self.baseline) if self.baseline else None

    @property
    def is_local(self) -> bool:
        """Whether it is an entry of ours, neither published nor a reference."""
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
        """What differs from the protocol in any of the evaluations, each once."""
        return tuple(dict.fromkeys(d for r in self.results.values() for d in r.deviations))

    @property
    def value(self) -> float | None:
        """What rows are sorted by: the score, else the mean of what there is."""
        if self.score is not None or not self.accuracy:
            return self.score
        return _mean(self.accuracy.values())


@dataclass(frozen=True)
class Group:
    """Rows that were obtained under the same settings, best first.

    title: the settings in words. datasets: those with an accuracy; a score is the mean over both of the challenge.
    shared_deviations: what differs from the protocol in every row.
    """

    track: int
    official: bool
    title: str
    datasets: tuple[str, ...]
    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()
    shared_deviations: tuple[str, ...] = ()

    def verdict(self, row: Row) -> str:
        """Whether the row counts: `official`, where it was published, or what sets it apart from the group's others."""
        if row.kind == "published":
            return f"published, {row.source}"
        own = [d for d in row.deviations if d not in self.shared_deviations]
        return "official" if row.official else "; ".join(own) or "not official"


def dataset_title(name: str) -> str:
    """How people write the dataset's name."""
    return DATASET_TITLES.get(name, name)


def build(results: Sequence[Result], tracks: Iterable[int] | None = None) -> tuple[Group, ...]:
    """All groups: for each track the official one with the published entries, then the others, newest first.

    tracks: None for those with results, and track 1 in any case.
    """
    wanted = sorted({1, *(r.track for r in results)} & TRACKS.keys()) if tracks is None else list(tracks)
    groups: list[Group] = []
    for track in wanted:
        groups += _build_track(track, [r for r in results if r.track == track])
    return tuple(groups)


def difference(ours: Sequence[Result], theirs: Sequence[Result]) -> Estimate:
    """Mean accuracy of `ours` minus that of `theirs`, with Welch's interval (Welch 1947).

    The datasets are in the same order on both sides and count equally.
    """
    weight = 1 / len(ours)
    value = weight * (sum(r.mean for r in ours) - sum(r.mean for r in theirs))
    return Estimate(value, _half_width([*ours, *theirs], weight))


def sampled_curve(values: Sequence[float], points: int) -> tuple[float, ...]:
    """At most `points` values, evenly spaced, first and last included; values that are no numbers are left out."""
    finite = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    if len(finite) <= points:
        return tuple(finite)
    return tuple(finite[round(i * (len(finite) - 1) / (points - 1))] for i in range(points))


def as_data(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """The leaderboard as plain values for JSON; accuracies and differences are fractions."""
    return [
        {
            "track": group.track,
            "official": group.official,
            "title": group.title,
            "datasets": list(group.datasets),
            "remarks": list(group.remarks),
            "rows": [_row_data(row) for row in group.rows],
        }
        for group in groups
    ]


def _row_data(row: Row) -> dict[str, Any]:
    return {
        "rank": row.rank,
        "name": row.name,
        "kind": row.kind,
        "official": row.official,
        "accuracy": dict(row.accuracy),
        "score": row.score,
        "interval": _estimate_data(row.spread),
        "to_first": _estimate_data(row.to_first),
        "to_random": _estimate_data(row.to_random),
        "rounds": {name: r.rounds for name, r in row.results.items()},
        "std": {name: r.std for name, r in row.results.items()},
        "sha256": {name: r.sha256 for name, r in row.results.items()},
        "date": row.date,
        "source": row.source,
        "deviations": list(row.deviations),
        "remarks": list(row.remarks),
    }


def _estimate_data(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else {"value": estimate.value, "half_width": estimate.half_width}


def _build_track(track: int, results: Sequence[Result]) -> list[Group]:
    baselines = {_conditions(r): r for r in results if r.kind == "random-real"}
    drafts = _drafts(results)
    official = [d for d in drafts if d.key.official and d.key.dataset is None]
    groups = [_official_group(track, official, baselines)]
    others: dict[_GroupKey, list[_Draft]] = {}
    for draft in reversed(drafts):  # newest first
        if not (draft.key.official and draft.key.dataset is None):
            others.setdefault(draft.key, []).append(draft)
    # Datasets of the challenge first; sorting keeps the newest first within both.
    ordered = sorted(others.items(), key=lambda item: item[0].dataset is not None)
    return groups + [_other_group(key, members, baselines) for key, members in ordered]


def _official_group(track: int, drafts: Sequence[_Draft], baselines: Mapping[_Conditions, Result]) -> Group:
    published = [entry for entry in PUBLISHED if entry.track == track]
    rows = [_published_row(entry) for entry in published] + [_local_row(d, baselines, published) for d in drafts]
    rows = _ranked(_best_first(rows))
    facts = TRACKS[track]
    remarks = []
    if any(not entry.accuracy for entry in published):
        remarks.append("Published entries of this track have ranks but no public numbers: nothing to rank against.")
    elif any(row.is_local for row in rows):
        remarks.append("Ranks count the published entries whose numbers are public.")
    return Group(
        track, True, f"Official: E = {facts.epochs_setting}, {facts.rounds} rounds", _CHALLENGE_NAMES,
        tuple(rows), tuple(remarks),
    )  # fmt: skip


def _other_group(key: _GroupKey, drafts: Sequence[_Draft], baselines: Mapping[_Conditions, Result]) -> Group:
    rows = _best_first(_local_row(d, baselines, ()) for d in drafts)
    present = {name for row in rows for name in row.accuracy}
    datasets = tuple(sorted(present, key=_dataset_order))
    shared = _shared_deviations(rows)
    remarks = [f"Not comparable with the published entries: {'; '.join(shared)}."] if shared else []
    if not any(row.kind == "random-real" for row in rows):
        remarks.append("No random real images were evaluated under these settings.")
    return Group(key.track, False, key.title(), datasets, tuple(rows), tuple(remarks), shared)


def _shared_deviations(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(d for d in rows[0].deviations if all(d in row.deviations for row in rows))


@dataclass(frozen=True)
class _GroupKey:
    """What has to be equal for numbers to be comparable.

    dataset: None for the challenge's datasets, which make one score together.
    ipc: of track 1; track 2 leaves the number of images to the entry.
    """

    track: int
    official: bool
    dataset: str | None
    epochs_setting: int
    network: str
    augment: bool
    precision: str
    ipc: tuple[int, int] | None

    @classmethod
    def of(cls, result: Result) -> _GroupKey:
        in_challenge = result.dataset in _CHALLENGE_NAMES
        return cls(
            result.track,
            result.official,
            None if in_challenge else result.dataset,
            result.epochs_setting,
            result.network,
            result.augment,
            result.precision,
            result.images_per_class if result.track == 1 else None,
        )

    def title(self) -> str:
        name = dataset_title(self.dataset) if self.dataset else "Not official"
        return ", ".join([f"{name}: E = {self.epochs_setting}", *self._unusual()])

    def _unusual(self) -> list[str]:
        parts = []
        if self.ipc is not None and self.ipc != (TRACKS[1].ipc,) * 2:
            low, high = self.ipc
            parts.append(f"{low if low == high else f'{low} to {high}'} images a class")
        if self.network != "convnet":
            parts.append(self.network)
        if not self.augment:
            parts.append("no augmentation")
        if self.precision != "float32":
            parts.append(self.precision)
        return parts


@dataclass
class _Draft:
    """A row in the making: what was evaluated under one name, a result for each dataset.

    earlier: the latest results of the rows of that name that came before.
    """

    key: _GroupKey
    name: str
    kind: str
    earlier: dict[str, Result]
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def all_results(self) -> dict[str, Result]:
        """A dataset that is lacking is taken from the rows before: re-making one of two files leaves the other."""
        known = {**self.earlier, **self.results}
        return {name: known[name] for name in sorted(known, key=_dataset_order)}

    @property
    def remarks(self) -> tuple[str, ...]:
        taken = [r for name, r in self.all_results.items() if name not in self.results]
        return tuple(f"{dataset_title(r.dataset)} as evaluated on {r.date[:10] or 'an earlier day'}" for r in taken)


def _dataset_order(name: str) -> tuple[int, str]:
    return (_CHALLENGE_NAMES.index(name) if name in _CHALLENGE_NAMES else len(_CHALLENGE_NAMES)), name


_Conditions = tuple[Any, ...]


def _conditions(result: Result) -> _Conditions:
    """What random real images must share with a set to be its baseline."""
    return (
        result.dataset, result.track, result.epochs_setting, result.network, result.augment, result.precision,
        result.images_per_class,
    )  # fmt: skip


def _drafts(results: Sequence[Result]) -> list[_Draft]:
    """Results of one name and the same settings side by side, a new row each time a dataset is met again.

    An earlier evaluation of the very same set under the same seed is replaced by a later one.
    """
    newest: dict[tuple[Any, ...], Result] = {}
    for result in results:
        identity = (_GroupKey.of(result), result.kind, result.name, result.dataset, result.sha256, result.seed)
        newest.pop(identity, None)  # so that it takes its place at the end
        newest[identity] = result
    drafts: list[_Draft] = []
    latest: dict[tuple[Any, ...], _Draft] = {}
    for (*row, dataset, _, _), result in newest.items():
        before = latest.get(tuple(row))
        if before is None or dataset in before.results:
            key, kind, name = row
            latest[tuple(row)] = _Draft(key, name, kind, earlier=before.all_results if before else {})
            drafts.append(latest[tuple(row)])
        latest[tuple(row)].results[dataset] = result
    return drafts


def _local_row(draft: _Draft, baselines: Mapping[_Conditions, Result], published: Sequence[Entry]) -> Row:
    results = draft.all_results
    evaluated = tuple(results.values())
    expected = (draft.key.dataset,) if draft.key.dataset else _CHALLENGE_NAMES
    accuracy = {name: r.mean for name, r in results.items()}
    baseline = [baselines.get(_conditions(r)) for r in evaluated] if draft.kind != "random-real" else []
    return Row(
        name=_REFERENCE_NAMES.get(draft.kind, draft.name),
        kind=draft.kind,
        accuracy=accuracy,
        score=_mean(accuracy.values()) if all(name in results for name in expected) else None,
        results=results,
        best_published=_best_published(results, published) if draft.kind == "submission" else None,
        baseline=tuple(baseline) if all(baseline) else (),
        remarks=draft.remarks + _lacking(results, expected if draft.key.official else ()),
    )


def _lacking(results: Mapping[str, Result], expected: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"no rank without {dataset_title(name)}" for name in expected if name not in results)


def _published_row(entry: Entry) -> Row:
    return Row(entry.name, "published", dict(entry.accuracy), entry.score, rank=entry.rank, source=entry.source)


def _best_published(datasets: Iterable[str], published: Iterable[Entry]) -> float | None:
    """The best published mean over these datasets, of the entries whose numbers are public; None without any."""
    names = list(datasets)
    known = (entry.accuracy for entry in published if all(name in entry.accuracy for name in names))
    return max((_mean(accuracy[name] for name in names) for accuracy in known), default=None)


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """Ranks by score, but for references; published ranks stay where their numbers are not public."""
    if any(row.kind == "published" and row.score is None for row in rows):
        return list(rows)
    ranked, place = [], 0
    for row in rows:
        counts = row.score is not None and row.kind in ("published", "submission")
        place += counts
        ranked.append(replace(row, rank=place if counts else None))
    return ranked


def _best_first(rows: Iterable[Row]) -> list[Row]:
    """Published ranks without numbers, then scores, then entries that lack a dataset."""

    def order(row: Row) -> tuple[int, float]:
        if row.value is None:
            return 0, float(row.rank or 0)
        return (1 if row.score is not None else 2), -row.value

    return sorted(rows, key=order)


def _mean(values: Iterable[float]) -> float:
    known = tuple(values)
    return sum(known) / len(known)


def _half_width(results: Sequence[Result], weight: float) -> float | None:
    """Half the 95 % interval of a weighted sum of means, degrees of freedom by Welch and Satterthwaite."""
    deviations = [r.std for r in results]
    if None in deviations:
        return None
    variances = [(weight * s) ** 2 / r.rounds for s, r in zip(deviations, results, strict=True)]
    total = sum(variances)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(v**2 / (r.rounds - 1) for v, r in zip(variances, results, strict=True))
    return float(_t_quantile()(freedom, (1 + _CONFIDENCE) / 2)) * math.sqrt(total)


@functools.lru_cache(maxsize=1)
def _t_quantile() -> Callable[[float, float], float]:
    """Quantiles of Student's t; imported late, a leaderboard without spreads does without."""
    from scipy.special import stdtrit

    return stdtrit
