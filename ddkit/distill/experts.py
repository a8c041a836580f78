"""Experts: networks in training on the real images, whose ways through their parameters a student is to follow, and
through which, at any place of them, a set can be looked at."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ddkit.distill.holdout import TrainHoldout
from ddkit.errors import UsageError, require_positive
from ddkit.network.augment import random_augment
from ddkit.network.autotune import choose_plan
from ddkit.network.engine import build_engine
from ddkit.network.networks import OFFICIAL_NETWORK, build_network
from ddkit.runtime.files import cache_folder
from ddkit.runtime.interrupt import StopRequest
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.runtime.seeds import generator_for, network_seed
from ddkit.runtime.tensor_files import save_safetensors

log = logging.getLogger(__name__)

_CACHE_FOLDER = "_experts"  # no dataset can have this name
_KEY = "parameters"
_VERSION = 1  # of how an expert is trained


@dataclass(frozen=True)
class ExpertSettings:
    """How experts are trained: by plain gradient descent at one rate, which is what a student can follow.

    count: trainings, each from another start. steps, batch_size, learning_rate: of each.
    keep_every: steps between two places of the way that are kept.
    span: steps of an expert that a student is to do in its own few.
    """

    count: int = 3
    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 0.05
    keep_every: int = 10
    span: int = 20

    def __post_init__(self) -> None:
        require_positive(self, "count", "steps", "batch_size", "learning_rate", "keep_every", "span")
        if self.span % self.keep_every or self.steps % self.keep_every:
            raise UsageError(f"ExpertSettings.steps and span must be multiples of keep_every, {self.keep_every}.")
        if self.span > self.steps:
            raise UsageError(f"A span of {self.span} steps is longer than the experts' {self.steps}.")


class Experts:
    """The ways of a few trainings, in the cache, where the next refinement of that dataset finds them.

    They belong to the very images, the seed and the settings that decide a way. Each is some 200 to 800 MB and written
    when it is finished: a kill costs one.
    dataset_sha256: of the real training images.
    """

    def __init__(
        self,
        references: TrainHoldout,
        dataset_sha256: str,
        settings: ExpertSettings,
        *,
        seed: int,
        device: torch.device,
        progress: Listener = ignore,
    ) -> None:
        self._references, self._settings, self._seed = references, settings, seed
        self._device, self._progress = device, progress
        of_a_way = (settings.steps, settings.batch_size, settings.learning_rate, settings.keep_every)
        made_of = (_VERSION, dataset_sha256, references.held_out_share, seed, of_a_way)
        identity = hashlib.sha256(repr(made_of).encode()).hexdigest()[:20]
        self._folder = cache_folder() / _CACHE_FOLDER / f"{references.spec.name}-{identity}"
        self._ways: list[Tensor] = []

    @property
    def ready(self) -> bool:
        return len(self._ways) == self._settings.count

    def prepare(self, stop: StopRequest | None = None) -> None:
        """Train those that the cache does not hold. Asked to stop, it returns, and those are not `ready`."""
        for number in range(len(self._ways), self._settings.count):
            path = self._folder / f"{number:03d}.safetensors"
            way = _read(path)
            if way is None:
                log.info("Training expert %d of %d, kept in %s", number + 1, self._settings.count, self._folder)
                trained = self._train(number, stop)
                if trained is None:
                    return
                save_safetensors({_KEY: trained}, path)
                way = _read(path)
            self._ways.append(way)

    def stretch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two places of one expert's way, `span` steps apart: parameters as (P,) float32 on the CPU."""
        settings = self._settings
        way = self._ways[int(torch.randint(len(self._ways), (1,), generator=generator))]
        stride = settings.span // settings.keep_every
        begin = int(torch.randint(len(way) - stride, (1,), generator=generator))
        return way[begin].clone(), way[begin + stride].clone()

    def place(self, generator: torch.Generator) -> Tensor:
        """Any place of any way but its start: parameters as (P,) float32 on the CPU."""
        way = self._ways[int(torch.randint(len(self._ways), (1,), generator=generator))]
        return way[int(torch.randint(1, len(way), (1,), generator=generator))].clone()

    def _train(self, number: int, stop: StopRequest | None) -> Tensor | None:
        """(steps / keep_every + 1, P) float32 on the CPU: the start, then every place that is kept; None if stopped."""
        settings, spec = self._settings, self._references.spec
        start = network_seed("expert", self._seed, number)
        network = build_network(OFFICIAL_NETWORK, spec.num_classes, spec.image_size, seed=start).to(self._device)
        engine = build_engine(network, choose_plan(network, "float32", settings.batch_size))
        optimizer = torch.optim.SGD(network.parameters(), settings.learning_rate)
        generator = generator_for("cpu", "expert", self._seed, number)
        kept = [flat_parameters(network).cpu()]
        for step in range(1, settings.steps + 1):
            images, labels = self._references.random_batch(settings.batch_size, generator)
            engine.gradients(random_augment(images.to(self._device), generator), labels.to(self._device))
            optimizer.step()
            if step % settings.keep_every == 0:
                kept.append(flat_parameters(network).cpu())
            done, total = number * settings.steps + step, settings.count * settings.steps
            self._progress(Progress("Training experts (once)", done, total, "steps"))
            if stop and step < settings.steps:
                return None
        return torch.stack(kept)


def flat_parameters(network: nn.Module) -> Tensor:
    """All parameters of a network one after the other, (P,), a copy."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])


@torch.no_grad()
def load_flat_parameters(network: nn.Module, place: Tensor) -> nn.Module:
    """A network with its parameters, (P,) as of `flat_parameters`, set where they lie: engines know where that is."""
    begin = 0
    for parameter in network.parameters():
        parameter.copy_(place[begin : begin + parameter.numel()].view_as(parameter))
        begin += parameter.numel()
    return network


def _read(path: Path) -> Tensor | None:
    """The way in that file, memory-mapped; None where there is nothing usable, which is then made anew."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)[_KEY]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
