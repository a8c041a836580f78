"""How good a set's pictures are, beside real ones: one table of the metrics, each with what real images get."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddkit.data.store import ImageSet
from ddkit.errors import UsageError
from ddkit.metrics.coverage import density_and_coverage, nearest, within_class_diversity
from ddkit.metrics.features import ReferenceFeatures
from ddkit.metrics.frechet import frechet_distance
from ddkit.runtime.progress import Listener, ignore

_MOST_REAL = 50_000  # images that the set is held against
_MOST_NEIGHBORHOODS = 10_000  # real images whose neighborhoods make density and coverage; their number counts twice


@dataclass(frozen=True)
class Scores:
    """The metrics of one set of images against the same real ones.

    frechet: Frechet distance; smaller is better. density, coverage: Naeem et al. 2020; larger is better, and real images
        get a density of about 1.
    diversity: mean distance within a class; None where no class has two images.
    nearest: median distance to the nearest real image, in units of the same of real images: far below 1 means copies.
    """

    frechet: float
    density: float
    coverage: float
    diversity: float | None
    nearest: float


@dataclass(frozen=True)
class Quality:
    """The scores of a set, and those of as many other real images of the same classes: what is to be reached.

    neighbors: (N,) indices into the real training set, all of it, of each image's nearest real one.
    distances: (N,) to it, in units of the median distance from a real image to the nearest other one.
    """

    images: int
    scores: Scores
    real: Scores
    neighbors: Tensor
    distances: Tensor


def measure(
    images: Tensor,
    labels: Tensor,
    dataset: ImageSet,
    features: ReferenceFeatures,
    *,
    seed: int = 0,
    progress: Listener = ignore,
) -> Quality:
    """Measure a set against the real training images.

    images: (N, 3, S, S) uint8. labels: (N,) int64. dataset: the training split.
    seed: draws the real images that stand in for a perfect set, as many of each class as the set has; those and
        the others that both are held against do not overlap.
    Raises UsageError when fewer than two images are given or the dataset is too small to be split so.
    """
    if len(images) < 2:
        raise UsageError("Quality is measured on two images or more.")
    stand_in, reference = _split_real(labels, dataset.labels, seed)
    if len(reference) < 10:
        raise UsageError("There are too few real images to hold the set against.", "Measure a smaller set.")
    real = features(dataset.images[reference], progress)
    ours = features(images, progress)
    other = features(dataset.images[stand_in], progress)
    # Copies are looked for among all training images: also those that stand in, and those that are one too many above.
    rest = torch.ones(len(dataset.labels), dtype=torch.bool).index_fill_(0, reference, False).nonzero().flatten()
    everything = torch.cat([real, features(dataset.images[rest], progress)])
    indices, distances = nearest(ours, everything)
    # How far a real image lies from the nearest other one is the unit of these distances.
    unit = nearest(other, real)[1].median().clamp_min(1e-6)
    return Quality(
        images=len(images),
        scores=_scores(ours, labels, real, distances / unit),
        real=_scores(other, dataset.labels[stand_in], real, torch.ones(1)),
        neighbors=torch.cat([reference, rest])[indices],
        distances=distances / unit,
    )


def _scores(features: Tensor, labels: Tensor, real: Tensor, distances: Tensor) -> Scores:
    found = density_and_coverage(real[:: -(-len(real) // _MOST_NEIGHBORHOODS)], features)
    several = bool((labels.bincount() > 1).any())
    return Scores(
        frechet=frechet_distance(real, features),
        density=found.density,
        coverage=found.coverage,
        diversity=within_class_diversity(features, labels) if several else None,
        nearest=float(distances.median()),
    )


def _split_real(labels: Tensor, real_labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of as many real images of each class as `labels` has, and of up to so many others; no overlap."""
    order = torch.randperm(len(real_labels), generator=torch.Generator().manual_seed(seed))
    shuffled = real_labels[order]
    # The place of each image within its class, in the shuffled order.
    place = torch.empty_like(order)
    for label in real_labels.unique():
        members = (shuffled == label).nonzero().flatten()
        place[members] = torch.arange(len(members))
    wanted = torch.bincount(labels, minlength=int(real_labels.max()) + 1)[shuffled]
    # At most half of a class stands in, so that something is left to compare with.
    room = torch.bincount(real_labels)[shuffled] // 2
    stands_in = place < torch.minimum(wanted, room)
    return order[stands_in].sort().values, order[~stands_in][:_MOST_REAL].sort().values
