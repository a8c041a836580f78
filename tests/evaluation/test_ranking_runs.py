"""The evaluations that DD-Ranking's scores need: on a dataset of two colors, in a few epochs."""

from __future__ import annotations

import dataclasses

import pytest

from ddkit.data.images import normalize
from ddkit.data.store import dataset_spec, load_dataset
from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder
from ddkit.evaluation.job import JobSettings, evaluate_files
from ddkit.evaluation.ranking_runs import settings_for
from ddkit.metrics.ddranking import MissingEvaluation
from ddkit.results import read
from ddkit.sets.distilled import save_set

SETTINGS = EvaluationSettings(rounds=2, epochs_setting=3, device="cpu")


@pytest.mark.slow
def test_missing_evaluations_are_run_and_recorded_once(colors, tmp_path):
    spec, real = dataset_spec(colors), load_dataset(colors, "train")
    path = tmp_path / "mine" / "colors.pt"  # the first two pictures of each color
    save_set(path, normalize(real.images[[0, 1, 5, 6]], spec), spec, {"kind": "generated"})
    settings = JobSettings(SETTINGS, ranking=True, results=tmp_path / "results.jsonl", state=StateFolder(tmp_path / "state"))
    events = []

    def rank():
        events.clear()
        (ranking,) = evaluate_files([path], settings, on_event=events.append).rankings
        return ranking, [event for event in events if event.startswith("For DD-Ranking, evaluating")]

    ranking, announced = rank()
    assert ranking.missing == ()
    assert all(score is not None and abs(score) <= 1 for score in ranking.scores.values())
    subject, *recorded = read(settings.results).results
    assert {(r.kind, r.augment) for r in recorded} == {
        ("full-real", True), ("random-real", True), ("submission", False), ("random-real", False),
    }  # fmt: skip
    for event, result in zip(announced, recorded, strict=True):
        assert str(MissingEvaluation(result.kind, result.augment)) in event
    images = {r.kind: (r.images, r.images_per_class) for r in recorded}
    assert images == {"full-real": (10, (5, 5)), "random-real": (4, (2, 2)), "submission": (4, (2, 2))}
    (plain,) = (r for r in recorded if r.kind == "submission")
    assert (plain.sha256, plain.name, plain.made_by) == (subject.sha256, "mine", subject.made_by)
    # The random real images are the same with and without augmentation.
    assert len({r.sha256 for r in recorded if r.kind == "random-real"}) == 1

    again, announced = rank()
    assert again.scores == ranking.scores and not announced
    assert read(settings.results).results == (subject, *recorded)
    # Without the records, the finished evaluations are read back from their state.
    settings.results.unlink()
    rank()
    assert [r.seconds for r in read(settings.results).results] == [r.seconds for r in (subject, *recorded)]


def test_all_real_images_get_their_own_epochs_and_one_round():
    need = MissingEvaluation("full-real", True)
    assert settings_for(need, SETTINGS).training.epochs_setting == 3
    long = settings_for(need, EvaluationSettings())
    assert (long.training.epochs_setting, long.rounds) == (40, 1)
    assert settings_for(need, SETTINGS, 7).training.epochs_setting == 7
    assert settings_for(MissingEvaluation("random-real", False), SETTINGS) == dataclasses.replace(SETTINGS, augment=False)
