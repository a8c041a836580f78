"""ZCA whitening as published code does it, and its inverse.

Trajectory matching (Cazenavette et al. 2022, arXiv 2203.11932) and those who follow it whiten pixels in [0, 1] with
kornia's `ZCAWhitening(eps=0.1)`, fitted on the training images: with their mean m and covariance C (divided by N - 1),
w = (x - m) (C + eps I)^(-1/2). The inverse is x = m + w (C + eps I)^(1/2).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ddkit.data.store import ImageSet, train_sha256
from ddkit.errors import ComputeError
from ddkit.runtime.cached import cached_tensors
from ddkit.runtime.device import shortage_explained
from ddkit.runtime.files import cache_folder
from ddkit.runtime.progress import Listener, Progress, ignore

ZCA_EPSILON = 0.1  # of the published code
_ROWS_AT_ONCE = 1024


def undo_zca(images: Tensor, dataset: str, train: ImageSet, *, progress: Listener = ignore) -> Tensor:
    """Whitened images (N, 3, S, S) -> float32 pixels, those of real images in [0, 1].

    train: the training split of `dataset` as prepared, on which the whitening was fitted. Its matrix is computed once and
    kept in the cache: seconds and 38 MB at 32 pixels, minutes, 3 GB of memory and 604 MB of disk at 64.
    Raises ComputeError if memory is short.
    """
    path = cache_folder() / "_whitening" / f"{dataset}-{train_sha256(dataset)[:16]}.safetensors"
    task = f"computing the ZCA whitening of {dataset}"

    def make() -> Mapping[str, Tensor]:
        side = train.images.shape[-1]
        with shortage_explained(
            lambda: ComputeError(f"There is not enough memory for the ZCA whitening of {side}-pixel images.")
        ):
            return _fit(train.images, task, progress)

    found = cached_tensors(path, ("mean", "root"), f"the ZCA whitening of {dataset}", make)
    return torch.addmm(found["mean"], images.flatten(1).float(), found["root"]).view(images.shape)


def _fit(images: Tensor, task: str, progress: Listener) -> dict[str, Tensor]:
    """mean: (1, D). root: (D, D), the symmetric root of the covariance plus epsilon. images: (N, 3, S, S) uint8."""
    count, size = len(images), images[0].numel()
    blocks = images.split(_ROWS_AT_ONCE)
    total = torch.zeros(1, size, dtype=torch.float64)
    for block in blocks:
        total += block.flatten(1).double().sum(0) / 255
    mean = (total / count).float()
    covariance = torch.zeros(size, size)
    for done, block in enumerate(blocks):
        centered = block.flatten(1).float().div_(255).sub_(mean)
        covariance.addmm_(centered.T, centered)
        progress(Progress(task, done + 1, len(blocks) + 1))
    variances, vectors = torch.linalg.eigh(covariance.div_(max(1, count - 1)))
    root = (vectors * variances.clamp_(min=0).add_(ZCA_EPSILON).sqrt_()) @ vectors.T
    progress(Progress(task, len(blocks) + 1, len(blocks) + 1))
    return {"mean": mean, "root": root}
