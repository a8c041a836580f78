"""Choosing the few images of each class that a distilled set is made of.

Choices that look at the images see them as a network trained on the real ones does: a `ImageFeatures` of each class.
All are deterministic: the same images and ipc, and for a random choice the same seed, give the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ddkit.errors import UsageError, did_you_mean
from ddkit.runtime.seeds import generator_for

BLIND_CHOICES = ("random", "first")
_KMEANS_ROUNDS = 50


@dataclass(frozen=True)
class ImageFeatures:
    """What there is to choose from in one class. features: (n, F) float32. confidence: (n,) float32 in [0, 1], the
    probability that the network gives to the class that each image is meant to show."""

    features: Tensor
    confidence: Tensor


Look = Callable[[Tensor], ImageFeatures]  # rows (n,) int64 of one class -> what they look like


def choose(how: str, labels: Tensor, ipc: int, num_classes: int, *, seed: int, look: Look | None = None) -> Tensor:
    """Rows of `ipc` images of every class, class by class: (num_classes * ipc,) int64.

    how: "first", the first of each class in the order of the rows; "random", a choice that depends on (seed, class)
    alone; or one of SEEING_CHOICES. labels: (N,) int64, of the images to choose from. look: gives the view of one
    class at a time, so that never more than one is in memory; not needed by blind choices.
    Raises UsageError for another way, an ipc below one, or a class with fewer images than that.
    """
    check_choice(how)
    if ipc < 1:
        raise UsageError(f"A set needs at least one image per class, not {ipc}.")
    rows = []
    for c in range(num_classes):
        of_class = (labels == c).nonzero().flatten()
        if len(of_class) < ipc:
            raise UsageError(
                f"Class {c} has {len(of_class)} images, {ipc} were asked for.", f"Ask for --ipc {len(of_class)} at most."
            )
        view = look(of_class) if look and how not in BLIND_CHOICES else None
        rows.append(of_class[choose_in_class(how, len(of_class), ipc, seed=seed, label=c, view=view)])
    return torch.cat(rows)


def choose_in_class(how: str, count: int, ipc: int, *, seed: int, label: int, view: ImageFeatures | None = None) -> Tensor:
    """(ipc,) int64: which of the `count` images of class `label` are taken, the first taken first.

    Raises UsageError for a way that there is not, or one that needs a view and has none.
    """
    check_choice(how)
    if how == "first":
        return torch.arange(ipc)
    if how == "random":
        return torch.randperm(count, generator=generator_for("cpu", "choice", seed, label))[:ipc]
    if view is None:
        raise UsageError(f"The choice '{how}' looks at the images, and there is nothing to look with.")
    return SEEING_CHOICES[how](view, ipc)


def check_choice(how: str) -> None:
    """Raises UsageError for a way to choose that there is not."""
    known = (*BLIND_CHOICES, *SEEING_CHOICES)
    if how not in known:
        raise UsageError(f"Images cannot be chosen '{how}'.", did_you_mean(how, known))


def herding(view: ImageFeatures, ipc: int) -> Tensor:
    """Greedily those whose mean stays closest to the mean of all (Welling 2009; Rebuffi et al. 2017, arXiv 1611.07725)."""
    features = view.features
    target, total = features.mean(0), torch.zeros(features.shape[1])
    taken: list[int] = []
    for k in range(1, ipc + 1):
        distance = ((total + features) / k - target).square().sum(1)
        taken.append(_smallest(distance, taken))
        total = total + features[taken[-1]]
    return torch.tensor(taken)


def k_center(view: ImageFeatures, ipc: int) -> Tensor:
    """Greedily the one farthest from those taken, from the most central on (Sener & Savarese 2018, arXiv 1708.00489)."""
    features = view.features
    taken = [int((features - features.mean(0)).square().sum(1).argmin())]
    nearest = torch.full((len(features),), float("inf"))
    while len(taken) < ipc:
        nearest = torch.minimum(nearest, (features - features[taken[-1]]).square().sum(1))
        taken.append(_smallest(-nearest, taken))
    return torch.tensor(taken)


def k_medoids(view: ImageFeatures, ipc: int) -> Tensor:
    """The images nearest to the centers of k-means, begun from those of k_center; each center has one of its own."""
    from scipy.cluster.vq import kmeans2
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    features = view.features.double().numpy()
    start = features[k_center(view, ipc).numpy()]
    with warnings.catch_warnings():
        # A cluster may lose all its images; its center then stays where it was.
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        centers, clusters = kmeans2(features, start, iter=_KMEANS_ROUNDS, minit="matrix")
    _, nearest = linear_sum_assignment(cdist(centers, features))
    # The largest cluster first.
    order = np.argsort(-np.bincount(clusters, minlength=ipc), kind="stable")
    return torch.from_numpy(nearest[order])


def minimax(view: ImageFeatures, ipc: int) -> Tensor:
    """Greedily what is like the class and unlike those taken: the largest cosine to the class's mean less the largest
    cosine to any taken. It turns the two criteria of minimax diffusion (arXiv 2311.15529) into a choice."""
    # Less their level, one number for all: averages of rectified values would all point nearly the same way.
    features = F.normalize(view.features - view.features.mean(), dim=1)
    representative = features @ F.normalize(features.mean(0), dim=0)
    likest_taken = torch.zeros(len(features))
    taken: list[int] = []
    while len(taken) < ipc:
        taken.append(_smallest(likest_taken - representative, taken))
        alike = features @ features[taken[-1]]
        likest_taken = alike if len(taken) == 1 else torch.maximum(likest_taken, alike)
    return torch.tensor(taken)


def easy(view: ImageFeatures, ipc: int) -> Tensor:
    """Those recognized most surely."""
    return _by_confidence(view)[:ipc]


def middling(view: ImageFeatures, ipc: int) -> Tensor:
    """Those in the middle between the surest and the least sure."""
    start = (len(view.confidence) - ipc) // 2
    return _by_confidence(view)[start : start + ipc]


def hard(view: ImageFeatures, ipc: int) -> Tensor:
    """Those recognized least."""
    return _by_confidence(view).flip(0)[:ipc]


def spread(view: ImageFeatures, ipc: int) -> Tensor:
    """One of each of ipc equal bands of confidence, the middle of the band, from easy to hard."""
    places = ((torch.arange(ipc) + 0.5) * len(view.confidence) / ipc).long()
    return _by_confidence(view)[places]


SEEING_CHOICES: dict[str, Callable[[ImageFeatures, int], Tensor]] = {
    "herding": herding,
    "k-center": k_center,
    "k-medoids": k_medoids,
    "minimax": minimax,
    "easy": easy,
    "middling": middling,
    "hard": hard,
    "spread": spread,
}


def _by_confidence(view: ImageFeatures) -> Tensor:
    """Indices from the surest on; the earlier image first where two are equally sure."""
    return view.confidence.argsort(descending=True, stable=True)


def _smallest(values: Tensor, taken: list[int]) -> int:
    """Where the smallest value is, those taken aside."""
    values = values.clone()
    values[taken] = float("inf")
    return int(values.argmin())
