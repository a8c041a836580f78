"""What is official."""

import pytest
import torch

from ddkit.challenge import CIFAR100, GLYPHS, TINYIMAGENET, TRACKS
from ddkit.evaluation.tracks import Conditions, deviations, hash_of_folder, images_per_class

OFFICIAL = {
    1: Conditions(3, 1000, (10, 10), 10_000, "convnet", True, "float32"),
    2: Conditions(3, 100, (17, 40), 10_000, "convnet", True, "float32", 600.0),
}


@pytest.mark.parametrize("track", [1, 2])
@pytest.mark.parametrize("spec", [CIFAR100, TINYIMAGENET])
def test_the_protocols_conditions_are_official(track, spec):
    assert deviations(TRACKS[track], spec, OFFICIAL[track]) == ()


@pytest.mark.parametrize("change, said", [
    ({"rounds": 8}, "8 rounds instead of 3"),
    ({"epochs_setting": 50}, "E = 50 instead of 1000"),
    ({"images_per_class": (9, 10)}, "9 to 10 images per class instead of 10"),
    ({"images_per_class": (1, 1)}, "1 image per class instead of 10"),
    ({"test_images": 100}, "100 test images instead of 10,000"),
    ({"network": "resnet18"}, "network resnet18 instead of convnet"),
    ({"augment": False}, "no augmentation"),
    ({"precision": "bfloat16"}, "bfloat16 instead of float32"),
    ({"time_budget": 600.0}, "a time budget of 600 s"),
    ({"tf32_products": True}, "matrix products in TF32 instead of float32"),
    ({"official_tests": False}, "test images or labels that are not the challenge's"),
])  # fmt: skip
def test_each_other_condition_is_a_deviation(change, said):
    conditions = Conditions(**{**vars(OFFICIAL[1]), **change})
    assert deviations(TRACKS[1], CIFAR100, conditions) == (said,)


def test_fixed_images_on_track_2_are_a_deviation():
    fixed = Conditions(**{**vars(OFFICIAL[2]), "time_budget": None})
    assert deviations(TRACKS[2], CIFAR100, fixed) == ("images not generated within 600 s for each round",)


def test_practice_images_are_never_official():
    assert "the challenge has cifar100 and tinyimagenet" in deviations(TRACKS[1], GLYPHS, OFFICIAL[1])[0]


def test_images_are_counted_for_every_class():
    assert images_per_class(torch.tensor([0, 0, 2]), 4) == (0, 2)


def test_an_entrys_hash_changes_with_any_of_its_files(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"1")
    first = hash_of_folder(tmp_path)
    assert hash_of_folder(tmp_path) == first
    (tmp_path / "model" / "weights").write_bytes(b"2")
    second = hash_of_folder(tmp_path)
    (tmp_path / "model" / "weights").rename(tmp_path / "model" / "weight")
    assert len({first, second, hash_of_folder(tmp_path)}) == 3
