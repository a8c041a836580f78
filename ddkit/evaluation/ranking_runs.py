"""Runs the evaluations that DD-Ranking's scores of a set need and that are not among the results."""

from __future__ import annotations

import dataclasses

from ddkit.data.store import ImageSet
from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder, evaluate_source
from ddkit.evaluation.sources import FixedSet, hash_of
from ddkit.evaluation.test_sets import TestSet
from ddkit.metrics.ddranking import MissingEvaluation
from ddkit.results import Result
from ddkit.runtime.progress import Listener, ignore
from ddkit.sets.distilled import KIND_FULL_REAL, KIND_SUBMISSION, DistilledSet
from ddkit.sets.select import choose

# All real images are learned in far fewer epochs than a few of them, and an epoch costs much more.
FULL_EPOCHS_SETTING = 40
FULL_ROUNDS = 1


def settings_for(
    need: MissingEvaluation, settings: EvaluationSettings, full_epochs_setting: int | None = None
) -> EvaluationSettings:
    """The set's own settings except for augmentation; all real images get fewer epochs and a single round.

    full_epochs_setting: E for all real images; None takes the set's own, FULL_EPOCHS_SETTING at most.
    """
    settings = dataclasses.replace(settings, augment=need.augment)
    if need.kind != KIND_FULL_REAL:
        return settings
    own = settings.training.epochs_setting
    epochs = min(own, FULL_EPOCHS_SETTING) if full_epochs_setting is None else full_epochs_setting
    return dataclasses.replace(settings, rounds=FULL_ROUNDS, epochs_setting=epochs)


def evaluate_missing(
    need: MissingEvaluation,
    settings: EvaluationSettings,
    subject: Result,
    distilled: DistilledSet,
    real: ImageSet,
    test_set: TestSet,
    *,
    state: StateFolder | None = None,
    progress: Listener = ignore,
) -> Result:
    """The result of an evaluation that the ranking of a set needs.

    settings: of this evaluation, from `settings_for`. subject: the evaluation of the set on track 1. real: the dataset's
    training images. Raises what `evaluate_source` and `choose` raise.
    """
    kind, spec = need.kind, test_set.spec
    name, source, made_by = kind, f"training images of {spec.name}", {}
    images, labels = real.images, real.labels  # pixels, as all of them in float32 can be gigabytes
    if kind == KIND_SUBMISSION:
        name, source, made_by = subject.name, subject.source, dict(subject.made_by)
        images, labels = distilled.images, distilled.labels
    elif kind != KIND_FULL_REAL:
        rows = choose("random", real.labels, distilled.ipc, spec.num_classes, seed=settings.seed)
        images, labels = images[rows], labels[rows]
        made_by = {"selection": "random", "seed": settings.seed}
    evaluation = evaluate_source(FixedSet(images, labels), test_set, settings, state=state, progress=progress)
    sha256 = subject.sha256 if kind == KIND_SUBMISSION else hash_of(images, labels)
    return evaluation.result(name, sha256, source, kind=kind, made_by=made_by)
