"""Choosing the few images of each class that a distilled set is made of.

Some methods need only the labels. The others compare features and confidences, which a network trained on the real
images computes. All are deterministic: the same images, number and, for the random method, seed give the same choice.
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

DEFAULT_METHOD = "most-confident"
LABEL_METHODS = ("random", "first")
_KMEANS_ROUNDS = 50


@dataclass(frozen=True)
class ImageFeatures:
    """The images of one class as a network sees them.

    features: (n, F) float32. confidence: (n,) float32 in [0, 1], the probability of the class that each image should show.
    """

    features: Tensor
    confidence: Tensor


ExtractRows = Callable[[Tensor], ImageFeatures]  # row numbers (n,) int64 of one class -> their features


def choose(method: str, labels: Tensor, ipc: int, num_classes: int, *, seed: int, extract: ExtractRows | None = None) -> Tensor:
    """Row numbers of `ipc` images of every class, class by class: (num_classes * ipc,) int64.

    method: "first", the first rows of each class; "random", which depends on (seed, class) alone; or one of
    FEATURE_METHODS. labels: (N,) int64 of the images to choose from. extract: gives the features of one class at a
    time, so that memory holds only one; LABEL_METHODS do not need it.
    Raises UsageError for a class with fewer images, and what `choose_in_class` raises.
    """
    counts = labels.bincount(minlength=num_classes).tolist()
    if (fewest := min(counts)) < ipc:
        label = counts.index(fewest)
        raise UsageError(f"Class {label} has {fewest} images, but {ipc} were asked for.", f"Ask for --ipc {fewest} at most.")
    chosen = []
    for label in range(num_classes):
        rows = (labels == label).nonzero().flatten()
        features = extract(rows) if extract else None
        chosen.append(rows[choose_in_class(method, len(rows), ipc, seed=seed, label=label, features=features)])
    return torch.cat(chosen)


def choose_in_class(
    method: str, count: int, ipc: int, *, seed: int, label: int, features: ImageFeatures | None = None
) -> Tensor:
    """(ipc,) int64: which of the `count` images of class `label` are taken, in the order of preference.

    Raises UsageError for an unknown method, or one that needs features when there are none.
    """
    check_method(method)
    if method == "first":
        return torch.arange(ipc)
    if method == "random":
        return torch.randperm(count, generator=generator_for("cpu", "choice", seed, label))[:ipc]
    if features is None:
        raise UsageError(f"The selection method '{method}' needs the images' features.")
    # On the CPU: after every choice the next one depends on it, and a GPU would be waited for each time.
    return FEATURE_METHODS[method](ImageFeatures(features.features.cpu(), features.confidence.cpu()), ipc)


def choose_for_each_mode(
    method: str, count: int, modes: int, *, seed: int, label: int, features: ImageFeatures | None = None
) -> Tensor:
    """(modes,) int64: for each mode i the one that `choose_in_class` takes of the images i, i + modes, i + 2 * modes, ..."""
    chosen = []
    for mode in range(modes):
        rows = torch.arange(mode, count, modes)
        alike = features and ImageFeatures(features.features[rows], features.confidence[rows])
        chosen.append(rows[choose_in_class(method, len(rows), 1, seed=seed, label=label, features=alike)])
    return torch.cat(chosen)


def check_method(method: str) -> None:
    """Raise UsageError for an unknown selection method."""
    known = (*LABEL_METHODS, *FEATURE_METHODS)
    if method not in known:
        raise UsageError(f"Unknown selection method '{method}'.", did_you_mean(str(method), known))


def herding(images: ImageFeatures, ipc: int) -> Tensor:
    """Greedily take the image that keeps the mean closest to that of all (Welling 2009; Rebuffi 2017, arXiv 1611.07725)."""
    features = images.features
    target, total = features.mean(0), torch.zeros(features.shape[1])
    taken: list[int] = []
    for k in range(1, ipc + 1):
        distance = ((total + features) / k - target).square().sum(1)
        taken.append(_smallest(distance, taken))
        total = total + features[taken[-1]]
    return torch.tensor(taken)


def k_center(images: ImageFeatures, ipc: int) -> Tensor:
    """Begin with the most central image, then greedily take the farthest (Sener & Savarese 2018, arXiv 1708.00489)."""
    features = images.features
    taken = [int((features - features.mean(0)).square().sum(1).argmin())]
    nearest = torch.full((len(features),), float("inf"))
    while len(taken) < ipc:
        nearest = torch.minimum(nearest, (features - features[taken[-1]]).square().sum(1))
        taken.append(_smallest(-nearest, taken))
    return torch.tensor(taken)


def k_medoids(images: ImageFeatures, ipc: int) -> Tensor:
    """Take a different image near each center of k-means, which starts from the images of k_center."""
    # Imported late: scipy.cluster loads much.
    from scipy.cluster.vq import kmeans2
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    features = images.features.double().numpy()
    start = features[k_center(images, ipc).numpy()]
    with warnings.catch_warnings():
        # A cluster may lose all its images; its center then stays where it was.
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        centers, clusters = kmeans2(features, start, iter=_KMEANS_ROUNDS, minit="matrix")
    _, nearest = linear_sum_assignment(cdist(centers, features))
    # The largest cluster first.
    order = np.argsort(-np.bincount(clusters, minlength=ipc), kind="stable")
    return torch.from_numpy(nearest[order])


def minimax(images: ImageFeatures, ipc: int) -> Tensor:
    """Greedily take the image that is like its class and unlike those taken: the two criteria of minimax diffusion
    (arXiv 2311.15529) as a choice. It has the largest cosine to the class mean less the largest cosine to any taken."""
    # Without subtracting their mean, averages of rectified values would all point nearly the same way.
    features = F.normalize(images.features - images.features.mean(), dim=1)
    representative = features @ F.normalize(features.mean(0), dim=0)
    likest_taken = torch.zeros(len(features))
    taken: list[int] = []
    while len(taken) < ipc:
        taken.append(_smallest(likest_taken - representative, taken))
        alike = features @ features[taken[-1]]
        likest_taken = alike if len(taken) == 1 else torch.maximum(likest_taken, alike)
    return torch.tensor(taken)


FEATURE_METHODS: dict[str, Callable[[ImageFeatures, int], Tensor]] = {
    "most-confident": lambda images, ipc: _by_confidence(images)[:ipc],
    "median": lambda images, ipc: _by_confidence(images)[(len(images.confidence) - ipc) // 2 :][:ipc],
    "least-confident": lambda images, ipc: _by_confidence(images).flip(0)[:ipc],
    # The middle image of each of ipc equal bands of confidence, from the most to the least confident.
    "stratified": lambda images, ipc: _by_confidence(images)[((torch.arange(ipc) + 0.5) * len(images.confidence) / ipc).long()],
    "herding": herding,
    "k-center": k_center,
    "k-medoids": k_medoids,
    "minimax": minimax,
}


def _by_confidence(images: ImageFeatures) -> Tensor:
    """Indices by falling confidence; of two equal ones the earlier image comes first."""
    return images.confidence.argsort(descending=True, stable=True)


def _smallest(values: Tensor, taken: list[int]) -> int:
    """The index of the smallest value, except those taken."""
    values = values.clone()
    values[taken] = float("inf")
    return int(values.argmin())
