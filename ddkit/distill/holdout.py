"""The real training images of a refinement: a part to learn from, and a part held out for validation."""

from __future__ import annotations

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.data.images import denormalize, normalize, to_uint8
from ddkit.data.store import ImageSet
from ddkit.errors import UsageError
from ddkit.evaluation.test_sets import TestSet
from ddkit.runtime.device import is_out_of_memory, upload
from ddkit.runtime.seeds import Shuffling, derived_seed, generator_for


class TrainHoldout:
    """The training split in two parts, class by class.

    held_out: share of each class, at least one image of it and not all. device: where batches are wanted. Pixels are
    kept there as uint8, or in main memory where they do not fit.
    Raises UsageError for a class of fewer than two images.
    """

    def __init__(
        self, dataset: ImageSet, spec: DatasetSpec, *, held_out: float, seed: int, device: torch.device | None = None
    ) -> None:
        self.spec, self.held_out_share = spec, held_out
        self._dataset, self._device = dataset, device or torch.device("cpu")
        try:
            self._pixels = dataset.images.to(self._device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._pixels = dataset.images
        class_rows, held_out_rows = [], []
        for c in range(spec.num_classes):
            rows = (dataset.labels == c).nonzero().flatten()
            if len(rows) < 2:
                raise UsageError(
                    f"Class {c} of {spec.name} has {'one training image' if len(rows) else 'no training images'}, and at least "
                    "two are needed: one to learn from and one for validation."
                )
            rows = rows[torch.randperm(len(rows), generator=generator_for("cpu", "held out", seed, c))]
            count = min(len(rows) - 1, max(1, round(held_out * len(rows))))
            held_out_rows.append(rows[:count])
            class_rows.append(rows[count:].sort().values)
        self._class_rows = class_rows
        self._orders = [Shuffling(len(rows), derived_seed("real", seed, c)) for c, rows in enumerate(class_rows)]
        self._rows, self._held_out_rows = torch.cat(class_rows), torch.cat(held_out_rows)

    def rows(self, per_class: int, number: int) -> Tensor:
        """Rows of the batch of that number: (num_classes * per_class,) int64 on the CPU, class by class.

        Consecutive batches take a class's images in random order, each once before any comes again, so that what is
        peculiar to single images cancels out.
        """
        pairs = zip(self._class_rows, self._orders, strict=True)
        return torch.cat([rows[order.take(number * per_class, per_class)] for rows, order in pairs])

    def images(self, rows: Tensor) -> Tensor:
        """The images of those rows: (N, 3, S, S) normalized float32 on the device."""
        pixels = self._pixels[upload(rows, self._pixels.device)]
        return normalize(upload(pixels, self._device), self.spec)

    def random_batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images of any classes, (count, 3, S, S) normalized float32, and their labels (count,) int64, on the device."""
        rows = self._rows[torch.randint(len(self._rows), (count,), generator=generator)]
        return self.images(rows), upload(self._dataset.labels[rows], self._device)

    def sample(self, count: int) -> Tensor:
        """At most `count` images, always the same, evenly over the classes: (N, 3, S, S) normalized float32, on the CPU."""
        rows = self._rows[:: max(1, -(-len(self._rows) // count))]
        return normalize(self._dataset.images[rows], self.spec)

    def held_out(self, without: Tensor | None = None) -> TestSet:
        """The images for validation. The test split is never used.

        without: (N, 3, S, S) normalized, on the CPU. Held-out images that are among these are left out, as a network that
        trains on a set knows the set's own images; unless no others are there.
        """
        rows = self._held_out_rows
        if without is not None:
            known = {image.numpy().tobytes() for image in to_uint8(denormalize(without, self.spec))}
            unknown = torch.tensor([image.numpy().tobytes() not in known for image in self._dataset.images[rows]])
            rows = rows[unknown] if unknown.any() else rows
        return TestSet(self._dataset.images[rows], self._dataset.labels[rows], self.spec)
