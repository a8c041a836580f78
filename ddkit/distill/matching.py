"""The losses of feature matching: distribution matching and neural feature regression."""

from __future__ import annotations

import torch
from torch import Tensor

from ddkit.network import augment
from ddkit.network.embedding import Embedder

# Gradients of "frepo" are then as large as those of "dm", so that one learning rate serves both; measured on CIFAR-100.
_FREPO_SCALE = 70 / 3


def siamese_augment(images: Tensor, real: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Differentiable siamese augmentation (DSA): one strategy with one draw of its parameters for all images.

    images, real: (N, 3, S, S) and (M, 3, S, S) normalized. Source: Zhao & Bilen 2021, arXiv 2102.08259, section 3.2.
    """
    strategy = augment.draw_strategy(generator)
    parameters = augment.draw(strategy, 1, images.shape[-1], generator)
    drawn = [parameter.to(images.device, non_blocking=images.is_cuda) for parameter in parameters]

    def applied(to: Tensor) -> Tensor:
        return augment.apply(strategy, to, [parameter.expand(len(to)) for parameter in drawn])

    return applied(images), applied(real)


def dm_loss(embed: Embedder, images: Tensor, real: Tensor, num_classes: int) -> Tensor:
    """Sum over classes of the squared distance between the mean embeddings of distilled and of real images.

    embed: see `build_embedder`. images, real: (N, 3, S, S) and (M, 3, S, S) normalized, class by class, the same number
    of each class. Returns a scalar, whose gradients flow to `images` alone.
    Source: distribution matching, Zhao & Bilen 2023, arXiv 2110.04181, equation 6.
    """
    with torch.no_grad():
        target = embed(real).unflatten(0, (num_classes, -1)).mean(1)
    means = embed(images).unflatten(0, (num_classes, -1)).mean(1)
    return (means - target).square().sum()


def frepo_loss(embed: Embedder, images: Tensor, real: Tensor, num_classes: int, krr_lambda: float) -> Tensor:
    """Error on real images of kernel ridge regression fitted to the embeddings of distilled images.

    embed, images, real: as for `dm_loss`. krr_lambda: added to the kernel's diagonal, as a share of its mean.
    Returns the sum over classes of the mean squared error, a scalar, times a constant by which its gradients are about
    as large as those of `dm_loss`. Gradients flow to `images` alone.
    Source: the meta-loss of FRePo, Zhou, Nezhadarya & Ba 2022, arXiv 2206.00719, with fixed labels, as the challenge
    has no soft ones.
    """
    with torch.no_grad():
        real_embedding = embed(real)
    embedding = embed(images)
    kernel = embedding @ embedding.t()
    regularized = kernel + krr_lambda * kernel.diagonal().mean() * torch.eye(len(kernel), device=kernel.device)
    # Without the check for singular kernels, for which a GPU would be waited for; the loss of one is not finite.
    coefficients = torch.linalg.solve_ex(regularized, _centered_classes(num_classes, embedding))[0]
    # In this order the kernel between all real and all distilled images is never formed.
    errors = real_embedding @ (embedding.t() @ coefficients) - _centered_classes(num_classes, real_embedding)
    return _FREPO_SCALE * errors.square().sum(1).unflatten(0, (num_classes, -1)).mean(1).sum()


def _centered_classes(num_classes: int, embedding: Tensor) -> Tensor:
    """(N, num_classes): one-hot labels minus their mean, rows class by class."""
    classes = torch.eye(num_classes, device=embedding.device).repeat_interleave(len(embedding) // num_classes, dim=0)
    return classes - 1 / num_classes
