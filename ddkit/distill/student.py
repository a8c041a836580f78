"""A student that learns from the set alone and is to arrive where an expert, trained on real images, has arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ddkit.challenge import DatasetSpec
from ddkit.distill.experts import Experts, load_flat_parameters
from ddkit.errors import UsageError, require_positive
from ddkit.network.augment import random_augment
from ddkit.network.autotune import choose_plan
from ddkit.network.embedding import build_embedder
from ddkit.network.engine import build_engine
from ddkit.network.networks import OFFICIAL_NETWORK, build_network
from ddkit.runtime.interrupt import StopRequest
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.sets.distilled import class_labels

_SEEDS = 2**62  # of an augmentation
_NUDGE = 0.01  # of the parameters' norm, by which they are moved to and fro
_LEAST_RATE = 1e-4  # where the set leads away from the expert's end, none would be best
_TRIALS = 6  # to find a rate to begin with


@dataclass(frozen=True)
class StudentSettings:
    """steps: that the set has to follow an expert. images_per_class: that each of them goes by.

    rate_share: by which the rate of the steps moves, each time, to the one that would have brought the student nearest.
    """

    steps: int = 20
    images_per_class: int = 1
    rate_share: float = 0.05

    def __post_init__(self) -> None:
        require_positive(self, "steps", "images_per_class")
        if not 0 < self.rate_share <= 1:
            raise UsageError(f"StudentSettings.rate_share is a share above 0 and up to 1, got {self.rate_share}.")


@dataclass(frozen=True)
class TrajectoryMatch:
    """How a student came off.

    distance: the squared distance from where it arrived to the expert's end, of that from start to end. gradient: of the
    distance, as large as the images; None where not asked for. best_rate: that would have brought it nearest, positive.
    """

    distance: float
    gradient: Tensor | None
    best_rate: float


class Student:
    """The challenge's network, trained on the set for a few steps of plain gradient descent.

    Each step goes by as many images of each class, all images in turn. Gradients of the distance with respect to the
    images are taken step by step, as if the parameters that a step begins with did not depend on the images (Cui et al.
    2023, arXiv 2211.10586), so that a step costs the memory of one more copy of the parameters. What is left is the
    derivative of the images' gradient along the way from the expert's end to the student's: the difference of two
    gradients at parameters moved a little to either side. The engine that has no second derivatives serves for that;
    and while those that automatic differentiation finds know nothing of the places where a ReLU sets in, the difference
    does: at one step of CIFAR-100 it led down 1.7 times as steeply.

    images_per_class: of the set. images_at_once: that a step goes by.
    """

    def __init__(self, spec: DatasetSpec, images_per_class: int, settings: StudentSettings, device: torch.device) -> None:
        self._spec, self._ipc, self._device = spec, images_per_class, device
        self._steps, self._at_once = settings.steps, min(settings.images_per_class, images_per_class)
        self._labels = class_labels(spec.num_classes, images_per_class).to(device)
        self.images_at_once = spec.num_classes * self._at_once
        # Two networks, as gradients to images and to parameters are wanted from different engines.
        self._learner, self._looker = (
            build_network(OFFICIAL_NETWORK, spec.num_classes, spec.image_size, seed=0).to(device) for _ in range(2)
        )
        self._engine = build_engine(self._learner, choose_plan(self._learner, "float32", self.images_at_once))
        self._embed = build_embedder(self._looker, self.images_at_once)

    def first_rate(
        self,
        images: Tensor,
        experts: Experts,
        generator: torch.Generator,
        *,
        stop: StopRequest | None = None,
        progress: Listener = ignore,
    ) -> float | None:
        """A rate at which a student of these images comes about as near as it can; None if asked to stop before."""
        rate = _LEAST_RATE
        for trial in range(_TRIALS):
            if stop:
                return None
            rate = (rate + self.follow(images, *experts.stretch(generator), rate, generator, wanted=False).best_rate) / 2
            progress(Progress("Trying students' rates", trial + 1, _TRIALS, "trials"))
        return rate

    def follow(
        self, images: Tensor, start: Tensor, end: Tensor, rate: float, generator: torch.Generator, *, wanted: bool = True
    ) -> TrajectoryMatch:
        """Train from `start` and see how far from `end` that leads.

        images: (N, 3, S, S) normalized, class by class, on the student's device. start, end: (P,) parameters of an
        expert. rate: of the student's steps. wanted: whether the gradient is.
        Source: Cazenavette et al. 2022, arXiv 2203.11932, equation 2.
        """
        images = images.detach()
        start, end = start.to(self._device), end.to(self._device)
        batches = self._batches(generator)
        seeds = torch.randint(_SEEDS, (len(batches),), generator=generator).tolist()
        place, places, total = start, [], torch.zeros_like(start)
        for rows, seed in zip(batches, seeds, strict=True):
            places.append(place)
            gradient = self._of_parameters(place, images[rows], self._labels[rows], seed)
            total = total + gradient
            place = place - rate * gradient
        left, way = place - end, start - end
        scale = way.square().sum()
        distance, best_rate = left.square().sum() / scale, way @ total / total.square().sum()
        gradient = self._of_images(images, batches, seeds, places, left) * (-2 * rate / scale) if wanted else None
        return TrajectoryMatch(distance.item(), gradient, max(best_rate.item(), _LEAST_RATE))

    def _batches(self, generator: torch.Generator) -> list[Tensor]:
        """Rows of each step, as many of each class: those of a class in random order, again and again."""
        classes, count = self._spec.num_classes, self._steps * self._at_once
        rounds = -(-count // self._ipc)
        orders = [torch.rand(classes, self._ipc, generator=generator).argsort(1) for _ in range(rounds)]
        rows = torch.cat(orders, dim=1)[:, :count] + self._ipc * torch.arange(classes)[:, None]
        return [batch.flatten().to(self._device) for batch in rows.split(self._at_once, dim=1)]

    def _of_parameters(self, place: Tensor, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """(P,): the gradient of the mean cross-entropy with respect to the parameters."""
        load_flat_parameters(self._learner, place)
        self._engine.gradients(random_augment(images, torch.Generator().manual_seed(seed)), labels)
        return torch.cat([parameter.grad.reshape(-1) for parameter in self._learner.parameters()])

    def _of_images(
        self, images: Tensor, batches: Sequence[Tensor], seeds: Sequence[int], places: Sequence[Tensor], along: Tensor
    ) -> Tensor:
        """As large as `images`: each step's gradient with respect to its images, derived along that direction."""
        found = torch.zeros_like(images)
        for rows, seed, place in zip(batches, seeds, places, strict=True):
            nudge = _NUDGE * place.norm() / along.norm()
            there, back = (self._look(place + sign * nudge * along, images[rows], self._labels[rows], seed) for sign in (1, -1))
            found.index_add_(0, rows, (there - back) / (2 * nudge))
        return found

    def _look(self, place: Tensor, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """The gradient of the mean cross-entropy with respect to the images."""
        load_flat_parameters(self._looker, place)
        images = images.clone().requires_grad_()
        embedding = self._embed(random_augment(images, torch.Generator().manual_seed(seed)))
        classifier = self._looker.classifier
        logits = F.linear(embedding, classifier.weight.detach(), classifier.bias.detach())
        return torch.autograd.grad(F.cross_entropy(logits, labels), images)[0]
