"""The scores of DD-Ranking (arXiv 2505.13300): a set compared with random real images and with all real images.

All labels are hard here, as in the challenge, so that "any" and "hard" accuracy of the paper are the same.
Accuracies are fractions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ddkit.errors import counted
from ddkit.results import Result

_WEIGHT = 0.5  # w and gamma of the paper's leaderboard


def label_robust_score(hlr: float, ior: float) -> float:
    """LRS in [0, 1] from a = w IOR - (1 - w) HLR; HLR 0.20 and IOR 0.25 give 0.280.

    HLR (hard label recovery): how much lower the set's accuracy is than that of all real images; smaller is better.
    IOR (improvement over random): how much higher it is than that of as many random real images; larger is better.
    """
    return _to_unit(_WEIGHT * ior - (1 - _WEIGHT) * hlr)


def augmentation_robust_score(gain_augmented: float, gain_plain: float) -> float:
    """ARS in [0, 1] from the improvements over random images with and without augmentation."""
    return _to_unit(_WEIGHT * gain_augmented + (1 - _WEIGHT) * gain_plain)


def _to_unit(value: float) -> float:
    """(exp(a) - exp(-1)) / (e - exp(-1)): -1 becomes 0 and 1 becomes 1."""
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


@dataclass(frozen=True)
class MissingEvaluation:
    """An evaluation that a score needs and that is not among the results.

    kind: "submission", "random-real" or "full-real", as in Result.
    """

    kind: str
    augment: bool

    def __str__(self) -> str:
        subject = {
            "submission": "the set itself",
            "random-real": "as many random real images",
            "full-real": "the whole real training set",
        }[self.kind]
        return f"{subject}, {'with' if self.augment else 'without'} augmentation"


@dataclass(frozen=True)
class Ranking:
    """DD-Ranking's scores of one set; None if an evaluation in `missing` is needed.

    notes: which accuracies were obtained under other settings than the set's.
    """

    subject: Result
    hlr: float | None
    ior: float | None
    lrs: float | None
    ars: float | None
    missing: tuple[MissingEvaluation, ...]
    notes: tuple[str, ...] = ()

    @property
    def scores(self) -> dict[str, float | None]:
        """The scores by the paper's names, the two that combine the others first."""
        return {"LRS": self.lrs, "ARS": self.ars, "HLR": self.hlr, "IOR": self.ior}

    def as_data(self) -> dict[str, Any]:
        """Plain values for JSON; accuracies are fractions."""
        names = ("name", "dataset", "sha256", "source", "epochs_setting")
        subject = {name: getattr(self.subject, name) for name in names}
        return subject | self.scores | {"missing": list(map(str, self.missing)), "remarks": list(self.notes)}


def from_results(results: Iterable[Result]) -> tuple[Ranking, ...]:
    """The scores of every submission evaluated with augmentation, one for each set and setting."""
    results = tuple(results)
    index = _index(results)
    subjects = {(r.dataset, r.sha256, *_settings(r)): r for r in results if r.kind == "submission" and r.augment}
    return tuple(_ranking(subject, index) for subject in subjects.values())


def of_result(subject: Result, results: Iterable[Result]) -> Ranking:
    """The scores of one evaluated set; `results` holds the evaluations that it is compared with."""
    return _ranking(subject, _index(results))


_Index = dict[tuple[object, ...], list[Result]]


def _index(results: Iterable[Result]) -> _Index:
    """The results by what they may be compared by, oldest first."""
    index: _Index = {}
    for result in results:
        index.setdefault(_key(result, result.kind, result.augment), []).append(result)
    return index


def _key(result: Result, kind: str, augment: bool) -> tuple[object, ...]:
    """The values that an evaluation of that kind must share with `result`; for all real images dataset and network."""
    if kind == "full-real":
        return (kind, augment, result.dataset, result.network)
    same_set = result.sha256 if kind == "submission" else ""
    return (kind, augment, result.dataset, result.images_per_class, same_set, *_settings(result))


def _settings(result: Result) -> tuple[object, ...]:
    return (result.track, result.epochs_setting, result.network, result.precision)


def _ranking(subject: Result, index: _Index) -> Ranking:
    def newest(kind: str, *, augment: bool) -> Result | None:
        return index.get(_key(subject, kind, augment), [None])[-1]

    # All real images are best under the same settings, else with the most epochs: they need far fewer to be learned.
    all_real = reversed(index.get(_key(subject, "full-real", True), []))
    full_real = max(all_real, key=lambda r: (_settings(r) == _settings(subject), r.epochs_setting), default=None)
    random_real = newest("random-real", augment=True)
    plain, random_plain = newest("submission", augment=False), newest("random-real", augment=False)
    hlr = full_real.mean - subject.mean if full_real else None
    ior = subject.mean - random_real.mean if random_real else None
    ars = None
    if ior is not None and plain and random_plain:
        ars = augmentation_robust_score(ior, plain.mean - random_plain.mean)
    found = {
        MissingEvaluation("full-real", True): full_real,
        MissingEvaluation("random-real", True): random_real,
        MissingEvaluation("submission", False): plain,
        MissingEvaluation("random-real", False): random_plain,
    }
    return Ranking(
        subject,
        hlr,
        ior,
        label_robust_score(hlr, ior) if hlr is not None and ior is not None else None,
        ars,
        tuple(evaluation for evaluation, result in found.items() if result is None),
        tuple(
            f"{evaluation}: {_conditions(result)}; the set itself: {_conditions(subject)}"
            for evaluation, result in found.items()
            if result and (_settings(result), result.rounds) != (_settings(subject), subject.rounds)
        ),
    )


def _conditions(result: Result) -> str:
    return f"E = {result.epochs_setting}, {counted(result.rounds, 'round', 'rounds')}, {result.precision}"
