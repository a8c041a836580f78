"""Experts: networks in training on the real images, whose ways through their parameters a student is to follow."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ddkit.distill.references import References
from ddkit.errors import UsageError
from ddkit.files import cache_folder
from ddkit.generator.seeds import derived_seed, generator_for
from ddkit.progress import Listener, Progress, ignore
from ddkit.protocol.augment import random_augment
from ddkit.protocol.engine import build_engine
from ddkit.protocol.networks import OFFICIAL_NETWORK, build_network
from ddkit.protocol.tuning import choose_plan
from ddkit.tensor_files import save_safetensors

log = logging.getLogger(__name__)

_CACHE_FOLDER = "_experts"  # no dataset can have this name
_KEY = "parameters"
_SEEDS = 2**32  # of PyTorch's generator on the CPU


@dataclass(frozen=True)
class ExpertSettings:
    """How experts are trained: by plain gradient descent at one rate, which is what a student can follow.

    count: trainings, each from another start. steps, batch_size, learning_rate: of each.
    keep_every: steps between two places of the way that are kept.
    span: steps of an expert that a student is to do in its own few.
    """

    count: int = 4
    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 0.05
    keep_every: int = 10
    span: int = 20

    def __post_init__(self) -> None:
        for name in ("count", "steps", "batch_size", "learning_rate", "keep_every", "span"):
            if getattr(self, name) <= 0:
                raise UsageError(f"ExpertSettings.{name} must be positive, got {getattr(self, name)}.")
        if self.span % self.keep_every or self.steps % self.keep_every:
            raise UsageError(f"ExpertSettings.steps and span must be multiples of keep_every, {self.keep_every}.")
        if self.span > self.steps:
            raise UsageError(f"A span of {self.span} steps is longer than the experts' {self.steps}.")


class Experts:
    """The ways of a few trainings, in the cache, where the next refinement of that dataset finds them.

    They belong to the very images, the settings and the seed. Each is written when it is finished: a kill costs one.
    dataset_sha256: of the real training images.
    """

    def __init__(
        self,
        references: References,
        dataset_sha256: str,
        settings: ExpertSettings,
        *,
        seed: int,
        device: torch.device,
        progress: Listener = ignore,
    ) -> None:
        self._settings = settings
        made_of = (dataset_sha256, references.held_out_share, seed, sorted(asdict(settings).items()))
        identity = hashlib.sha256(repr(made_of).encode()).hexdigest()[:20]
        folder = cache_folder() / _CACHE_FOLDER / f"{references.spec.name}-{identity}"
        self._ways = []
        for number in range(settings.count):
            path = folder / f"{number:03d}.safetensors"
            way = _read(path)
            if way is None:
                log.info("Training expert %d of %d, kept in %s", number + 1, settings.count, folder)
                save_safetensors({_KEY: _train(references, settings, number, seed, device, progress)}, path)
                way = _read(path)
            self._ways.append(way)

    def stretch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two places of one expert's way, `span` steps apart: parameters as (P,) float32 on the CPU."""
        settings = self._settings
        way = self._ways[int(torch.randint(len(self._ways), (1,), generator=generator))]
        stride = settings.span // settings.keep_every
        begin = int(torch.randint(len(way) - stride, (1,), generator=generator))
        return way[begin].clone(), way[begin + stride].clone()


def flat_parameters(network: nn.Module) -> Tensor:
    """All parameters of a network one after the other, (P,), a copy."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])


def _train(
    references: References, settings: ExpertSettings, number: int, seed: int, device: torch.device, progress: Listener
) -> Tensor:
    """(steps / keep_every + 1, P) float32 on the CPU: the start, then every place that is kept."""
    spec = references.spec
    network_seed = derived_seed("expert", seed, number) % _SEEDS
    network = build_network(OFFICIAL_NETWORK, spec.num_classes, spec.image_size, seed=network_seed).to(device)
    engine = build_engine(network, choose_plan(network, "float32", settings.batch_size))
    optimiser = torch.optim.SGD(network.parameters(), settings.learning_rate)
    generator = generator_for("cpu", "expert", seed, number)
    kept = [flat_parameters(network).cpu()]
    for step in range(1, settings.steps + 1):
        images, labels = references.mixed_batch(settings.batch_size, generator)
        engine.gradients(random_augment(images.to(device), generator), labels.to(device))
        optimiser.step()
        if step % settings.keep_every == 0:
            kept.append(flat_parameters(network).cpu())
        done, total = number * settings.steps + step, settings.count * settings.steps
        progress(Progress("Training experts (once)", done, total, "steps"))
    return torch.stack(kept)


def _read(path: Path) -> Tensor | None:
    """The way in that file, memory-mapped; None where there is nothing usable, which is then made anew."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)[_KEY]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
