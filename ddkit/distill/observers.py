"""The networks through which a refinement compares its images with real ones: fresh, or partly trained."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from ddkit.challenge import BATCH_SIZE, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY
from ddkit.distill.references import References
from ddkit.generator.seeds import generator_for, network_seed
from ddkit.interrupt import StopRequest
from ddkit.progress import Listener, Progress, ignore
from ddkit.protocol.augment import random_augment
from ddkit.protocol.convnet import ConvNet
from ddkit.protocol.engine import build_engine
from ddkit.protocol.networks import OFFICIAL_NETWORK, build_network
from ddkit.protocol.tuning import choose_plan


@dataclass(frozen=True)
class ObserverSettings:
    """Which networks look at the images.

    trained_share: of the steps that go by partly trained networks, the others by fresh random ones.
    trainings: on real images, each from another start. snapshots: steps of them after which the network is kept:
        early ones, as features of long-trained networks say less of what a few images can teach.
    """

    trained_share: float = 0.0
    trainings: int = 3
    snapshots: tuple[int, ...] = (20, 40, 80, 160)


class Observers:
    """Official networks, one for each step; which one depends on the seed and the step alone.

    The partly trained ones are trained here, by the protocol's optimiser, batch size and augmentation, before `at` can
    name them.
    """

    def __init__(
        self,
        references: References,
        settings: ObserverSettings,
        *,
        seed: int,
        device: torch.device,
        progress: Listener = ignore,
    ) -> None:
        self._references, self._settings, self._seed = references, settings, seed
        self._device, self._progress = device, progress
        self._spec = references.spec
        self._trained: list[ConvNet] = []

    @property
    def ready(self) -> bool:
        wanted = self._settings.trainings * len(self._settings.snapshots) if self._settings.trained_share > 0 else 0
        return len(self._trained) == wanted

    def prepare(self, stop: StopRequest | None = None) -> None:
        """Train those that are to be. Asked to stop, it returns, and those are not `ready`."""
        for training in range(len(self._trained) // len(self._settings.snapshots), self._settings.trainings):
            trained = self._train(training, stop)
            if trained is None:
                return
            self._trained += trained

    def at(self, step: int) -> tuple[ConvNet, bool]:
        """The network of that step, and whether it has been trained."""
        generator = generator_for("cpu", "observer", self._seed, step)
        if torch.rand(1, generator=generator).item() < self._settings.trained_share:
            return self._trained[int(torch.randint(len(self._trained), (1,), generator=generator))], True
        return self._fresh("observer", step), False

    def _fresh(self, purpose: str, number: int) -> ConvNet:
        seed = network_seed(purpose, self._seed, number)
        network = build_network(OFFICIAL_NETWORK, self._spec.num_classes, self._spec.image_size, seed=seed)
        return network.to(self._device)

    def _train(self, training: int, stop: StopRequest | None) -> list[ConvNet] | None:
        """The snapshots of one training; None if stopped."""
        steps = max(self._settings.snapshots)
        network = self._fresh("partly trained", training)
        engine = build_engine(network, choose_plan(network, "float32", BATCH_SIZE))
        optimiser = torch.optim.SGD(network.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        generator = generator_for("cpu", "partly trained", self._seed, training)
        kept = []
        for step in range(1, steps + 1):
            images, labels = self._references.mixed_batch(BATCH_SIZE, generator)
            images = random_augment(images.to(self._device), generator)
            engine.gradients(images, labels.to(self._device))
            optimiser.step()
            if step in self._settings.snapshots:
                kept.append(copy.deepcopy(network))
            done, total = training * steps + step, self._settings.trainings * steps
            self._progress(Progress("Training networks to look with", done, total, "steps"))
            if stop and step < steps:
                return None
        return kept
