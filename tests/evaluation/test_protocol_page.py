"""The page of the official rules says what the code does."""

from pathlib import Path

import pytest

import ddkit.evaluation
from ddkit import challenge
from ddkit.challenge import CHALLENGE_DATASETS, PUBLISHED, TRACKS, epoch_of_drop

PAGE = " ".join((Path(ddkit.evaluation.__file__).parent / "PROTOCOL.md").read_text(encoding="utf-8").split())


def row(heading):
    """The cells of the first row of a table that begins with this cell."""
    return [cell.strip() for cell in PAGE.split(f"| {heading} | ")[1].split(" | ")]


@pytest.mark.parametrize("place, spec", list(enumerate(CHALLENGE_DATASETS)), ids=lambda value: getattr(value, "name", ""))
def test_page_has_the_constants_of_the_dataset(place, spec):
    assert row("classes")[place] == str(spec.num_classes)
    assert row("image")[place] == f"3 x {spec.image_size} x {spec.image_size}"
    assert row("mean")[place] == ", ".join(map(str, spec.mean))
    assert row("std")[place] == ", ".join(map(str, spec.std))
    assert row("test images")[place].startswith(f"{challenge.TEST_IMAGES:,}")


@pytest.mark.parametrize("place, track", list(enumerate(TRACKS.values())))
def test_page_has_the_numbers_of_the_track(place, track):
    assert row("epochs setting E")[place] == str(track.epochs_setting)
    assert row("epochs that run, 0 ... E")[place] == str(track.epochs_setting + 1)
    assert row("rounds")[place].startswith(f"{track.rounds},")


def test_page_has_the_numbers_of_the_training():
    slow = TRACKS[1].epochs_setting - epoch_of_drop(TRACKS[1].epochs_setting)
    for text in (
        f"within {TRACKS[2].time_budget_seconds:g} seconds",
        f"({TRACKS[1].ipc} * classes, 3, S, S)",
        f"{challenge.NETWORK_DEPTH} blocks of 3x3 convolution ({challenge.NETWORK_WIDTH} channels",
        f"learning rate {challenge.LEARNING_RATE}, momentum {challenge.MOMENTUM}, weight decay {challenge.WEIGHT_DECAY}",
        f"batches of {challenge.BATCH_SIZE}, shuffled",
        f"becomes {challenge.LEARNING_RATE_AFTER_DROP}",
        f"{TRACKS[1].epochs_setting + 1 - slow} epochs run at {challenge.LEARNING_RATE} and {slow} at",
        f"int({challenge.AUGMENT_CROP_RATIO} S + 0.5)",
        f"int({challenge.AUGMENT_CUTOUT_RATIO} S + 0.5)",
        f"u < {challenge.AUGMENT_FLIP_PROBABILITY}",
        f"[1 / {challenge.AUGMENT_SCALE}, {challenge.AUGMENT_SCALE})",
        f"{challenge.AUGMENT_ROTATE_DEGREES:g} degrees",
    ):
        assert text in PAGE, text
    for strategy in challenge.AUGMENT_STRATEGIES:
        assert f"| {strategy} | " in PAGE


def test_page_has_the_published_results():
    for entry in PUBLISHED:
        assert entry.source.removeprefix("arXiv ") in PAGE
        for accuracy in entry.accuracy.values():
            assert f"{accuracy:.4f}" in PAGE
