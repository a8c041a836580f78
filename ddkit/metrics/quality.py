"""The quality of a set's images: metrics of the set, and the same metrics of other real images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddkit.data.store import ImageSet
from ddkit.errors import UsageError
from ddkit.metrics.coverage import density_and_coverage, nearest, within_class_diversity
from ddkit.metrics.features import ConvNetFeatures
from ddkit.metrics.frechet import frechet_distance
from ddkit.runtime.progress import Listener, ignore

_MOST_REAL = 50_000  # images that the set is compared with
_MOST_NEIGHBORHOODS = 10_000  # of real images, for density and coverage, whose cost grows with the square


@dataclass(frozen=True)
class ImageMetrics:
    """Metrics of a set of images, compared with real ones.

    frechet: Frechet distance; smaller is better.
    density, coverage: Naeem et al. 2020; larger is better, and the density of real images is about 1.
    diversity: mean distance within a class; None if no class has two images.
    nearest: median distance to the nearest real image, in units of the same distance of real images; far below 1, the
        images are copies.
    """

    frechet: float
    density: float
    coverage: float
    diversity: float | None
    nearest: float


@dataclass(frozen=True)
class Quality:
    """The metrics of a set of `images` images, and those of as many other real images of the same classes, but of no more than
    half of a class: where a set has more, its Frechet distance is biased upwards less than theirs.

    neighbors: (N,) index of the real training image that is nearest to each image.
    distances: (N,) to it, in units of the median distance from a real image to the nearest other one.
    """

    images: int
    metrics: ImageMetrics
    real: ImageMetrics
    neighbors: Tensor
    distances: Tensor


def measure(
    images: Tensor,
    labels: Tensor,
    dataset: ImageSet,
    features: ConvNetFeatures,
    *,
    seed: int = 0,
    progress: Listener = ignore,
) -> Quality:
    """Compare a set with the real training images.

    images: (N, 3, S, S) uint8. labels: (N,) int64. dataset: the training split.
    seed: draws the real images that stand for a perfect set, as many of each class as the set has. Both are compared
        with other real images.
    Raises UsageError for fewer than two images, or if the dataset is too small for that.
    """
    if len(images) < 2:
        raise UsageError("Measuring the quality of a set takes two images or more.")
    stand_in, others = _split_real(labels, dataset.labels, seed)
    if len(others) < 10 or len(stand_in) < 2:
        raise UsageError("There are too few real images to compare the set with.", "Measure a smaller set.")
    real = features(dataset.images[others], progress)
    ours = features(images, progress)
    other = features(dataset.images[stand_in], progress)
    # Copies are looked for among all training images, those that were left out above included.
    rest = torch.ones(len(dataset.labels), dtype=torch.bool).index_fill_(0, others, False).nonzero().flatten()
    everything = torch.cat([real, features(dataset.images[rest], progress)])
    indices, distances = nearest(ours, everything)
    unit = nearest(other, everything, 2)[1].median().clamp_min(1e-6)  # of which the nearest is the image itself
    return Quality(
        images=len(images),
        metrics=_metrics(ours, labels, real, distances / unit),
        real=_metrics(other, dataset.labels[stand_in], real, torch.ones(1)),
        neighbors=torch.cat([others, rest])[indices],
        distances=distances / unit,
    )


def _metrics(features: Tensor, labels: Tensor, real: Tensor, distances: Tensor) -> ImageMetrics:
    density, coverage = density_and_coverage(real[:: -(-len(real) // _MOST_NEIGHBORHOODS)], features)
    return ImageMetrics(
        frechet=frechet_distance(real, features),
        density=density,
        coverage=coverage,
        diversity=within_class_diversity(features, labels),
        nearest=float(distances.median()),
    )


def _split_real(labels: Tensor, real_labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of as many real images of each class as `labels` has, and of others, at most _MOST_REAL."""
    order = torch.randperm(len(real_labels), generator=torch.Generator().manual_seed(seed))
    shuffled = real_labels[order]
    # The position of each image within its class, in the shuffled order.
    place = torch.empty_like(order)
    for label in real_labels.unique():
        members = (shuffled == label).nonzero().flatten()
        place[members] = torch.arange(len(members))
    wanted = torch.bincount(labels, minlength=int(real_labels.max()) + 1)[shuffled]
    # At most half of a class, so that something is left to compare with.
    room = torch.bincount(real_labels)[shuffled] // 2
    stands_in = place < torch.minimum(wanted, room)
    return order[stands_in].sort().values, order[~stands_in][:_MOST_REAL].sort().values
