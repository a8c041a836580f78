"""Does a set look like the real images, does it cover them, do its images differ, does it copy them?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddkit.errors import UsageError

NEIGHBORS = 5  # k of Naeem et al. 2020
_ROWS_AT_ONCE = 256  # of a distance matrix: bounded memory whatever the number of images


@dataclass(frozen=True)
class DensityCoverage:
    """density: mean number of real neighborhoods that hold a generated image, over k; can exceed 1.
    coverage: fraction of real images whose neighborhood holds a generated image, 0 to 1.
    """

    density: float
    coverage: float


def density_and_coverage(real: Tensor, generated: Tensor, k: int = NEIGHBORS) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, equations 5 and 6).

    real: (N, D) features with N > k. generated: (M, D) features. A real image's neighborhood is the ball
    that reaches its k-th nearest other real image. Raises UsageError for sets too small or of other D.
    """
    if len(real) <= k or len(generated) == 0 or real.shape[1] != generated.shape[1]:
        raise UsageError(
            f"Density and coverage with k = {k} need more than {k} real images and one generated, in features of "
            f"the same size, not {tuple(real.shape)} and {tuple(generated.shape)}."
        )
    held = covered = 0
    for start in range(0, len(real), _ROWS_AT_ONCE):
        rows = real[start : start + _ROWS_AT_ONCE]
        # k + 1: the nearest of all is the image itself.
        radius = _distances(rows, real).kthvalue(k + 1, dim=1).values
        inside = _distances(rows, generated) <= radius[:, None]
        held += int(inside.sum())
        covered += int(inside.any(dim=1).sum())
    return DensityCoverage(held / (k * len(generated)), covered / len(real))


def within_class_diversity(features: Tensor, labels: Tensor) -> float:
    """Mean distance between two images of the same class, averaged over the classes with two or more.

    features: (N, D). labels: (N,) int64. Raises UsageError when no class has two images.
    """
    means = []
    for label in labels.unique():
        members = features[labels == label]
        if len(members) > 1:
            means.append(torch.nn.functional.pdist(members.float()).mean())
    if not means:
        raise UsageError("Diversity within classes needs a class with at least two images.")
    return float(torch.stack(means).mean())


def nearest(queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest candidate of each query: (N,) int64 indices and (N,) float32 distances.

    queries: (N, D). candidates: (M, D), not empty.
    """
    found = [_distances(rows, candidates).min(dim=1) for rows in queries.split(_ROWS_AT_ONCE)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]).float()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # float64: |a|^2 + |b|^2 - 2ab is fast, and in float32 its rounding makes copies look unlike.
    return torch.cdist(a.double(), b.double(), compute_mode="use_mm_for_euclid_dist")
