"""Expert trajectories: parameters of networks saved while they train on real images, for trajectory matching."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import torch
from torch import Tensor

from ddkit.distill.holdout import TrainHoldout
from ddkit.distill.settings import ExpertSettings
from ddkit.network.augment import random_augment
from ddkit.network.autotune import choose_plan
from ddkit.network.engine import build_engine
from ddkit.network.parameters import flat_parameters, random_network
from ddkit.runtime.cached import cache_key, cached_tensors
from ddkit.runtime.files import cache_folder
from ddkit.runtime.interrupt import StopRequest
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.runtime.seeds import generator_for

_CACHE_FOLDER = "_experts"  # no dataset can have this name
_KEY = "parameters"
_VERSION = 2  # counts changes to how an expert is trained


class _StoppedError(Exception):
    """The training was asked to stop."""


class Experts:
    """Trajectories, kept in the cache for the next refinement of the same dataset.

    They belong to the real images, the seed and the settings of the training. A trajectory takes some 90 to 330 MB and is
    written when it is finished, so a kill costs one.
    dataset_sha256: hash of the real training images; empty for experts that are not to be kept.
    precision: of the training, "float32" or "bfloat16".
    """

    def __init__(
        self,
        holdout: TrainHoldout,
        dataset_sha256: str,
        settings: ExpertSettings,
        *,
        seed: int,
        precision: str,
        device: torch.device,
        progress: Listener = ignore,
    ) -> None:
        self._holdout, self._settings, self._seed = holdout, settings, seed
        self._precision, self._device, self._progress = precision, device, progress
        self._kept = bool(dataset_sha256)
        training = (settings.steps, settings.batch_size, settings.learning_rate, settings.keep_every)
        made_of = (_VERSION, dataset_sha256, holdout.held_out_share, seed, precision, training)
        self._folder = cache_folder() / _CACHE_FOLDER / f"{holdout.spec.name}-{cache_key(made_of)}"
        self._trajectories: list[Tensor] = []

    @property
    def ready(self) -> bool:
        return len(self._trajectories) == self._settings.count

    @property
    def missing_steps(self) -> int:
        """Steps of the training of all experts that the cache does not hold."""
        return self._settings.steps * sum(not self._path(number).exists() for number in range(self._settings.count))

    def prepare(self, stop: StopRequest | None = None) -> None:
        """Train the experts that the cache does not hold. Returns early when asked to stop."""
        with contextlib.suppress(_StoppedError):
            for number in range(len(self._trajectories), self._settings.count):
                train = functools.partial(self._train, number, stop)
                what = f"expert {number + 1} of {self._settings.count}"
                found = cached_tensors(self._path(number), (_KEY,), what, train) if self._kept else train()
                self._trajectories.append(found[_KEY])

    def sample_segment(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two checkpoints of one expert, `span` steps apart: parameters as (P,) float32 on the CPU."""
        trajectory = self._trajectories[int(torch.randint(len(self._trajectories), (1,), generator=generator))]
        stride = self._settings.span // self._settings.keep_every
        begin = int(torch.randint(len(trajectory) - stride, (1,), generator=generator))
        return trajectory[begin].clone(), trajectory[begin + stride].clone()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:03d}.safetensors"

    def _train(self, number: int, stop: StopRequest | None) -> dict[str, Tensor]:
        """The trajectory, (steps / keep_every + 1, P) float32 on the CPU: the start, then every checkpoint."""
        settings, spec = self._settings, self._holdout.spec
        network = random_network(spec, "expert", self._seed, number).to(self._device)
        engine = build_engine(network, choose_plan(network, self._precision, settings.batch_size))
        optimizer = torch.optim.SGD(network.parameters(), settings.learning_rate)
        generator = generator_for("cpu", "expert", self._seed, number)
        kept = [flat_parameters(network).cpu()]
        for step in range(1, settings.steps + 1):
            images, labels = self._holdout.random_batch(settings.batch_size, generator)
            engine.gradients(random_augment(images, generator), labels)
            optimizer.step()
            if step % settings.keep_every == 0:
                kept.append(flat_parameters(network).cpu())
            done, total = number * settings.steps + step, settings.count * settings.steps
            self._progress(Progress("Training experts (once)", done, total, "steps"))
            if stop and step < settings.steps:
                raise _StoppedError
        return {_KEY: torch.stack(kept)}
