"""The spectrum of a dataset's pictures, and steps on pixels that keep to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FAINTEST = 1e-4  # of the mean variance: what no picture has can still be moved, if slowly


class Spectrum:
    """Weighs gradients of pixels by how much pictures vary in each color and frequency, to some power.

    Pictures vary most in brightness and in what changes slowly over them, and networks are sensitive to much else, each
    to its own. Steps along what pictures have in common therefore carry over from one network to the next. Optimizing
    pixels whitened by ZCA, as trajectory matching (arXiv 2203.11932) and neural feature regression (arXiv 2206.00719)
    do, is a descent by gradients times the pixels' covariance, the power 1; here the pixels stay as the protocol has
    them, and the power is chosen.

    The variances are those of the principal axes of color and of the two-dimensional cosine transform (DCT-II), which
    is nearly what decorrelates pictures (Ahmed, Natarajan & Rao 1974).
    """

    def __init__(self, pictures: Tensor, power: float) -> None:
        """pictures: (N, 3, S, S) float, normalized. power: from 0, which leaves gradients as they are, to 1."""
        self._colors = _principal_axes(pictures)
        self._waves = _cosines(pictures.shape[-1]).to(pictures)
        variance = self._apart(pictures).var(0, correction=0)
        # Pictures that are all the same have no spectrum to go by.
        shares = variance / variance.mean() if variance.any() else torch.ones_like(variance)
        self._weights = shares.clamp(min=_FAINTEST).pow(power)

    def weigh(self, gradients: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, 3, S, S): each color and frequency by its weight; one of mean variance keeps its size."""
        return self._together(self._apart(gradients) * self._weights)

    def to(self, device: torch.device) -> Spectrum:
        self._colors, self._waves, self._weights = (tensor.to(device) for tensor in (self._colors, self._waves, self._weights))
        return self

    def _apart(self, images: Tensor) -> Tensor:
        """Images as amplitudes (N, axis of color, vertical frequency, horizontal frequency)."""
        return self._waves @ torch.einsum("ac,nchw->nahw", self._colors, images) @ self._waves.t()

    def _together(self, amplitudes: Tensor) -> Tensor:
        return torch.einsum("ac,nahw->nchw", self._colors, self._waves.t() @ amplitudes @ self._waves)


def _principal_axes(pictures: Tensor) -> Tensor:
    """(3, 3), orthonormal rows."""
    return torch.linalg.eigh(torch.cov(pictures.transpose(0, 1).flatten(1), correction=0))[1].t().contiguous()


def _cosines(side: int) -> Tensor:
    """(S, S) float64, orthonormal rows: the waves of the DCT-II, the slowest first."""
    frequency, place = torch.arange(side, dtype=torch.float64)[:, None], torch.arange(side, dtype=torch.float64)
    waves = math.sqrt(2 / side) * torch.cos(math.pi * frequency * (place + 0.5) / side)
    waves[0] = math.sqrt(1 / side)
    return waves
