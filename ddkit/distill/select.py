"""Choosing the few images of each class that a distilled set is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from ddkit.errors import UsageError, nearest_name
from ddkit.generator.seeds import generator_for

REAL_CHOICES = ("random", "first")


def choose(how: str, labels: Tensor, ipc: int, num_classes: int, *, seed: int) -> Tensor:
    """Rows of `ipc` images of every class, class by class: (num_classes * ipc,) int64.

    how: "random", a choice that depends on (seed, class) alone, or "first", the first of each class in the order of
    the rows. labels: (N,) int64, of the images to choose from.
    Raises UsageError for another way, an ipc below one, or a class with fewer images than that.
    """
    if how not in REAL_CHOICES:
        raise UsageError(f"Images cannot be chosen '{how}'.", nearest_name(how, REAL_CHOICES))
    if ipc < 1:
        raise UsageError(f"A set needs at least one image per class, not {ipc}.")
    rows = []
    for c in range(num_classes):
        of_class = (labels == c).nonzero().flatten()
        if len(of_class) < ipc:
            raise UsageError(
                f"Class {c} has {len(of_class)} images, {ipc} were asked for.", f"Ask for --ipc {len(of_class)} at most."
            )
        rows.append(of_class[_order(how, len(of_class), seed, c)[:ipc]])
    return torch.cat(rows)


def _order(how: str, count: int, seed: int, label: int) -> Tensor:
    if how == "first":
        return torch.arange(count)
    return torch.randperm(count, generator=generator_for("cpu", "choice", seed, label))
