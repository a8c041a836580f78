"""Running the evaluations that DD-Ranking's scores of a set want and that the results at hand do not hold."""

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
from ddkit.sets.select import choose

# All real images are learnt in far fewer epochs than a few of them, and each costs so much more.
FULL_EPOCHS_SETTING = 40
FULL_ROUNDS = 1


@dataclass(frozen=True)
class RankingJob:
    """A set to be ranked, and what it is ranked by.

    subject: its evaluation with augmentation. images: the set, (N, 3, S, S) float, normalized; labels: (N,) int64.
    real: the dataset's training images. settings: what `subject` was evaluated with.
    full_epochs_setting: E of all real images; None for the set's own, FULL_EPOCHS_SETTING at most.
    """

    subject: Result
    images: Tensor
    labels: Tensor
    real: ImageSet
    test_set: TestSet
    settings: EvaluationSettings
    full_epochs_setting: int | None = None

    def __post_init__(self) -> None:
        if self.settings.track != 1 or not self.settings.augment:
            raise UsageError("DD-Ranking starts from a set that was evaluated on track 1 with augmentation.")

    def settings_for(self, need: MissingEvaluation) -> EvaluationSettings:
        """The set's own settings, but for augmentation; all real images get fewer epochs and a single round."""
        settings = dataclasses.replace(self.settings, augment=need.augment)
        if need.kind != "full-real":
            return settings
        own = settings.training.epochs_setting
        epochs = min(own, FULL_EPOCHS_SETTING) if self.full_epochs_setting is None else self.full_epochs_setting
        return dataclasses.replace(settings, rounds=FULL_ROUNDS, epochs_setting=epochs)

    def images_for(self, need: MissingEvaluation) -> tuple[Tensor, Tensor]:
        """What `need` wants evaluated: images (N, 3, S, S) float, normalized, and labels (N,) int64."""
        if need.kind == "submission":
            return self.images, self.labels
        spec = self.test_set.spec
        if need.kind == "full-real":
            return normalize(self.real.images, spec), self.real.labels
        rows = choose("random", self.real.labels, self._per_class, spec.num_classes, seed=self.settings.seed)
        return normalize(self.real.images[rows], spec), self.real.labels[rows]

    @property
    def _per_class(self) -> int:
        fewest, most = self.subject.images_per_class
        if fewest != most:
            raise UsageError(f"DD-Ranking compares equal numbers of images; this set has {fewest} to {most} a class.")
        return most


def complete(
    job: RankingJob,
    known: Sequence[Result],
    *,
    record: Callable[[Result], None],
    announce: Callable[[MissingEvaluation, EvaluationSettings], None] = lambda need, settings: None,
    state: StateFolder | None = None,
    progress: Listener = ignore,
) -> Ranking:
    """The ranking of a set after running what `known` lacks.

    record: keeps each result as soon as it is there, so that an interruption costs the evaluation in progress only,
        and that one goes on from `state`. announce: told of each evaluation before it begins.
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

    known = [result for result in known if not _of_too_few_epochs(result, job)]
    return run_missing(of_result(job.subject, known), run, also=known)


def _of_too_few_epochs(result: Result, job: RankingJob) -> bool:
    """Whether it is of all real images, and of fewer epochs than are asked for."""
    wanted = job.settings_for(MissingEvaluation("full-real", True))
    return result.kind == "full-real" and result.epochs_setting < wanted.training.epochs_setting


def _result(job: RankingJob, need: MissingEvaluation, evaluation: Evaluation, digest: str) -> Result:
    if need.kind == "submission":
        subject = job.subject
        return evaluation.result(subject.name, subject.sha256, subject.source, made_by=subject.made_by)
    made_by = {"selection": "random", "seed": job.settings.seed} if need.kind == "random-real" else {}
    source = f"training images of {job.test_set.spec.name}"
    return evaluation.result(need.kind, digest, source, kind=need.kind, made_by=made_by)
