"""Runs the evaluations that DD-Ranking's scores of a set need and that are not among the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ddkit.data.store import ImageSet
from ddkit.errors import UsageError
from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder, evaluate_source
from ddkit.evaluation.sources import FixedSet, hash_of
from ddkit.evaluation.test_sets import TestSet
from ddkit.metrics.ddranking import MissingEvaluation, Ranking, of_result
from ddkit.results import Result
from ddkit.runtime.progress import Listener, ignore
from ddkit.sets.distilled import KIND_FULL_REAL, KIND_SUBMISSION, DistilledSet
from ddkit.sets.select import choose

# All real images are learned in far fewer epochs than a few of them, and an epoch costs much more.
FULL_EPOCHS_SETTING = 40
FULL_ROUNDS = 1


@dataclass(frozen=True)
class RankingJob:
    """A set to be ranked.

    subject: its evaluation with augmentation. real: the dataset's training images.
    settings: those that `subject` was evaluated with.
    full_epochs_setting: E for all real images; None takes the set's own, FULL_EPOCHS_SETTING at most.
    Raises UsageError if the evaluation was without augmentation or on track 2.
    """

    subject: Result
    distilled: DistilledSet
    real: ImageSet
    test_set: TestSet
    settings: EvaluationSettings
    full_epochs_setting: int | None = None

    def __post_init__(self) -> None:
        if self.settings.track != 1 or not self.settings.augment:
            raise UsageError("DD-Ranking needs an evaluation on track 1 with augmentation.")

    def settings_for(self, need: MissingEvaluation) -> EvaluationSettings:
        """The set's own settings except for augmentation; all real images get fewer epochs and a single round."""
        settings = dataclasses.replace(self.settings, augment=need.augment)
        if need.kind != KIND_FULL_REAL:
            return settings
        own = settings.training.epochs_setting
        epochs = min(own, FULL_EPOCHS_SETTING) if self.full_epochs_setting is None else self.full_epochs_setting
        return dataclasses.replace(settings, rounds=FULL_ROUNDS, epochs_setting=epochs)


def complete(
    job: RankingJob,
    known: Sequence[Result],
    *,
    record: Callable[[Result], None],
    announce: Callable[[MissingEvaluation, EvaluationSettings], None] = lambda need, settings: None,
    state: StateFolder | None = None,
    progress: Listener = ignore,
) -> Ranking:
    """The ranking of a set, after the evaluations that are not among the `known` results.

    record: called with each result at once, so that an interruption costs only the evaluation in progress, which is
        continued from `state`. announce: called before each evaluation.
    Raises what `evaluate_source` and `choose` raise.
    """

    subject, spec, real = job.subject, job.test_set.spec, job.real

    def run(need: MissingEvaluation) -> Result:
        settings, kind = job.settings_for(need), need.kind
        announce(need, settings)
        name, source, made_by = kind, f"training images of {spec.name}", {}
        images, labels = real.images, real.labels  # pixels, as all of them in float32 can be gigabytes
        if kind == KIND_SUBMISSION:
            name, source, made_by = subject.name, subject.source, dict(subject.made_by)
            images, labels = job.distilled.images, job.distilled.labels
        elif kind != KIND_FULL_REAL:
            rows = choose("random", real.labels, job.distilled.ipc, spec.num_classes, seed=job.settings.seed)
            images, labels = images[rows], labels[rows]
            made_by = {"selection": "random", "seed": job.settings.seed}
        evaluation = evaluate_source(FixedSet(images, labels), job.test_set, settings, state=state, progress=progress)
        sha256 = subject.sha256 if kind == KIND_SUBMISSION else hash_of(images, labels)
        result = evaluation.result(name, sha256, source, kind=kind, made_by=made_by)
        record(result)
        return result

    full_epochs = job.settings_for(MissingEvaluation(KIND_FULL_REAL, True)).training.epochs_setting
    known = [result for result in known if result.kind != KIND_FULL_REAL or result.epochs_setting >= full_epochs]
    return of_result(subject, [*known, subject, *map(run, of_result(subject, known).missing)])
