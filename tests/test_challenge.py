"""The protocol's numbers, written out once more: an accidental edit of a fact fails here."""

import dataclasses

import pytest

from ddkit import challenge
from ddkit.errors import UsageError


def test_datasets_are_the_challenges():
    cifar, tiny = challenge.CHALLENGE_DATASETS
    assert (cifar.name, cifar.num_classes, cifar.image_shape) == ("cifar100", 100, (3, 32, 32))
    assert cifar.mean == (0.5071, 0.4866, 0.4409) and cifar.std == (0.2673, 0.2564, 0.2762)
    assert (tiny.name, tiny.num_classes, tiny.image_shape) == ("tinyimagenet", 200, (3, 64, 64))
    assert tiny.mean == (0.485, 0.456, 0.406) and tiny.std == (0.229, 0.224, 0.225)


def test_tracks_and_training_are_the_challenges():
    first, second = challenge.track(1), challenge.track(2)
    assert (first.epochs_setting, first.rounds, first.ipc, first.time_budget_seconds) == (1000, 3, 10, None)
    assert (second.epochs_setting, second.rounds, second.ipc, second.time_budget_seconds) == (100, 3, None, 600.0)
    assert (challenge.BATCH_SIZE, challenge.MOMENTUM, challenge.WEIGHT_DECAY) == (256, 0.9, 0.0005)
    assert (challenge.LEARNING_RATE, challenge.LEARNING_RATE_AFTER_DROP) == (0.01, 0.001)
    assert challenge.epoch_of_drop(1000) == 501 and challenge.epoch_of_drop(100) == 51


def test_augmentation_is_the_challenges():
    assert challenge.AUGMENT_STRATEGIES == ("color", "crop", "cutout", "flip", "scale", "rotate")
    ranges = (challenge.AUGMENT_BRIGHTNESS, challenge.AUGMENT_SATURATION, challenge.AUGMENT_CONTRAST)
    assert ranges == (1.0, 2.0, 0.5)
    assert (challenge.AUGMENT_CROP_RATIO, challenge.AUGMENT_CUTOUT_RATIO) == (0.125, 0.5)
    assert (challenge.AUGMENT_SCALE, challenge.AUGMENT_ROTATE_DEGREES, challenge.AUGMENT_FLIP_PROBABILITY) == (
        1.2, 15.0, 0.5,
    )  # fmt: skip


def test_published_scores_are_means_and_unknown_ones_stay_unknown():
    winner = challenge.PUBLISHED[0]
    assert winner.score == pytest.approx(0.2946)
    assert all(entry.score is None for entry in challenge.PUBLISHED if entry.track == 2)


def test_facts_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        challenge.CIFAR100.mean = (0.4914, 0.4822, 0.4465)


def test_unknown_track_raises_usage_error():
    with pytest.raises(UsageError, match="Unknown track 3"):
        challenge.track(3)
