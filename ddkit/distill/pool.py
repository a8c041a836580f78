"""The online pool: networks that are trained on the distilled set while it is refined.

Source: neural feature regression with pooling (FRePo), Zhou, Nezhadarya & Ba 2022, arXiv 2206.00719, section 3.3.
Here the networks are trained as the challenge trains them: SGD with its momentum, weight decay and augmentation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from ddkit.challenge import BATCH_SIZE, MOMENTUM, WEIGHT_DECAY, DatasetSpec
from ddkit.distill.settings import PoolSettings
from ddkit.errors import ComputeError
from ddkit.network.augment import random_augment
from ddkit.network.autotune import choose_plan
from ddkit.network.convnet import ConvNet
from ddkit.network.engine import build_engine
from ddkit.network.parameters import flat_gradients, flat_parameters, load_flat_parameters, random_network
from ddkit.runtime.device import upload

_log = logging.getLogger(__name__)

_LARGEST_WEIGHT = 1e3  # networks that train well stay within ten
_MEMORY_SHARE = 0.5  # of the free memory, which a step needs as well


class OnlinePool:
    """Networks in training on the distilled set, kept as flat parameters and momenta; one engine trains them all.

    labels: (N,) int64 of the set's rows, on the device. kept: what `state` returned, to resume from.
    seed: everything that is drawn depends on it and on the number of a step.
    """

    def __init__(
        self,
        settings: PoolSettings,
        spec: DatasetSpec,
        labels: Tensor,
        *,
        seed: int,
        precision: str = "float32",
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._settings, self._spec, self._labels, self._seed = settings, spec, labels, seed
        self._learner = random_network(spec, "pool", seed).to(labels.device)
        self._engine = build_engine(self._learner, choose_plan(self._learner, precision, min(BATCH_SIZE, len(labels))))
        if kept is None:
            parameters = torch.stack([self._fresh(number, 0) for number in range(settings.size)])
            kept = {
                "parameters": parameters,
                "momenta": torch.zeros_like(parameters),
                "ages": torch.arange(settings.size) * settings.max_age // settings.size,
                "diverged": torch.tensor(0),
            }
        self._parameters, self._momenta = (kept[name].to(labels.device, copy=True) for name in ("parameters", "momenta"))
        self._ages = kept["ages"].clone()
        self.diverged = int(kept["diverged"])  # number of networks that diverged and were replaced

    def state(self) -> dict[str, Tensor]:
        """Everything that the pool has reached: parameters and momenta (size, P), ages (size,), all on the CPU."""
        return {
            "parameters": self._parameters.cpu(),
            "momenta": self._momenta.cpu(),
            "ages": self._ages.clone(),
            "diverged": torch.tensor(self.diverged),
        }

    def draw(self, generator: torch.Generator) -> int:
        """The number of a network, uniformly. generator: on the CPU."""
        return int(torch.randint(self._settings.size, (1,), generator=generator))

    def load_into(self, network: ConvNet, number: int) -> None:
        """Copy the parameters of network `number` into another one's memory."""
        load_flat_parameters(network, self._parameters[number])

    def update(self, number: int, images: Tensor, generator: torch.Generator) -> Tensor:
        """Train network `number` on the set for `updates` batches, as the challenge trains.

        images: (N, 3, S, S) the present set, normalized, on the pool's device. generator: on the CPU.
        Returns the network's largest weight, a scalar on that device: see `retire`.
        """
        parameters, momentum = self._parameters[number], self._momenta[number]
        for _ in range(self._settings.updates):
            rows = upload(torch.randperm(len(images), generator=generator)[:BATCH_SIZE], images.device)
            load_flat_parameters(self._learner, parameters)
            self._engine.gradients(random_augment(images[rows], generator), self._labels[rows])
            gradients = flat_gradients(self._learner).add_(parameters, alpha=WEIGHT_DECAY)
            momentum.mul_(MOMENTUM).add_(gradients)
            parameters.sub_(momentum, alpha=self._settings.learning_rate)
        self._ages[number] += self._settings.updates
        return parameters.abs().max()

    def retire(self, number: int, step: int, largest_weight: float) -> None:
        """Replace network `number` by a random one where it is as old as it may be, or has diverged.

        step: number of the step, which decides on the random network. largest_weight: from `update`.
        """
        diverged = not largest_weight < _LARGEST_WEIGHT
        if diverged:
            self.diverged += 1
            _log.warning("A network of the pool diverged at step %d and is replaced by a random one.", step + 1)
        if diverged or self._ages[number] >= self._settings.max_age:
            self._parameters[number] = upload(self._fresh(number, step + 1), self._parameters.device)
            self._momenta[number] = 0
            self._ages[number] = 0

    def _fresh(self, number: int, step: int) -> Tensor:
        return flat_parameters(random_network(self._spec, "pool", self._seed, number, step))


def pool_memory(settings: PoolSettings, spec: DatasetSpec) -> int:
    """Bytes of the parameters and momenta of a pool."""
    parameters = flat_parameters(random_network(spec, "size"))
    return settings.size * 2 * parameters.numel() * parameters.element_size()


def require_memory(settings: PoolSettings, spec: DatasetSpec, free: int) -> None:
    """Raise ComputeError where parameters and momenta of the pool need more than half of `free` bytes."""
    needed = pool_memory(settings, spec)
    if needed > _MEMORY_SHARE * free:
        raise ComputeError(
            f"A pool of {settings.size:,} networks for {spec.name} needs {needed / 2**30:,.1f} GiB; half of the "
            f"{free / 2**30:,.1f} GiB of free memory are available to it.",
            f"Use --pool {int(settings.size * _MEMORY_SHARE * free / needed)}.",
        )
