"""Runs the evaluations that DD-Ranking's scores of a set need and that are not among the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ddkit.data.store import ImageSet
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


def complete(
    subject: Result,
    distilled: DistilledSet,
    real: ImageSet,
    test_set: TestSet,
    settings: EvaluationSettings,
    known: Sequence[Result],
    *,
    full_epochs_setting: int | None = None,
    record: Callable[[Result], None],
    announce: Callable[[MissingEvaluation, EvaluationSettings], None] = lambda need, settings: None,
    state: StateFolder | None = None,
    progress: Listener = ignore,
) -> Ranking:
    """The ranking of a set, after the evaluations that are not among the `known` results.

    subject: the evaluation of the set on track 1 with `settings`, augmentation among them. real: the dataset's training
    images. full_epochs_setting: as for `settings_for`.
    record: called with each result at once, so that an interruption costs only the evaluation in progress, which is
        continued from `state`. announce: called before each evaluation.
    Raises what `evaluate_source` and `choose` raise.
    """
    spec = test_set.spec

    def run(need: MissingEvaluation) -> Result:
        changed, kind = settings_for(need, settings, full_epochs_setting), need.kind
        announce(need, changed)
        name, source, made_by = kind, f"training images of {spec.name}", {}
        images, labels = real.images, real.labels  # pixels, as all of them in float32 can be gigabytes
        if kind == KIND_SUBMISSION:
            name, source, made_by = subject.name, subject.source, dict(subject.made_by)
            images, labels = distilled.images, distilled.labels
        elif kind != KIND_FULL_REAL:
            rows = choose("random", real.labels, distilled.ipc, spec.num_classes, seed=settings.seed)
            images, labels = images[rows], labels[rows]
            made_by = {"selection": "random", "seed": settings.seed}
        evaluation = evaluate_source(FixedSet(images, labels), test_set, changed, state=state, progress=progress)
        sha256 = subject.sha256 if kind == KIND_SUBMISSION else hash_of(images, labels)
        result = evaluation.result(name, sha256, source, kind=kind, made_by=made_by)
        record(result)
        return result

    full = settings_for(MissingEvaluation(KIND_FULL_REAL, True), settings, full_epochs_setting)
    full_epochs = full.training.epochs_setting
    known = [result for result in known if result.kind != KIND_FULL_REAL or result.epochs_setting >= full_epochs]
    return of_result(subject, [*known, subject, *map(run, of_result(subject, known).missing)])
