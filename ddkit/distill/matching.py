"""What a refinement makes smaller: how far its images' features are from those of real images of their class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ddkit.protocol import augment
from ddkit.protocol.convnet import ConvNet
from ddkit.protocol.embedding import build_embedder


def same_augmentation(images: Tensor, real: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One strategy of the protocol with one draw of its parameters, applied to all images of both kinds.

    images, real: (N, 3, S, S) and (M, 3, S, S) normalised. Source: Zhao & Bilen 2021, arXiv 2102.08259, section 3.2.
    """
    strategy = augment.draw_strategy(generator)
    drawn = augment.draw(strategy, 1, images.shape[-1], generator)

    def applied(to: Tensor) -> Tensor:
        return augment.apply(strategy, to, [parameter.to(to.device).expand(len(to)) for parameter in drawn])

    return applied(images), applied(real)


def distance_of_means(network: ConvNet, images: Tensor, real: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sum over classes of the squared distance between the mean embeddings of its images and its real images.

    images, real: (N, 3, S, S) and (M, 3, S, S) normalised, as many of each class, class by class. Gradients flow to
    `images` alone. Returns the distance, a scalar, and the embeddings (N, F) of `images`.
    Source: distribution matching, Zhao & Bilen 2023, arXiv 2110.04181, equation 6.
    """
    embed = build_embedder(network, len(images))
    with torch.no_grad():
        target = embed(real).unflatten(0, (num_classes, -1)).mean(1)
    embedding = embed(images)
    means = embedding.unflatten(0, (num_classes, -1)).mean(1)
    return (means - target).square().sum(), embedding


def misclassification(network: ConvNet, embedding: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of a trained network's linear layer on embeddings (N, F); labels: (N,) int64.

    Keeps images recognisable as their class while their means are matched (Zhao et al. 2023, arXiv 2307.09742).
    """
    logits = F.linear(embedding, network.classifier.weight.detach(), network.classifier.bias.detach())
    return F.cross_entropy(logits, labels, reduction="sum")
