"""Trajectory matching (experimental): a student trained on the set should end where an expert ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ddkit.challenge import DatasetSpec
from ddkit.distill.experts import Experts
from ddkit.distill.settings import StudentSettings
from ddkit.network.augment import random_augment
from ddkit.network.autotune import choose_plan
from ddkit.network.embedding import build_embedder
from ddkit.network.engine import build_engine
from ddkit.network.parameters import flat_gradients, load_flat_parameters, random_network
from ddkit.runtime.device import upload
from ddkit.runtime.interrupt import StopRequest
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.sets.distilled import class_labels

_SEEDS = 2**62
_NUDGE = 0.01  # by which parameters are moved for a difference of gradients, as a share of their norm
_LEAST_LR = 1e-4  # where the set leads away from the expert's end, the best rate would be negative
_TRIALS = 6  # to find the first learning rate


@dataclass(frozen=True)
class TrajectoryMatch:
    """The result of matching a student to a segment.

    distance: squared distance between the ends of student and expert, divided by that between the segment's ends.
    gradient: of the distance with respect to the images, in their shape; None where it was not asked for.
    best_lr: the student's learning rate that would have made the distance smallest, positive.
    """

    distance: float
    gradient: Tensor | None
    best_lr: float


class Student:
    """The challenge's network, trained on the set for a few steps of gradient descent without momentum.

    Every step takes a few images of each class, in turn. Gradients of the distance with respect to the images are taken
    step by step, as if the parameters that a step begins with did not depend on the images (Cui et al. 2023, arXiv
    2211.10586), so that a step costs the memory of one more copy of the parameters. The remaining term is the derivative
    of the images' gradient along the line from the expert's end to the student's, computed as the difference of two
    gradients at parameters moved a little to either side. The engine, which has no second derivatives, can compute it.
    The difference also sees where a ReLU changes sign, which automatic differentiation does not: at one step of
    CIFAR-100 it led down 1.7 times as steeply.

    images_per_class: of the set. precision: "float32" or "bfloat16"; on ten classes of CIFAR-100 their gradients have a cosine
    of 0.97, where those of two segments have 0.1. images_at_once: images of a step.
    """

    def __init__(
        self, spec: DatasetSpec, images_per_class: int, settings: StudentSettings, precision: str, device: torch.device
    ) -> None:
        self._spec, self._ipc, self._device = spec, images_per_class, device
        self._steps, self._at_once = settings.steps, min(settings.images_per_class, images_per_class)
        self._labels = class_labels(spec.num_classes, images_per_class).to(device)
        self.images_at_once = spec.num_classes * self._at_once
        # Two networks, as different engines compute gradients to images and to parameters.
        self._learner, self._observer = (random_network(spec, "student").to(device) for _ in range(2))
        self._engine = build_engine(self._learner, choose_plan(self._learner, precision, self.images_at_once))
        self._embed = build_embedder(self._observer, self.images_at_once, precision)

    def initial_lr(
        self,
        images: Tensor,
        experts: Experts,
        generator: torch.Generator,
        *,
        stop: StopRequest | None = None,
        progress: Listener = ignore,
    ) -> float | None:
        """A learning rate with which a student of these images matches about as well as it can.

        Returns None when asked to stop before it is found.
        """
        lr = _LEAST_LR
        for trial in range(_TRIALS):
            if stop:
                return None
            segment = experts.sample_segment(generator)
            lr = (lr + self.match(images, *segment, lr, generator, with_gradient=False).best_lr) / 2
            progress(Progress("Trying students' learning rates", trial + 1, _TRIALS, "trials"))
        return lr

    def match(
        self,
        images: Tensor,
        start: Tensor,
        end: Tensor,
        lr: float,
        generator: torch.Generator,
        *,
        with_gradient: bool = True,
    ) -> TrajectoryMatch:
        """Train from `start` and compare where that leads with `end`.

        images: (N, 3, S, S) normalized, class by class, on the student's device. start, end: (P,) parameters of an
        expert. lr: learning rate of the student's steps.
        Source: Cazenavette et al. 2022, arXiv 2203.11932, equation 2.
        """
        images = images.detach()
        start, end = upload(start, self._device), upload(end, self._device)
        batches = self._batches(generator)
        seeds = torch.randint(_SEEDS, (len(batches),), generator=generator).tolist()
        parameters, visited, total = start, [], torch.zeros_like(start)
        for rows, seed in zip(batches, seeds, strict=True):
            visited.append(parameters)
            load_flat_parameters(self._learner, parameters)
            self._engine.gradients(random_augment(images[rows], torch.Generator().manual_seed(seed)), self._labels[rows])
            step = flat_gradients(self._learner)
            total = total + step
            parameters = parameters - lr * step
        left, segment = parameters - end, start - end
        scale = segment.square().sum()
        distance, best_lr = left.square().sum() / scale, segment @ total / total.square().sum()
        gradient = self._image_gradient(images, batches, seeds, visited, left) * (-2 * lr / scale) if with_gradient else None
        distance, best_lr = torch.stack([distance, best_lr]).tolist()
        return TrajectoryMatch(distance, gradient, max(best_lr, _LEAST_LR))

    def _batches(self, generator: torch.Generator) -> list[Tensor]:
        """Rows of each step, equally many of each class: all images of a class in random order, again and again."""
        classes, count = self._spec.num_classes, self._steps * self._at_once
        rounds = -(-count // self._ipc)
        orders = [torch.rand(classes, self._ipc, generator=generator).argsort(1) for _ in range(rounds)]
        rows = torch.cat(orders, dim=1)[:, :count] + self._ipc * torch.arange(classes)[:, None]
        return [upload(batch.flatten(), self._device) for batch in rows.split(self._at_once, dim=1)]

    def _image_gradient(
        self,
        images: Tensor,
        batches: Sequence[Tensor],
        seeds: Sequence[int],
        visited: Sequence[Tensor],
        direction: Tensor,
    ) -> Tensor:
        """In the shape of `images`: the derivative along `direction` of each step's gradient with respect to its images."""
        found = torch.zeros_like(images)
        for rows, seed, parameters in zip(batches, seeds, visited, strict=True):
            nudge = _NUDGE * parameters.norm() / direction.norm()
            plus, minus = (
                self._loss_gradient(parameters + sign * nudge * direction, images[rows], self._labels[rows], seed)
                for sign in (1, -1)
            )
            found.index_add_(0, rows, (plus - minus) / (2 * nudge))
        return found

    def _loss_gradient(self, parameters: Tensor, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """The gradient of the mean cross-entropy with respect to the images."""
        load_flat_parameters(self._observer, parameters)
        images = images.clone().requires_grad_()
        embedding = self._embed(random_augment(images, torch.Generator().manual_seed(seed)))
        classifier = self._observer.classifier
        logits = F.linear(embedding, classifier.weight.detach(), classifier.bias.detach())
        return torch.autograd.grad(F.cross_entropy(logits, labels), images)[0]
