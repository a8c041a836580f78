"""Conversions of pixels: uint8 [0, 255], float [0, 1], and normalized as the protocol wants them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ddkit.challenge import DatasetSpec


def normalize(images: Tensor, spec: DatasetSpec) -> Tensor:
    """(N, 3, S, S) uint8 in [0, 255] or float in [0, 1] -> float32, (x - mean) / std per channel."""
    if images.dtype == torch.uint8:
        return normalize_(images.float(), spec)  # one copy of what may be gigabytes
    return (images.float() - _constants(spec.mean, images.device)) / _constants(spec.std, images.device)


def normalize_(pixels: Tensor, spec: DatasetSpec) -> Tensor:
    """`normalize` in place, to the same bits: (N, 3, S, S) float32 pixels in [0, 255]."""
    return pixels.div_(255).sub_(_constants(spec.mean, pixels.device)).div_(_constants(spec.std, pixels.device))


def denormalize(images: Tensor, spec: DatasetSpec) -> Tensor:
    """(N, 3, S, S) normalized float -> float32 in the units of [0, 1]. Values outside are not clamped."""
    return images.float() * _constants(spec.std, images.device) + _constants(spec.mean, images.device)


def to_uint8(images: Tensor) -> Tensor:
    """(N, 3, S, S) float in [0, 1] -> uint8, clamped and rounded to the nearest."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def resize(images: Tensor, side: int) -> Tensor:
    """(N, 3, S, S) float -> (N, 3, side, side), bilinear with antialiasing; the same tensor if it has that size."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


@functools.cache
def _constants(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """(1, 3, 1, 1) on the device. Kept there, as a GPU is waited for when numbers are copied to it."""
    with torch.inference_mode(False):  # else a first use in that mode would forbid gradients to all later ones
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)
