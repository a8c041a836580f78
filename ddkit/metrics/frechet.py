"""The Frechet distance between two sets of features, computed by torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddkit.errors import ComputeError


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance between the Gaussians that fit two sets of features.

    |mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 sqrt(cov_a cov_b)) (Heusel et al. 2017, equation 6).
    features_a: (N, D), features_b: (M, D), any float type; computed in float64. With fewer than D + 1
    images, two or more, the covariances are singular and the distance is biased upwards, so compare equal N and M only.
    Raises ComputeError for values that are not finite.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # imported late: it takes a second

    features_a, features_b = features_a.detach().cpu(), features_b.detach().cpu()
    for features in (features_a, features_b):
        if not torch.isfinite(features).all():
            raise ComputeError("The features hold values that are NaN or infinite.", "Look at the images that they come from.")
    metric = FrechetInceptionDistance(feature=_Unchanged(features_a.shape[1])).set_dtype(torch.float64)
    metric.update(features_a.double(), real=True)
    metric.update(features_b.double(), real=False)
    # Rounding of the matrix root can give a tiny negative value for equal sets.
    return max(0.0, float(metric.compute()))


class _Unchanged(nn.Module):
    """In place of the network that torchmetrics expects, since its input is features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
