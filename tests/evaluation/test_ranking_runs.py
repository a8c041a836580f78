"""The evaluations that DD-Ranking's scores need: on a dataset of two colors, in a few epochs."""

from __future__ import annotations

import dataclasses

import pytest

from ddkit.data.images import normalize
from ddkit.data.store import dataset_spec, load_dataset
from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder
from ddkit.evaluation.ranking_runs import complete, settings_for
from ddkit.evaluation.test_sets import as_test_set
from ddkit.metrics.ddranking import MissingEvaluation
from ddkit.results import Result
from ddkit.sets.distilled import DistilledSet

SETTINGS = EvaluationSettings(rounds=2, epochs_setting=3, device="cpu")


@pytest.fixture
def job(colors):
    """The first two pictures of each color, as if they had been evaluated."""
    spec, real = dataset_spec(colors), load_dataset(colors, "train")
    rows = [0, 1, 5, 6]
    distilled = DistilledSet(normalize(real.images[rows], spec), spec)
    subject = Result(
        name="mine", dataset=colors, track=1, sha256="ab" * 32, source="mine/colors.pt", images=4,
        images_per_class=(2, 2), epochs_setting=3, accuracies=(0.75, 1.0), made_by={"kind": "generated"},
    )  # fmt: skip
    test_set = as_test_set(load_dataset(colors, "test"), spec)
    return subject, distilled, real, test_set, SETTINGS


@pytest.mark.slow
def test_missing_evaluations_are_run_and_recorded_once(job, tmp_path):
    recorded, announced = [], []
    state = StateFolder(tmp_path / "state")
    ranking = complete(
        *job, [job[0]], record=recorded.append, state=state,
        announce=lambda need, settings: announced.append(need),
    )  # fmt: skip
    assert ranking.missing == ()
    assert all(score is not None and abs(score) <= 1 for score in ranking.scores.values())
    assert {(r.kind, r.augment) for r in recorded} == {
        ("full-real", True), ("random-real", True), ("submission", False), ("random-real", False),
    }  # fmt: skip
    assert announced == [MissingEvaluation(r.kind, r.augment) for r in recorded]
    images = {r.kind: (r.images, r.images_per_class) for r in recorded}
    assert images == {"full-real": (10, (5, 5)), "random-real": (4, (2, 2)), "submission": (4, (2, 2))}
    (plain,) = (r for r in recorded if r.kind == "submission")
    assert (plain.sha256, plain.name, plain.made_by) == (job[0].sha256, "mine", {"kind": "generated"})
    # The random real images are the same with and without augmentation.
    assert len({r.sha256 for r in recorded if r.kind == "random-real"}) == 1

    again = []
    assert complete(*job, [job[0], *recorded], record=again.append).scores == ranking.scores and again == []
    # Without the records, the finished evaluations are read back from their state.
    complete(*job, [job[0]], record=again.append, state=state)
    assert [r.seconds for r in again] == [r.seconds for r in recorded]


def test_all_real_images_get_their_own_epochs_and_one_round():
    need = MissingEvaluation("full-real", True)
    assert settings_for(need, SETTINGS).training.epochs_setting == 3
    long = settings_for(need, EvaluationSettings())
    assert (long.training.epochs_setting, long.rounds) == (40, 1)
    assert settings_for(need, SETTINGS, 7).training.epochs_setting == 7
    assert settings_for(MissingEvaluation("random-real", False), SETTINGS) == dataclasses.replace(SETTINGS, augment=False)
