"""The real training images that a refinement goes by, a part of them held out to judge it."""

from __future__ import annotations

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.data.images import normalize
from ddkit.data.store import ImageSet
from ddkit.errors import UsageError
from ddkit.evaluation.reference import TestSet
from ddkit.runtime.seeds import Shuffling, derived_seed, generator_for


class TrainHoldout:
    """The training split in two parts, class by class: images to learn from, and images held out.

    held_out: share of each class, at least one image of it and not all. Raises UsageError for a class of fewer than two
    images.
    """

    def __init__(self, dataset: ImageSet, spec: DatasetSpec, *, held_out: float, seed: int) -> None:
        self.spec, self.held_out_share = spec, held_out
        self._dataset = dataset
        self._rows, held_out_rows = [], []
        for c in range(spec.num_classes):
            rows = (dataset.labels == c).nonzero().flatten()
            if len(rows) < 2:
                raise UsageError(
                    f"Class {c} of {spec.name} has {len(rows)} training images: "
                    "one to learn from and one to judge by are needed."
                )
            rows = rows[torch.randperm(len(rows), generator=generator_for("cpu", "held out", seed, c))]
            count = min(len(rows) - 1, max(1, round(held_out * len(rows))))
            held_out_rows.append(rows[:count])
            self._rows.append(rows[count:].sort().values)
        self._orders = [Shuffling(len(rows), derived_seed("real", seed, c)) for c, rows in enumerate(self._rows)]
        self._all = torch.cat(self._rows)
        self._held_out = torch.cat(held_out_rows)

    def batch(self, per_class: int, number: int) -> Tensor:
        """The batch of that number: (num_classes * per_class, 3, S, S) normalized float32, class by class.

        Consecutive batches take a class's images in random order, each once before any comes again: what single images
        have of their own then cancels out, as it would not if they were drawn anew each time.
        """
        drawn = [rows[order.take(number * per_class, per_class)] for rows, order in zip(self._rows, self._orders, strict=True)]
        return normalize(self._dataset.images[torch.cat(drawn)], self.spec)

    def random_batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images of any classes, (count, 3, S, S) normalized float32, and their labels (count,) int64."""
        rows = self._all[torch.randint(len(self._all), (count,), generator=generator)]
        return normalize(self._dataset.images[rows], self.spec), self._dataset.labels[rows]

    def sample(self, count: int) -> Tensor:
        """At most `count` images, always the same, evenly over the classes: (N, 3, S, S) normalized float32."""
        rows = self._all[:: max(1, -(-len(self._all) // count))]
        return normalize(self._dataset.images[rows], self.spec)

    def held_out(self) -> TestSet:
        """What a set is judged by while it is refined; never the test split."""
        return TestSet(self._dataset.images[self._held_out], self._dataset.labels[self._held_out], self.spec)
