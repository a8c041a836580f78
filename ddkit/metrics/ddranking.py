"""The scores of DD-Ranking (arXiv 2505.13300): a set against random real images and against all real images.

All labels are hard here, as in the challenge, so that "any" and "hard" of the paper are the same accuracy.
Accuracies are fractions, never percentages: on percentages the scores leave [0, 1] without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ddkit.errors import UsageError
from ddkit.results import Result

WEIGHT = 0.5  # the leaderboard's w and gamma


def hard_label_recovery(full_real: float, synthetic: float) -> float:
    """HLR: how far the set stays behind all real images; smaller is better."""
    return _fraction(full_real) - _fraction(synthetic)


def improvement_over_random(synthetic: float, random_real: float) -> float:
    """IOR: how much better the set is than as many random real images; larger is better."""
    return _fraction(synthetic) - _fraction(random_real)


def label_robust_score(hlr: float, ior: float, weight: float = WEIGHT) -> float:
    """LRS in [0, 1] from a = w IOR - (1 - w) HLR. HLR 0.20 and IOR 0.25 give 0.280."""
    return _to_unit(weight * _difference(ior) - (1 - weight) * _difference(hlr))


def augmentation_robust_score(gain_augmented: float, gain_plain: float, weight: float = WEIGHT) -> float:
    """ARS in [0, 1] from the improvements over random with and without augmentation, weighted."""
    return _to_unit(weight * _difference(gain_augmented) + (1 - weight) * _difference(gain_plain))


def _to_unit(value: float) -> float:
    """(exp(a) - exp(-1)) / (e - exp(-1)): -1 becomes 0 and 1 becomes 1."""
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def _fraction(accuracy: float) -> float:
    if not 0 <= accuracy <= 1:
        raise UsageError(f"An accuracy of {accuracy:g} is no fraction.", "Divide percentages by 100.")
    return accuracy


def _difference(value: float) -> float:
    if not -1 <= value <= 1:
        raise UsageError(f"{value:g} is no difference of two fractions.", "Divide percentages by 100.")
    return value


@dataclass(frozen=True)
class Need:
    """An evaluation that the scores want and that the results do not hold.

    kind: "submission", "random-real" or "full-real", as in Result.
    """

    kind: str
    augment: bool

    def __str__(self) -> str:
        subject = {
            "submission": "the set itself",
            "random-real": "random real images, as many a class",
            "full-real": "the whole real training set",
        }[self.kind]
        return f"{subject}, {'with' if self.augment else 'without'} augmentation"


@dataclass(frozen=True)
class Ranking:
    """DD-Ranking's scores of one set; None where `missing` says what they lack.

    remarks: where the accuracies behind a score were not obtained under quite the same settings.
    """

    subject: Result
    hlr: float | None
    ior: float | None
    lrs: float | None
    ars: float | None
    missing: tuple[Need, ...]
    remarks: tuple[str, ...] = ()

    @property
    def scores(self) -> dict[str, float | None]:
        """By the paper's names, those that say it all first."""
        return {"LRS": self.lrs, "ARS": self.ars, "HLR": self.hlr, "IOR": self.ior}

    def as_data(self) -> dict[str, Any]:
        """Plain values for JSON, fractions."""
        subject = self.subject
        facts = {"name": subject.name, "dataset": subject.dataset, "sha256": subject.sha256, "source": subject.source,
                 "epochs_setting": subject.epochs_setting}  # fmt: skip
        return facts | self.scores | {"missing": list(map(str, self.missing)), "remarks": list(self.remarks)}


def from_results(results: Iterable[Result]) -> tuple[Ranking, ...]:
    """The scores of every submission evaluated with augmentation, newest last, one for each set and setting."""
    results = tuple(results)
    known = _ResultIndex(results)
    subjects = {(r.dataset, r.sha256, *_settings(r)): r for r in results if r.kind == "submission" and r.augment}
    return tuple(_ranking(subject, known) for subject in subjects.values())


def of_result(subject: Result, results: Iterable[Result]) -> Ranking:
    """The scores of one evaluated set, from the evaluations at hand."""
    return _ranking(subject, _ResultIndex(results))


def _ranking(subject: Result, known: _ResultIndex) -> Ranking:
    plain = known.like(subject, "submission", augment=False)
    random_real = known.like(subject, "random-real", augment=True)
    random_plain = known.like(subject, "random-real", augment=False)
    full_real = known.full_real(subject)
    hlr = hard_label_recovery(full_real.mean, subject.mean) if full_real else None
    ior = improvement_over_random(subject.mean, random_real.mean) if random_real else None
    lrs = label_robust_score(hlr, ior) if hlr is not None and ior is not None else None
    ars = None
    if ior is not None and plain and random_plain:
        ars = augmentation_robust_score(ior, improvement_over_random(plain.mean, random_plain.mean))
    found = {
        Need("full-real", True): full_real,
        Need("random-real", True): random_real,
        Need("submission", False): plain,
        Need("random-real", False): random_plain,
    }
    missing = tuple(need for need, result in found.items() if result is None)
    remarks = tuple(_remark(subject, result) for result in found.values() if result and _unequal(subject, result))
    return Ranking(subject, hlr, ior, lrs, ars, missing, remarks)


def run_missing(ranking: Ranking, evaluate: Callable[[Need], Result], also: Iterable[Result] = ()) -> Ranking:
    """Run what a ranking lacks, one evaluation at a time, and return the ranking that follows.

    evaluate: runs the evaluation that a Need asks for, under the subject's settings; what it returns is
        already recorded, so that an interruption loses only the evaluation in progress.
    also: the results at hand, from which the ranking came.
    """
    results = [*also, ranking.subject]
    results.extend(evaluate(need) for need in ranking.missing)
    return of_result(ranking.subject, results)


class _ResultIndex:
    """The evaluations at hand, found by what they are to be held against; of equal ones the latest."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._latest: dict[tuple[object, ...], Result] = {}
        self._full_real: list[Result] = []
        for result in results:
            self._latest[self._key(result, result.kind, result.augment)] = result
            if result.kind == "full-real" and result.augment:
                self._full_real.append(result)

    def like(self, subject: Result, kind: str, *, augment: bool) -> Result | None:
        """The set itself, or as many images of another kind, under the subject's settings but for augmentation."""
        return self._latest.get(self._key(subject, kind, augment))

    def full_real(self, subject: Result) -> Result | None:
        """All real images under the same settings, else with the most epochs: they need far fewer to be learnt."""
        # Of equals the first is taken, which is the latest here.
        of_dataset = (r for r in reversed(self._full_real) if (r.dataset, r.network) == (subject.dataset, subject.network))
        return max(of_dataset, key=lambda r: (_settings(r) == _settings(subject), r.epochs_setting), default=None)

    @staticmethod
    def _key(result: Result, kind: str, augment: bool) -> tuple[object, ...]:
        same_set = result.sha256 if kind == "submission" else ""
        return (kind, augment, result.dataset, result.images_per_class, same_set, *_settings(result))


def _settings(result: Result) -> tuple[object, ...]:
    return (result.track, result.epochs_setting, result.network, result.precision)


def _unequal(subject: Result, other: Result) -> bool:
    return _settings(other) != _settings(subject) or other.rounds != subject.rounds


def _remark(subject: Result, other: Result) -> str:
    return f"{Need(other.kind, other.augment)}: {_conditions(other)}; the set itself: {_conditions(subject)}"


def _conditions(result: Result) -> str:
    rounds = f"{result.rounds} round{'s' * (result.rounds > 1)}"
    return f"E = {result.epochs_setting}, {rounds}, {result.precision}"
