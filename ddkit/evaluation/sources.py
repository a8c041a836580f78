"""What each round trains on: the same set every time, or what a track 2 generator makes for it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.errors import InvalidSubmissionError, UsageError
from ddkit.evaluation.tracks import Generate, Generated, generate_within
from ddkit.runtime.tensor_files import UnloadableError, load_restricted, save_torch


class Source(Protocol):
    """Where the training images of each round come from."""

    @property
    def identity(self) -> str:
        """A hash of everything that decides on the images of all rounds."""

    @property
    def budget(self) -> float | None:
        """Seconds that making a round's images may take; None where they are not made for the round."""

    def for_round(self, index: int, seed: int, folder: Path | None) -> Generated:
        """The images and labels of round `index`; `folder` is where a generator's output is kept for resuming."""

    def forget(self, index: int, folder: Path | None) -> None:
        """Remove what was kept of round `index`, which is finished."""


@dataclass(frozen=True)
class FixedSet:
    """The same images for every round.

    images: (N, 3, S, S) float, normalized. labels: (N,) int64.
    """

    images: Tensor
    labels: Tensor
    budget: None = None

    @property
    def identity(self) -> str:
        return hash_of(self.images, self.labels)

    def for_round(self, index: int, seed: int, folder: Path | None) -> Generated:
        return Generated(self.images, self.labels, 0.0)

    def forget(self, index: int, folder: Path | None) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class TimedGenerator:
    """A track 2 entry, run again for each round.

    name: identifies the entry across processes; a hash of its files where it has files. budget: seconds.
    """

    generate: Generate
    name: str
    budget: float

    @property
    def identity(self) -> str:
        return f"{self.name}/{self.budget:g}"

    def for_round(self, index: int, seed: int, folder: Path | None) -> Generated:
        kept = _images_of(index, folder)
        if kept and kept.exists():
            # A continued round must go on with the images that it began with.
            try:
                return Generated(**load_restricted(kept))
            except (UnloadableError, TypeError):
                kept.unlink()
        made = generate_within(self.generate, seed, self.budget)
        if kept:
            save_torch({"images": made.images, "labels": made.labels, "seconds": made.seconds}, kept)
        return made

    def forget(self, index: int, folder: Path | None) -> None:
        """A round's images can be gigabytes."""
        if kept := _images_of(index, folder):
            kept.unlink(missing_ok=True)


def _images_of(index: int, folder: Path | None) -> Path | None:
    return folder / f"round-{index}-images.pt" if folder else None


def check_training_set(images: Tensor, labels: Tensor, spec: DatasetSpec) -> None:
    """Raise InvalidSubmissionError unless networks for `spec` can be trained on these."""
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise UsageError("Images and labels must be tensors.")
    if images.ndim != 4 or tuple(images.shape[1:]) != spec.image_shape or not images.is_floating_point():
        raise InvalidSubmissionError(
            f"The images are {images.dtype} of shape {tuple(images.shape)}; "
            f"{spec.name} needs float32 of shape (N, {', '.join(map(str, spec.image_shape))}), normalized."
        )
    if labels.dtype != torch.int64 or labels.shape != (len(images),) or len(images) == 0:
        raise InvalidSubmissionError(
            f"{len(images)} images have {labels.dtype} labels of shape {tuple(labels.shape)}, expected one int64 each."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= spec.num_classes:
        raise InvalidSubmissionError(f"Labels must lie in 0 ... {spec.num_classes - 1}, the classes of {spec.name}.")
    if not bool(torch.isfinite(images).all()):
        raise InvalidSubmissionError("The images hold values that are no numbers.")


def hash_of(*tensors: Tensor) -> str:
    """Hexadecimal SHA-256 of the tensors' types, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
