"""The spectrum of a dataset's images, by which gradients of pixels are weighted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LEAST_SHARE = 1e-4  # of the mean variance, so that frequencies that no image has can still change slowly


class Spectrum:
    """Weights gradients of pixels by the variance of the dataset's images in each color and frequency, to some power.

    Images vary most in brightness and in low frequencies, while every network is sensitive to many other directions, each
    to its own. Steps along the directions in which images vary carry over from one network to the next. Optimizing
    pixels whitened by ZCA, as trajectory matching (arXiv 2203.11932) and FRePo (arXiv 2206.00719) do, is a descent along
    gradients times the covariance of the pixels, which is the power 1; here the pixels stay as the protocol has them, and
    the power is chosen.

    Variances are taken along the principal axes of color and in the two-dimensional cosine transform (DCT-II), which
    nearly decorrelates images (Ahmed, Natarajan & Rao 1974).
    """

    def __init__(self, images: Tensor, power: float) -> None:
        """images: (N, 3, S, S) float, normalized, on the gradients' device. power: from 0, which changes nothing, to 1."""
        # (3, 3), orthonormal rows: the principal axes of the images' colors.
        covariance = torch.cov(images.transpose(0, 1).flatten(1), correction=0)
        self._colors = torch.linalg.eigh(covariance)[1].t().contiguous()
        self._waves = _cosines(images.shape[-1]).to(images)
        variance = self._analyze(images).var(0, correction=0)
        # Identical images have no spectrum.
        shares = variance / variance.mean() if variance.any() else torch.ones_like(variance)
        self._weights = shares.clamp(min=_LEAST_SHARE).pow(power)

    def weigh(self, gradients: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, 3, S, S): each color and frequency times its weight, which is 1 at the mean variance."""
        amplitudes = self._analyze(gradients) * self._weights
        return torch.einsum("ac,nahw->nchw", self._colors, self._waves.t() @ amplitudes @ self._waves)

    def _analyze(self, images: Tensor) -> Tensor:
        """Images as amplitudes (N, color axis, vertical frequency, horizontal frequency)."""
        return self._waves @ torch.einsum("ac,nchw->nahw", self._colors, images) @ self._waves.t()


def _cosines(side: int) -> Tensor:
    """(S, S) float64, orthonormal rows: the waves of the DCT-II, the slowest first."""
    frequency, place = torch.arange(side, dtype=torch.float64)[:, None], torch.arange(side, dtype=torch.float64)
    waves = math.sqrt(2 / side) * torch.cos(math.pi * frequency * (place + 0.5) / side)
    waves[0] = math.sqrt(1 / side)
    return waves
