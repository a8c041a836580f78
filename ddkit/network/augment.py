"""Differentiable augmentation (DSA, arXiv 2102.08259) as the challenge uses it: one of six strategies for a whole batch.

Every operation takes its parameters as tensors, one number per image, and works on the batch at once;
`random_augment` draws them. All values are in normalized space, so zero is the dataset's mean color.
Source: PROTOCOL.md, "Augmentation, once per training batch".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ddkit.challenge import (
    AUGMENT_BRIGHTNESS,
    AUGMENT_CONTRAST,
    AUGMENT_CROP_RATIO,
    AUGMENT_CUTOUT_RATIO,
    AUGMENT_FLIP_PROBABILITY,
    AUGMENT_ROTATE_DEGREES,
    AUGMENT_SATURATION,
    AUGMENT_SCALE,
    AUGMENT_STRATEGIES,
)


def scale(images: Tensor, sx: Tensor, sy: Tensor) -> Tensor:
    """Sample (N, 3, S, S) `images` on a grid stretched by `sx`, `sy` (N,); below 1 enlarges. Bilinear, zeros outside."""
    zero = torch.zeros_like(sx)
    return _sample(images, torch.stack([sx, zero, zero, zero, sy, zero], dim=1))


def rotate(images: Tensor, theta: Tensor) -> Tensor:
    """Sample (N, 3, S, S) `images` on a grid turned by `theta` (N,) radians. Bilinear, zeros outside."""
    cos, sin, zero = torch.cos(theta), torch.sin(theta), torch.zeros_like(theta)
    return _sample(images, torch.stack([cos, -sin, zero, sin, cos, zero], dim=1))


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror left and right those (N, 3, S, S) `images` where `flipped` (N,) bool is true."""
    return torch.where(_column(flipped), images.flip(3), images)


def brightness(images: Tensor, uniform: Tensor) -> Tensor:
    """x + (u - 0.5); `uniform` (N,) in [0, 1)."""
    return images + (_column(uniform) - 0.5) * AUGMENT_BRIGHTNESS


def saturation(images: Tensor, uniform: Tensor) -> Tensor:
    """(x - m) * 2u + m with m the mean over the channels at each pixel; `uniform` (N,) in [0, 1)."""
    mean = images.mean(dim=1, keepdim=True)
    return (images - mean) * (_column(uniform) * AUGMENT_SATURATION) + mean


def contrast(images: Tensor, uniform: Tensor) -> Tensor:
    """(x - m) * (u + 0.5) + m with m the mean of each image; `uniform` (N,) in [0, 1)."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (_column(uniform) + AUGMENT_CONTRAST) + mean


def crop(images: Tensor, shift_x: Tensor, shift_y: Tensor) -> Tensor:
    """output[i, j] = input[i + shift_x, j + shift_y], zero outside; shifts (N,) int64 along dimensions 2 and 3."""
    # A reader that clamps to a border of zeros, one pixel wide, reads zero wherever it is outside.
    padded = F.pad(images, (1, 1, 1, 1))
    _, channels, height, width = padded.shape
    places = torch.arange(height - 2, device=images.device)  # images are squares
    rows = (places + shift_x[:, None] + 1).clamp(0, height - 1)
    columns = (places + shift_y[:, None] + 1).clamp(0, width - 1)
    taken = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, width))
    return taken.gather(3, columns[:, None, None, :].expand(-1, channels, height - 2, -1))


def cutout(images: Tensor, offset_x: Tensor, offset_y: Tensor) -> Tensor:
    """Set to zero a square of half the image's side, centered at (offset_x, offset_y), (N,) int64.

    The official code clamps each index of the square to the image, so a square that reaches over the border also blanks
    the row or column at the border. The interval below does the same.
    """
    size = images.shape[-1]
    places, side = torch.arange(size, device=images.device), _cutout_side(size)

    def blank(offset: Tensor) -> Tensor:
        """(N, size) bool: true for rows (or columns) among the clamped indices of the square."""
        first = offset[:, None] - side // 2
        return (places >= first.clamp(0, size - 1)) & (places <= (first + side - 1).clamp(0, size - 1))

    return images.masked_fill((blank(offset_x)[:, :, None] & blank(offset_y)[:, None, :])[:, None], 0.0)


_OPERATIONS: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (crop, cutout, flip, scale, rotate)}


def random_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Apply one strategy, drawn uniformly for the batch, with parameters drawn for each image.

    images: (N, 3, S, S) normalized float, not changed. generator: on the CPU for images on any device, so that the draws
        do not depend on the device, and a GPU is not waited for.
    Returns a new tensor.
    """
    strategy = draw_strategy(generator)
    parameters = draw(strategy, len(images), images.shape[-1], generator)
    return apply(strategy, images, [p.to(images.device, non_blocking=images.is_cuda) for p in parameters])


def draw_strategy(generator: torch.Generator) -> str:
    """One of the six, uniformly."""
    return AUGMENT_STRATEGIES[int(_integers(len(AUGMENT_STRATEGIES), 1, generator))]


def draw(strategy: str, n: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """Parameters of `strategy` for `n` images of side `size`, each (n,), in the order of its operations' arguments."""
    if strategy == "color":
        return [_uniform(n, generator) for _ in range(3)]
    if strategy == "crop":
        shift = int(size * AUGMENT_CROP_RATIO + 0.5)
        return [_integers(2 * shift + 1, n, generator) - shift for _ in range(2)]
    if strategy == "cutout":
        return [_integers(size + 1 - _cutout_side(size) % 2, n, generator) for _ in range(2)]
    if strategy == "flip":
        return [_uniform(n, generator) < AUGMENT_FLIP_PROBABILITY]
    if strategy == "scale":
        smallest = 1 / AUGMENT_SCALE
        return [_uniform(n, generator) * (AUGMENT_SCALE - smallest) + smallest for _ in range(2)]
    if strategy == "rotate":
        return [(_uniform(n, generator) - 0.5) * 2 * math.radians(AUGMENT_ROTATE_DEGREES)]
    raise ValueError(f"unknown augmentation strategy '{strategy}'")


def apply(strategy: str, images: Tensor, parameters: list[Tensor]) -> Tensor:
    """The operations of `strategy` with the parameters that `draw` gave for it."""
    if strategy == "color":
        # In this order: each operation's mean is taken after the one before it.
        for operation, uniform in zip((brightness, saturation, contrast), parameters, strict=True):
            images = operation(images, uniform)
        return images
    return _OPERATIONS[strategy](images, *parameters)


def _sample(images: Tensor, matrices: Tensor) -> Tensor:
    """matrices: (N, 6), the rows of each image's 2x3 affine map, in the images' precision."""
    grid = F.affine_grid(matrices.to(images.dtype).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _cutout_side(size: int) -> int:
    return int(size * AUGMENT_CUTOUT_RATIO + 0.5)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator)


def _integers(below: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(below, (n,), generator=generator)
