"""The prepared store: a dataset's pixels and labels as memory-mapped tensors that open in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Labelled real images.

    images: (N, 3, S, S) uint8. labels: (N,) int64, indices into class_names.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)
