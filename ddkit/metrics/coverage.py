"""Relations of a set to the real images: density, coverage, diversity within classes, and nearest neighbors."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBORS = 5  # k of Naeem et al. 2020
_ROWS_AT_ONCE = 256  # of a distance matrix, so that memory is bounded


def density_and_coverage(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, equations 5 and 6).

    A real image's neighborhood is the ball around it that reaches its k-th nearest other real image, with k =
    NEIGHBORS. Density is the mean number of real neighborhoods that hold a generated image, divided by k; it can exceed 1.
    Coverage is the fraction of real images whose neighborhood holds a generated image, 0 to 1.
    real: (N, D) features with N > k. generated: (M, D) features, M > 0.
    """
    held, covered = torch.zeros((2,), dtype=torch.int64, device=real.device)
    for rows in real.split(_ROWS_AT_ONCE):
        # One more, since the nearest one is the image itself.
        radius = _distances(rows, real).kthvalue(NEIGHBORS + 1, dim=1).values
        inside = _distances(rows, generated) <= radius[:, None]
        held += inside.sum()
        covered += inside.any(dim=1).sum()
    return int(held) / (NEIGHBORS * len(generated)), int(covered) / len(real)


def within_class_diversity(features: Tensor, labels: Tensor) -> float | None:
    """Mean distance between two images of the same class, averaged over the classes with two or more; None without one.

    features: (N, D). labels: (N,) int64.
    """
    means = []
    for label in labels.unique():
        members = features[labels == label]
        if len(members) > 1:
            means.append(torch.nn.functional.pdist(members.float()).mean())
    return float(torch.stack(means).mean()) if means else None


def nearest(queries: Tensor, candidates: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k-th nearest candidate of each query: (N,) int64 indices and (N,) float32 distances.

    queries: (N, D). candidates: (M, D) with M >= k.
    """
    found = [_distances(rows, candidates).kthvalue(k, dim=1) for rows in queries.split(_ROWS_AT_ONCE)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]).float()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # In float64, because |a|^2 + |b|^2 - 2ab is fast, and in float32 it rounds so that copies seem to differ.
    return torch.cdist(a.double(), b.double(), compute_mode="use_mm_for_euclid_dist")
