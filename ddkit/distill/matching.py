"""What a refinement makes smaller: how far its images' features are from those of real images of their class, or how
badly real images are told by a regression on its images' features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddkit.network import augment
from ddkit.network.convnet import ConvNet
from ddkit.network.embedding import Embedder, in_parts

# The steps of one learning rate then serve both; measured on CIFAR-100.
_GRADIENTS_AS_MEANS = 70 / 3
_ATTENTION_POWER = 4  # as published


def siamese_augment(images: Tensor, real: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One strategy of the protocol with one draw of its parameters, applied to all images of both kinds.

    images, real: (N, 3, S, S) and (M, 3, S, S) normalized. Source: Zhao & Bilen 2021, arXiv 2102.08259, section 3.2.
    """
    strategy = augment.draw_strategy(generator)
    drawn = augment.draw(strategy, 1, images.shape[-1], generator)

    def applied(to: Tensor) -> Tensor:
        return augment.apply(strategy, to, [parameter.to(to.device).expand(len(to)) for parameter in drawn])

    return applied(images), applied(real)


def mean_embedding_distance(embed: Embedder, images: Tensor, real: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sum over classes of the squared distance between the mean embeddings of its images and its real images.

    embed: see `build_embedder`. images, real: (N, 3, S, S) and (M, 3, S, S) normalized, as many of each class, class by
    class. Gradients flow to `images` alone. Returns the distance, a scalar, and the embeddings (N, F) of `images`.
    Source: distribution matching, Zhao & Bilen 2023, arXiv 2110.04181, equation 6.
    """
    with torch.no_grad():
        target = embed(real).unflatten(0, (num_classes, -1)).mean(1)
    embedding = embed(images)
    means = embedding.unflatten(0, (num_classes, -1)).mean(1)
    return (means - target).square().sum(), embedding


def distance_of_attention(
    network: ConvNet, images: Tensor, real: Tensor, num_classes: int, weight: float
) -> tuple[Tensor, Tensor]:
    """The distance of means and, times `weight`, that of the class means of where each block but the last attends to.

    images, real: as for `mean_embedding_distance`; gradients likewise, by way of the network's own layers, which is slower.
    Attention at a place of a block's output is the sum over channels of its fourth power; all of an image have length 1.
    Returns the sum, a scalar, and the embeddings (N, F) of `images`.
    Source: DataDAM, Sajedi et al. 2023, arXiv 2310.00093, equations 2 to 4, where the distance of means has the weight
    0.01, so that `weight` is 100.
    """
    network.requires_grad_(False)

    def look(part: Tensor) -> tuple[Tensor, Tensor]:
        return _attention_and_embedding(network, part)

    with torch.no_grad():
        target = [seen.unflatten(0, (num_classes, -1)).mean(1) for seen in in_parts(look, real)]
    attention, embedding = in_parts(look, images)
    means = [seen.unflatten(0, (num_classes, -1)).mean(1) for seen in (attention, embedding)]
    of_attention, of_means = ((ours - theirs).square().sum() for ours, theirs in zip(means, target, strict=True))
    return of_means + weight * of_attention, embedding


def _attention_and_embedding(network: ConvNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """(N, places of all blocks but the last), and (N, F)."""
    maps, seen = [], images
    for layer in network.features:
        seen = layer(seen)
        if isinstance(layer, nn.ReLU):
            maps.append(F.normalize(seen.pow(_ATTENTION_POWER).sum(1).flatten(1)))
    return torch.cat(maps[:-1], dim=1), seen.flatten(1)


def ridge_regression_loss(
    embed: Embedder, images: Tensor, real: Tensor, num_classes: int, ridge: float
) -> tuple[Tensor, Tensor]:
    """How far ridge regression on the images' embeddings is from the classes of real images.

    embed, images, real: as for `mean_embedding_distance`; gradients likewise. ridge: added to the kernel's diagonal,
    as a share of
    its mean. Returns the sum over classes of the mean squared error, a scalar, times a constant by which its gradients
    are about as large as those of the distance of means, and the embeddings (N, F) of `images`.
    Source: the meta-loss of neural feature regression with pooling, Zhou, Nezhadarya & Ba 2022, arXiv 2206.00719, with
    fixed labels, as the challenge has no soft ones.
    """
    with torch.no_grad():
        seen = embed(real)
    embedding = embed(images)
    kernel = embedding @ embedding.t()
    regularized = kernel + ridge * kernel.diagonal().mean() * torch.eye(len(kernel), device=kernel.device)
    coefficients = torch.linalg.solve(regularized, _centered_classes(num_classes, embedding))
    # In this order the products with the kernel's other half, of all real images and all of these, are never formed.
    errors = seen @ (embedding.t() @ coefficients) - _centered_classes(num_classes, seen)
    return _GRADIENTS_AS_MEANS * errors.square().sum(1).unflatten(0, (num_classes, -1)).mean(1).sum(), embedding


def _centered_classes(num_classes: int, embedding: Tensor) -> Tensor:
    """(N, classes): 1 for the class of a row, 0 for others, less their mean; rows class by class."""
    classes = torch.eye(num_classes, device=embedding.device).repeat_interleave(len(embedding) // num_classes, dim=0)
    return classes - 1 / num_classes


def misclassification(network: ConvNet, embedding: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of a trained network's linear layer on embeddings (N, F); labels: (N,) int64.

    Keeps images recognizable as their class while their means are matched (Zhao et al. 2023, arXiv 2307.09742).
    """
    logits = F.linear(embedding, network.classifier.weight.detach(), network.classifier.bias.detach())
    return F.cross_entropy(logits, labels, reduction="sum")
