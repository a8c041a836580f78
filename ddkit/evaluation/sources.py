"""Sources of training images: the same set for every round, or what a track 2 generator makes for each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ddkit.challenge import BATCH_SIZE, DatasetSpec
from ddkit.errors import InvalidSubmissionError, UsageError
from ddkit.evaluation.tracks import Generated
from ddkit.runtime.tensor_files import UnloadableError, load_restricted, save_torch


@dataclass(frozen=True)
class FixedSet:
    """The same images for every round.

    images: (N, 3, S, S) float, normalized, or uint8 pixels. labels: (N,) int64.
    converted: what they were, if not the challenge's tensor.
    """

    images: Tensor
    labels: Tensor
    converted: str = ""
    budget: ClassVar[None] = None  # nothing is generated

    @property
    def identity(self) -> str:
        """A hash of everything that decides on the images of all rounds."""
        return hash_of(self.images, self.labels)

    def for_round(self, seed: int, kept: Path | None) -> Generated:
        return Generated(self.images, self.labels, 0.0)


@dataclass(frozen=True)
class TimedGenerator:
    """A track 2 entry, run again for each round.

    generate: (seed, seconds that it may take) -> images and labels. name: identifies the entry across processes; a hash of
    its files where it has files. budget: seconds for a round. spec: the dataset that the images are for.
    """

    generate: Callable[[int, float], Generated]
    name: str
    budget: float
    spec: DatasetSpec
    converted = ""

    @property
    def identity(self) -> str:
        """The name of everything that decides on the images of all rounds."""
        return f"{self.name}/{self.budget:g}"

    def for_round(self, seed: int, kept: Path | None) -> Generated:
        """The images and labels of a round; those in the file `kept` if the round was begun before.

        Raises InvalidSubmissionError, and keeps nothing, if networks cannot be trained on what was made.
        """
        if kept and kept.exists():
            # A continued round must train on the images that it began with.
            try:
                return Generated(**load_restricted(kept, mmap=True))
            except (UnloadableError, TypeError):
                kept.unlink()
        made = self.generate(seed, self.budget)
        check_training_set(made.images, made.labels, self.spec)
        if kept:
            save_torch(vars(made), kept)
            # The images can be gigabytes, and are read as they are needed.
            made = Generated(**load_restricted(kept, mmap=True))
        return made


Source = FixedSet | TimedGenerator


def check_training_set(images: Tensor, labels: Tensor, spec: DatasetSpec) -> None:
    """Raise InvalidSubmissionError unless networks for `spec` can be trained on these normalized floats or uint8 pixels.

    Raises UsageError if either is not a tensor.
    """
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise UsageError("Images and labels must be tensors.")
    is_float = images.is_floating_point()
    if images.ndim != 4 or tuple(images.shape[1:]) != spec.image_shape or not (is_float or images.dtype == torch.uint8):
        raise InvalidSubmissionError(
            f"The images are {images.dtype} of shape {tuple(images.shape)}; {spec.name} needs normalized float32, or uint8 "
            f"pixels, of shape (N, {', '.join(map(str, spec.image_shape))})."
        )
    if labels.dtype != torch.int64 or labels.shape != (len(images),) or len(images) == 0:
        raise InvalidSubmissionError(
            f"{len(images)} images have {labels.dtype} labels of shape {tuple(labels.shape)}; each image needs one int64 label."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= spec.num_classes:
        raise InvalidSubmissionError(f"Labels must lie in 0 ... {spec.num_classes - 1}, the classes of {spec.name}.")
    # A part at a time: the images of a track 2 generator can be gigabytes.
    if is_float and not all(bool(torch.isfinite(part).all()) for part in images.split(BATCH_SIZE)):
        raise InvalidSubmissionError("The images hold values that are NaN or infinite.")


def hash_of(*tensors: Tensor) -> str:
    """Hexadecimal SHA-256 of the tensors' types, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
