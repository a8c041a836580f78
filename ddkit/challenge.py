"""Facts of the First Dataset Distillation Challenge (ECCV 2024). Nothing here is tunable.

Every number is that of the challenge's public evaluation code, repository
DataDistillation/ECCV2024-Dataset-Distillation-Challenge at commit a6ca5cb. Track 2 has no official public code; its
numbers are those of the second-placed team's published evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

from ddkit.errors import UsageError


@dataclass(frozen=True)
class DatasetSpec:
    """The facts of a dataset that the protocol depends on.

    mean, std: per channel (red, green, blue), of pixels in [0, 1]; x_normalized = (x - mean) / std.
    """

    name: str
    num_classes: int
    image_size: int  # pixels; images are square
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    in_challenge: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, S, S)."""
        return (3, self.image_size, self.image_size)


@dataclass(frozen=True)
class Track:
    """One track of the challenge: how many images, epochs and rounds."""

    title: str
    epochs_setting: int  # E; training runs E + 1 epochs (0 ... E)
    rounds: int  # fresh networks whose test accuracies are averaged
    ipc: int | None  # images per class; None if the entry decides
    time_budget_seconds: float | None  # for the generator, loading and saving included


@dataclass(frozen=True)
class Entry:
    """A published result. Accuracies are fractions."""

    name: str
    track: int
    rank: int
    accuracy: dict[str, float]  # by dataset; empty if none was published
    source: str

    @property
    def score(self) -> float | None:
        """The challenge's score, which is the mean over its datasets; None unless all are public."""
        if any(spec.name not in self.accuracy for spec in CHALLENGE_DATASETS):
            return None
        return sum(self.accuracy[spec.name] for spec in CHALLENGE_DATASETS) / len(CHALLENGE_DATASETS)


CIFAR100 = DatasetSpec("cifar100", 100, 32, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762), in_challenge=True)
TINYIMAGENET = DatasetSpec("tinyimagenet", 200, 64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), in_challenge=True)
# The built-in images for practice, which are not part of the challenge but evaluated by the same rules.
GLYPHS = DatasetSpec("glyphs", 10, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

DATASETS = {spec.name: spec for spec in (CIFAR100, TINYIMAGENET, GLYPHS)}
CHALLENGE_DATASETS = tuple(spec for spec in DATASETS.values() if spec.in_challenge)
TEST_IMAGES = 10_000  # of each of them
TRAIN_IMAGES_PER_CLASS = 500  # of each of them

TRACKS = {
    1: Track("fixed IPC = 10", epochs_setting=1000, rounds=3, ipc=10, time_budget_seconds=None),
    2: Track("generative, 10 minutes", epochs_setting=100, rounds=3, ipc=None, time_budget_seconds=600.0),
}

# Training of one network, the same for both tracks and both datasets.
BATCH_SIZE = 256
LEARNING_RATE = 0.01
LEARNING_RATE_AFTER_DROP = 0.001
MOMENTUM = 0.9
WEIGHT_DECAY = 0.0005

# The network, which has three blocks for every image size.
NETWORK_WIDTH = 128
NETWORK_DEPTH = 3

# The augmentation, applied to normalized values; one strategy is drawn for each batch.
AUGMENT_STRATEGIES = ("color", "crop", "cutout", "flip", "scale", "rotate")
AUGMENT_BRIGHTNESS = 1.0
AUGMENT_SATURATION = 2.0
AUGMENT_CONTRAST = 0.5
AUGMENT_CROP_RATIO = 0.125
AUGMENT_CUTOUT_RATIO = 0.5
AUGMENT_FLIP_PROBABILITY = 0.5
AUGMENT_SCALE = 1.2
AUGMENT_ROTATE_DEGREES = 15.0

PUBLISHED = (
    Entry("M-DATM", 1, 1, {"cifar100": 0.4061, "tinyimagenet": 0.1831}, "arXiv 2410.13311"),
    Entry("Data-Efficient Generation", 2, 1, {}, "arXiv 2409.03929"),
    Entry("Minimax with step reduction", 2, 2, {}, "arXiv 2503.18626"),
    Entry("SDXL-Turbo prompts", 2, 3, {}, "arXiv 2408.08610"),
)


def epoch_of_drop(epochs_setting: int) -> int:
    """Index of the epoch after which the learning rate drops and a new optimizer begins: E // 2 + 1."""
    return epochs_setting // 2 + 1


def track(number: int) -> Track:
    """The track with that number. Raises UsageError for other numbers than 1 and 2."""
    if number not in TRACKS:
        raise UsageError(f"Unknown track {number}.", "The challenge has tracks 1 and 2.")
    return TRACKS[number]
