"""The rules that make an evaluation official, and the images that a track 2 entry makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddkit.challenge import CHALLENGE_DATASETS, TEST_IMAGES, DatasetSpec, Track
from ddkit.errors import counted
from ddkit.network.networks import OFFICIAL_NETWORK
from ddkit.runtime.files import sha256_of, sha256_of_files


@dataclass(frozen=True)
class Conditions:
    """The conditions of an evaluation that the protocol prescribes."""

    rounds: int
    epochs_setting: int
    images_per_class: tuple[int, int]
    test_images: int
    network: str
    augment: bool
    precision: str
    time_budget: float | None = None  # seconds; track 2 only
    official_tests: bool = True  # `TestSet.is_official`
    converted: str = ""  # what the images were converted from, if they were not the challenge's tensor
    tf32_products: bool = False  # on a GPU, where PyTorch's default is float32; cuDNN's convolutions may use TF32


def deviations(track: Track, spec: DatasetSpec, conditions: Conditions) -> tuple[str, ...]:
    """The differences from PROTOCOL.md, a phrase for each; empty for an official evaluation."""
    found = []
    if not spec.in_challenge:
        names = " and ".join(known.name for known in CHALLENGE_DATASETS)
        found.append(f"dataset {spec.name}, the challenge has {names}")
    elif conditions.test_images != TEST_IMAGES:
        found.append(f"{conditions.test_images:,} test images instead of {TEST_IMAGES:,}")
    elif not conditions.official_tests:
        found.append("test images or labels that are not the challenge's")
    if conditions.converted:
        found.append(f"converted from {conditions.converted}")
    if track.ipc is not None and conditions.images_per_class != (track.ipc, track.ipc):
        fewest, most = conditions.images_per_class
        number = f"{fewest:,} to {most:,} images" if fewest != most else counted(most, "image", "images")
        found.append(f"{number} per class instead of {track.ipc}")
    budget, official = conditions.time_budget, track.time_budget_seconds
    if budget is None and official is not None:
        found.append(f"images not generated within {official:g} s for each round")
    elif budget is not None and budget != official:
        found.append(f"a time budget of {budget:g} s" + (f" instead of {official:g} s" if official else ""))
    if conditions.rounds != track.rounds:
        found.append(f"{counted(conditions.rounds, 'round', 'rounds')} instead of {track.rounds}")
    if conditions.epochs_setting != track.epochs_setting:
        found.append(f"E = {conditions.epochs_setting} instead of {track.epochs_setting}")
    if conditions.network != OFFICIAL_NETWORK:
        found.append(f"network {conditions.network} instead of {OFFICIAL_NETWORK}")
    if not conditions.augment:
        found.append("no augmentation")
    if conditions.precision != "float32":
        found.append(f"{conditions.precision} instead of float32")
    if conditions.tf32_products:
        found.append("matrix products in TF32 instead of float32")
    return tuple(found)


@dataclass(frozen=True)
class Generated:
    """The images that a track 2 entry made for one round.

    images: (N, 3, S, S) float32, normalized, or uint8 pixels. labels: (N,) int64.
    seconds: how long it took, with loading and saving.
    """

    images: Tensor
    labels: Tensor
    seconds: float


def hash_of_folder(folder: Path) -> str:
    """Hexadecimal SHA-256 of all files below `folder` and their names; identifies an entry with its models."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sha256_of_files({path.relative_to(folder).as_posix(): sha256_of(path) for path in files})


def images_per_class(labels: Tensor, num_classes: int) -> tuple[int, int]:
    """Smallest and largest number of images of any class."""
    counts = torch.bincount(labels.cpu(), minlength=num_classes)
    return int(counts.min()), int(counts.max())
