from __future__ import annotations

import dataclasses

import pytest

from ddkit.metrics import ddranking
from ddkit.metrics.ddranking import MissingEvaluation
from ddkit.results import Result


def result(kind: str, accuracy: float, *, augment: bool = True, sha256: str = "", **fields) -> Result:
    return Result(
        name=kind, dataset=fields.pop("dataset", "cifar100"), track=1, sha256=sha256 or kind, source=f"{kind}.pt",
        images=1000, images_per_class=(10, 10), epochs_setting=fields.pop("epochs_setting", 50),
        accuracies=fields.pop("accuracies", (accuracy,)), kind=kind, augment=augment, **fields,
    )  # fmt: skip


SUBJECT = result("submission", 0.45)
EVERYTHING = (
    SUBJECT,
    result("full-real", 0.65),
    result("random-real", 0.20),
    result("submission", 0.40, augment=False),
    result("random-real", 0.18, augment=False),
)


def test_the_value_of_the_paper_s_formula():
    assert ddranking.label_robust_score(0.20, 0.25) == pytest.approx(0.280, abs=5e-4)


def test_the_ends_of_the_scale():
    assert ddranking.label_robust_score(hlr=1, ior=-1) == pytest.approx(0)
    assert ddranking.label_robust_score(hlr=-1, ior=1) == pytest.approx(1)
    assert ddranking.augmentation_robust_score(1, 1) == pytest.approx(1)


def test_all_scores_from_the_results_at_hand():
    (ranking,) = ddranking.from_results(EVERYTHING)
    assert ranking.hlr == pytest.approx(0.20)
    assert ranking.ior == pytest.approx(0.25)
    assert ranking.lrs == pytest.approx(0.280, abs=5e-4)
    assert ranking.ars == pytest.approx(ddranking.augmentation_robust_score(0.25, 0.22))
    assert ranking.missing == ()
    assert ranking.notes == ()


def test_missing_evaluations_are_named():
    (ranking,) = ddranking.from_results(EVERYTHING[:2])
    assert ranking.hlr == pytest.approx(0.20)
    assert ranking.ior is ranking.lrs is ranking.ars is None
    assert ranking.missing == (
        MissingEvaluation("random-real", True), MissingEvaluation("submission", False), MissingEvaluation("random-real", False)
    )  # fmt: skip
    assert str(ranking.missing[0]) == "as many random real images, with augmentation"


def test_baselines_of_another_setting_do_not_count():
    other = [
        result("random-real", 0.2, epochs_setting=100),
        result("random-real", 0.2, dataset="tinyimagenet"),
        result("random-real", 0.2, network="resnet18"),
        dataclasses.replace(result("random-real", 0.2), images_per_class=(50, 50)),
    ]
    (ranking,) = ddranking.from_results([SUBJECT, *other])
    assert MissingEvaluation("random-real", True) in ranking.missing


def test_another_set_without_augmentation_does_not_count():
    (ranking,) = ddranking.from_results([SUBJECT, result("submission", 0.40, augment=False, sha256="other")])
    assert MissingEvaluation("submission", False) in ranking.missing


def test_all_real_images_may_have_other_epochs_which_a_note_says():
    (ranking,) = ddranking.from_results([SUBJECT, result("full-real", 0.6, epochs_setting=20)])
    assert ranking.hlr == pytest.approx(0.15)
    assert "E = 20" in ranking.notes[0] and "E = 50" in ranking.notes[0]


def test_all_real_images_under_the_same_settings_are_preferred_to_more_epochs():
    everything = [SUBJECT, result("full-real", 0.6), result("full-real", 0.7, epochs_setting=90)]
    (ranking,) = ddranking.from_results(everything)
    assert ranking.hlr == pytest.approx(0.15) and ranking.notes == ()


def test_another_number_of_rounds_is_noted():
    (ranking,) = ddranking.from_results([SUBJECT, result("random-real", 0.2, accuracies=(0.1, 0.3))])
    assert ranking.ior == pytest.approx(0.25) and "2 rounds" in ranking.notes[0]


def test_the_newest_evaluation_of_a_set_counts():
    again = result("submission", 0.50)
    (ranking,) = ddranking.from_results([*EVERYTHING, again])
    assert ranking.subject is again
