"""The leaderboard: results and published entries in groups within which numbers can be compared.

Nothing here imports torch, so that a leaderboard of thousands of results is shown at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from ddkit.challenge import CHALLENGE_DATASETS, PUBLISHED, TEST_IMAGES, TRACKS, Entry
from ddkit.reporting.rows import Group, Row, dataset_title
from ddkit.results import Result
from ddkit.statistics import mean

_CHALLENGE_NAMES = tuple(spec.name for spec in CHALLENGE_DATASETS)
BASELINE_NAMES = {
    "random-real": "random real images",
    "first-real": "first real images",
    "full-real": "all real images",
}


def build(results: Sequence[Result], tracks: Iterable[int] | None = None) -> tuple[Group, ...]:
    """All groups: for each track the official one with the published entries, then the others, newest first.

    tracks: None means those with results, or track 1 without any.
    """
    wanted = (sorted({r.track for r in results} & TRACKS.keys()) or [1]) if tracks is None else list(tracks)
    groups: list[Group] = []
    for track in wanted:
        groups += _build_track(track, [r for r in results if r.track == track])
    return tuple(groups)


def _build_track(track: int, results: Sequence[Result]) -> list[Group]:
    baselines = latest_of_most_rounds((conditions(r), r) for r in results if r.kind == "random-real")
    drafts = _drafts(results)
    official = [d for d in drafts if d.key.official and d.key.dataset is None]
    groups = [_official_group(track, official, baselines)]
    others: dict[_GroupKey, list[_Draft]] = {}
    for draft in reversed(drafts):  # newest first
        if not (draft.key.official and draft.key.dataset is None):
            others.setdefault(draft.key, []).append(draft)
    # Datasets of the challenge first; sorting keeps the newest first within both.
    ordered = sorted(others.items(), key=lambda item: item[0].dataset is not None)
    titles = Counter(key.title() for key in others)
    for key, members in ordered:
        title = key.title()
        if titles[title] > 1:
            title += f", test images {key.test_sha256[:6] or 'of unknown content'}"
        groups.append(_other_group(key, title, members, baselines))
    return groups


def _official_group(track: int, drafts: Sequence[_Draft], baselines: Mapping[_Conditions, Result]) -> Group:
    published = [entry for entry in PUBLISHED if entry.track == track]
    theirs = [Row(e.name, "published", dict(e.accuracy), e.score, rank=e.rank, source=e.source) for e in published]
    rows = _with_distinct_names(_ranked(_best_first([*theirs, *(_local_row(d, baselines, published) for d in drafts)])))
    facts = TRACKS[track]
    remarks = []
    if any(not entry.accuracy for entry in published):
        remarks.append("The published entries of this track have ranks but no public numbers, so nothing else is ranked.")
    elif any(row.is_local for row in rows):
        remarks.append("Ranks count the published entries whose numbers are public.")
    remarks += _on_equal_rounds(rows)
    return Group(
        track, True, f"Official: E = {facts.epochs_setting}, {facts.rounds} rounds", _CHALLENGE_NAMES,
        tuple(rows), tuple(remarks),
    )  # fmt: skip


def _other_group(key: _GroupKey, title: str, drafts: Sequence[_Draft], baselines: Mapping[_Conditions, Result]) -> Group:
    rows = _with_distinct_names(_best_first(_local_row(d, baselines, ()) for d in drafts))
    present = {name for row in rows for name in row.accuracy}
    datasets = tuple(sorted(present, key=_dataset_order))
    shared = tuple(d for d in rows[0].deviations if all(d in row.deviations for row in rows))
    remarks = [f"Not comparable with the published entries: {'; '.join(shared)}."] if shared else []
    if key.track == 1 and any(row.is_local for row in rows) and not any(row.kind == "random-real" for row in rows):
        remarks.append("No random real images were evaluated under these settings.")
    remarks += _on_equal_rounds(rows)
    return Group(key.track, False, title, datasets, tuple(rows), tuple(remarks), shared)


def _on_equal_rounds(rows: Iterable[Row]) -> list[str]:
    """Why a row of several rounds has no interval, if there is one."""
    if any(row.spread and row.spread.half_width is None and 1 not in row.rounds for row in rows):
        return ["Rounds that do not vary do not tell how much others would differ, so no interval can be given."]
    return []


@dataclass(frozen=True)
class _GroupKey:
    """The settings that must be equal for numbers to be comparable.

    dataset: None for the challenge's datasets, whose mean is one score.
    ipc: smallest and largest images per class; None in track 2, where the entry decides.
    time_budget, test_images: None if they are the protocol's; the latter also for other datasets.
    test_sha256: see `_test_sha256`.
    """

    track: int
    official: bool
    dataset: str | None
    epochs_setting: int
    network: str
    augment: bool
    precision: str
    ipc: tuple[int, int] | None
    time_budget: float | None
    test_images: int | None
    test_sha256: str

    @classmethod
    def of(cls, result: Result) -> _GroupKey:
        in_challenge = result.dataset in _CHALLENGE_NAMES
        usual_budget = result.time_budget == TRACKS[result.track].time_budget_seconds
        return cls(
            result.track,
            result.official,
            None if in_challenge else result.dataset,
            result.epochs_setting,
            result.network,
            result.augment,
            result.precision,
            result.images_per_class if result.track == 1 else None,
            None if usual_budget else result.time_budget,
            result.test_images if in_challenge and result.test_images != TEST_IMAGES else None,
            _test_sha256(result),
        )

    def title(self) -> str:
        """The settings in words, those of the protocol left out."""
        parts = [f"{dataset_title(self.dataset) if self.dataset else 'Not official'}: E = {self.epochs_setting}"]
        if self.ipc is not None and self.ipc != (TRACKS[1].ipc,) * 2:
            low, high = self.ipc
            count = str(low) if low == high else f"{low} to {high}"
            parts.append("1 image a class" if count == "1" else f"{count} images a class")
        if self.time_budget is not None:
            parts.append(f"{self.time_budget:g} s to generate")
        if self.test_images is not None:
            parts.append(f"{self.test_images:,} test images")
        elif self.dataset is None and self.test_sha256:
            parts.append("other test images")
        if self.network != "convnet":
            parts.append(self.network)
        if not self.augment:
            parts.append("no augmentation")
        if self.precision != "float32":
            parts.append(self.precision)
        return ", ".join(parts)


@dataclass
class _Draft:
    """A row under construction: a result for each dataset, evaluated under one name.

    earlier: the latest results of earlier rows of that name.
    """

    key: _GroupKey
    name: str
    kind: str
    earlier: dict[str, Result]
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def all_results(self) -> dict[str, Result]:
        """A missing dataset is taken from earlier rows, since one of two files may have been made again."""
        known = {**self.earlier, **self.results}
        return {name: known[name] for name in sorted(known, key=_dataset_order)}

    @property
    def remarks(self) -> tuple[str, ...]:
        taken = [r for name, r in self.all_results.items() if name not in self.results]
        return tuple(f"{dataset_title(r.dataset)} as evaluated on {r.date[:10] or 'an earlier day'}" for r in taken)


def _dataset_order(name: str) -> tuple[int, str]:
    return (_CHALLENGE_NAMES.index(name) if name in _CHALLENGE_NAMES else len(_CHALLENGE_NAMES)), name


def _test_sha256(result: Result) -> str:
    """The hash of the test images; "" for those of the challenge, and in old records."""
    official = result.dataset in _CHALLENGE_NAMES and not any("test images" in text for text in result.deviations)
    return "" if official else result.test_sha256


def settings_title(result: Result) -> str:
    """The settings of an evaluation in words: "official", or such as "E = 50, no augmentation"; first the track, if it is 2."""
    settings = "official" if result.official else _GroupKey.of(result).title().partition(": ")[2]
    return settings if result.track == 1 else f"track {result.track}, {settings}"


_Conditions = tuple[Any, ...]


def conditions(result: Result) -> _Conditions:
    """The settings that two results must share to be compared: random real images with a set, or one set with another.

    In track 2 the entries decide on the number of images.
    """
    return (
        result.dataset, result.track, result.epochs_setting, result.network, result.augment, result.precision,
        result.images_per_class if result.track == 1 else None, result.time_budget, result.test_images or TEST_IMAGES,
        _test_sha256(result),
    )  # fmt: skip


def latest_of_most_rounds(results: Iterable[tuple[_Conditions, Result]]) -> dict[_Conditions, Result]:
    """One result of each key: the latest of those with the most rounds, so that a quick look replaces nothing better."""
    kept: dict[_Conditions, Result] = {}
    for key, result in results:
        if key not in kept or result.rounds >= kept[key].rounds:
            kept.pop(key, None)  # so that it moves to the end
            kept[key] = result
    return kept


def _drafts(results: Sequence[Result]) -> list[_Draft]:
    """Results of one name under the same settings in one row, and a new row whenever a dataset occurs again.

    Of several files for a dataset only the one that is packed, `<dataset>.pt`, shares a row with other datasets.
    A later evaluation of the same set under the same seed replaces an earlier one, unless it has fewer rounds.
    """
    newest = latest_of_most_rounds(((_GroupKey.of(r), r.kind, r.name, r.dataset, r.sha256, r.seed), r) for r in results)
    stems: dict[_Conditions, set[str]] = {}
    for (*shared, _, _), result in newest.items():  # without hash and seed
        stems.setdefault(tuple(shared), set()).add(PurePath(result.source).stem)
    drafts: list[_Draft] = []
    latest: dict[_Conditions, _Draft] = {}
    for (key, kind, name, dataset, _, _), result in newest.items():
        stem = PurePath(result.source).stem
        apart = kind == "submission" and stem != dataset and len(stems[key, kind, name, dataset]) > 1
        row = (key, kind, name, stem if apart else "")
        before = latest.get(row)
        if before is None or dataset in before.results:
            latest[row] = _Draft(key, name, kind, earlier=before.all_results if before else {})
            drafts.append(latest[row])
        latest[row].results[dataset] = result
    return drafts


def _local_row(draft: _Draft, baselines: Mapping[_Conditions, Result], published: Sequence[Entry]) -> Row:
    results = draft.all_results
    evaluated = tuple(results.values())
    expected = (draft.key.dataset,) if draft.key.dataset else _CHALLENGE_NAMES
    accuracy = {name: r.mean for name, r in results.items()}
    baseline = tuple(baselines[key] for r in evaluated if (key := conditions(r)) in baselines)
    comparable = (e.accuracy for e in published if all(name in e.accuracy for name in results))
    best_published = max((mean(numbers[name] for name in results) for numbers in comparable), default=None)
    missing = [name for name in expected if name not in results] if draft.key.official else []
    return Row(
        name=BASELINE_NAMES.get(draft.kind, draft.name),
        kind=draft.kind,
        accuracy=accuracy,
        score=mean(accuracy.values()) if all(name in results for name in expected) else None,
        results=results,
        best_published=best_published if draft.kind == "submission" else None,
        baseline=baseline if len(baseline) == len(evaluated) and draft.kind != "random-real" else (),
        remarks=(
            *draft.remarks,
            *_generated(results),
            *(f"no rank without {dataset_title(name)}" for name in missing),
        ),
    )


def _with_distinct_names(rows: Sequence[Row]) -> list[Row]:
    """The rows with distinct names: rows of the user's sets that share a name get a suffix in which they differ, which is how
    they were made, the start of the hash, or the seed."""
    named = list(rows)
    for describe in _DISTINCTIONS:
        texts: dict[str, set[str]] = {}
        for row in named:
            if row.is_local:
                texts.setdefault(row.name, set()).add(describe(row))
        named = [
            replace(row, name=f"{row.name}, {describe(row)}") if len(texts.get(row.name, ())) > 1 and describe(row) else row
            for row in named
        ]
    return named


def _made_by(row: Row) -> str:
    """The origin of the row's sets, such as "generated" or "refined, 60 steps"; empty if it is not known."""
    texts = []
    for result in row.results.values():
        kind, steps = result.made_by.get("kind"), result.made_by.get("refined_steps")
        if isinstance(kind, str):
            texts.append(f"{kind}, {steps:,} steps" if isinstance(steps, int) else kind)
    return " and ".join(dict.fromkeys(texts))


_DISTINCTIONS: tuple[Callable[[Row], str], ...] = (
    _made_by,
    lambda row: " and ".join(r.sha256[:6] for r in row.results.values()),
    lambda row: f"seed {' and '.join(dict.fromkeys(str(r.seed) for r in row.results.values()))}",
)


def _generated(results: Mapping[str, Result]) -> tuple[str, ...]:
    """In track 2: how many images the generator made, and how fast."""
    made = {name: r for name, r in results.items() if r.generated and sum(r.generation_seconds) > 0}
    return tuple(
        f"{dataset_title(name)}: {sum(r.generated) / len(r.generated):,.0f} images a round, "
        f"{sum(r.generated) / sum(r.generation_seconds):,.1f} a second"
        for name, r in made.items()
    )


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """The rows ranked by score, without baselines. If numbers are not public, the published ranks stay."""
    if any(row.kind == "published" and row.score is None for row in rows):
        return list(rows)
    ranked, place = [], 0
    for row in rows:
        counts = row.score is not None and row.kind in ("published", "submission")
        place += counts
        ranked.append(replace(row, rank=place if counts else None))
    return ranked


def _best_first(rows: Iterable[Row]) -> list[Row]:
    """Published entries without numbers, then by score, then those with a dataset missing."""

    def order(row: Row) -> tuple[int, float]:
        if row.value is None:
            return 0, float(row.rank or 0)
        return (1 if row.score is not None else 2), -row.value

    return sorted(rows, key=order)
