"""Runs the evaluations that DD-Ranking's scores of a set need and that are not among the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ddkit.data.images import normalize
from ddkit.data.store import ImageSet
from ddkit.errors import UsageError
from ddkit.evaluation.evaluate import Evaluation, EvaluationSettings, StateFolder, evaluate_source
from ddkit.evaluation.reference import TestSet
from ddkit.evaluation.sources import FixedSet, hash_of
from ddkit.metrics.ddranking import MissingEvaluation, Ranking, of_result, run_missing
from ddkit.results import Result
from ddkit.runtime.progress import Listener, ignore
from ddkit.sets.distilled import KIND_FULL_REAL, KIND_RANDOM_REAL, KIND_SUBMISSION, DistilledSet
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

    def images_for(self, need: MissingEvaluation) -> tuple[Tensor, Tensor]:
        """The images (N, 3, S, S) float, normalized, and labels (N,) int64 to evaluate for `need`."""
        if need.kind == KIND_SUBMISSION:
            return self.distilled.images, self.distilled.labels
        spec = self.test_set.spec
        if need.kind == KIND_FULL_REAL:
            return normalize(self.real.images, spec), self.real.labels
        rows = choose("random", self.real.labels, self.distilled.ipc, spec.num_classes, seed=self.settings.seed)
        return normalize(self.real.images[rows], spec), self.real.labels[rows]


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

    def run(need: MissingEvaluation) -> Result:
        settings = job.settings_for(need)
        announce(need, settings)
        images, labels = job.images_for(need)
        evaluation = evaluate_source(FixedSet(images, labels), job.test_set, settings, state=state, progress=progress)
        result = _result(job, need, evaluation, hash_of(images, labels))
        record(result)
        return result

    full_epochs = job.settings_for(MissingEvaluation(KIND_FULL_REAL, True)).training.epochs_setting
    known = [result for result in known if result.kind != KIND_FULL_REAL or result.epochs_setting >= full_epochs]
    return run_missing(of_result(job.subject, known), run, also=known)


def _result(job: RankingJob, need: MissingEvaluation, evaluation: Evaluation, digest: str) -> Result:
    if need.kind == KIND_SUBMISSION:
        subject = job.subject
        return evaluation.result(subject.name, subject.sha256, subject.source, made_by=subject.made_by)
    made_by = {"selection": "random", "seed": job.settings.seed} if need.kind == KIND_RANDOM_REAL else {}
    source = f"training images of {job.test_set.spec.name}"
    return evaluation.result(need.kind, digest, source, kind=need.kind, made_by=made_by)
