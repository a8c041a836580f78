"""The costs of a training before it begins: parameters, memory and speed, measured for a few seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddkit.data.store import ImageSet
from ddkit.errors import ComputeError
from ddkit.generator.autoencoder import build_autoencoder
from ddkit.generator.config import GeneratorConfig
from ddkit.generator.difffit import count_parameters
from ddkit.generator.networks import build_denoiser
from ddkit.generator.presets import GPU_PRESETS, preset
from ddkit.generator.pretrained import Start
from ddkit.generator.training.latents import LatentSet
from ddkit.generator.training.stages import AutoencoderStage, DenoiserStage, MinimaxStage, Stage
from ddkit.generator.training.train import AUTOENCODER_SHARE
from ddkit.generator.training.trainer import cut, workers_for
from ddkit.runtime.device import free_memory, larger_gpu, own_device, shortage_explained
from ddkit.runtime.threads import parallel_map

# For each trained parameter: weight, gradient, two moments of AdamW, averaged weight, and the temporary copy in which
# averaging subtracts; all float32. Cores that share a step have their own gradients as well.
_COPIES_OF_PARAMETERS = 6
_BYTES_PER_VALUE = 4
_PROBE_BATCH = 2  # images for which memory is measured
_RESERVE = 0.9  # of the free memory may be planned for
_SMALLER = "Choose a smaller --preset, or another --device."
_PASSES = 4  # at least as many are timed if images are slow


@dataclass(frozen=True)
class StageEstimate:
    """The costs of a stage.

    parameters: of the network, trainable or not. at_once: images that a process computes with at a time.
    memory: bytes that a process needs at the peak of a step; fixed_memory: those that do not depend on `at_once`.
    images_per_second: of all processes together; None if it was not measured or the stage does not fit. steps: at most.
    """

    stage: str
    parameters: int
    at_once: int
    memory: int
    fixed_memory: int
    images_per_second: float | None
    steps: int
    batch_size: int

    def seconds_for(self, steps: int | None) -> float | None:
        """Seconds for that many steps at that speed; None if either is unknown."""
        return steps * self.batch_size / self.images_per_second if steps and self.images_per_second else None

    def fitting(self, memory: float) -> int:
        """The number of images at a time that fit into that many bytes."""
        per_image = (self.memory - self.fixed_memory) / self.at_once
        return max(0, int((memory - self.fixed_memory) / per_image))


@dataclass(frozen=True)
class Estimate:
    """The stages of a training, and the device's free memory in bytes."""

    stages: tuple[StageEstimate, ...]
    free_memory: int

    @property
    def memory(self) -> int:
        """Bytes of the stage that needs more; they run one after the other."""
        return max(stage.memory for stage in self.stages)

    @property
    def limit(self) -> float:
        """Bytes of memory that may be planned for."""
        return _RESERVE * self.free_memory

    @property
    def fits(self) -> bool:
        return self.memory <= self.limit

    def steps_within(self, seconds: float) -> tuple[int | None, ...]:
        """The steps of each stage in a training of that many seconds; None if the speed is not known.

        The autoencoder comes first, with its share of the time and at most its own number of steps.
        """
        found: list[int | None] = []
        left = seconds
        for stage in self.stages:
            first = stage is not self.stages[-1]
            if stage.images_per_second is None:
                found.append(None)
                continue
            per_step = stage.batch_size / stage.images_per_second
            steps = int((AUTOENCODER_SHARE * seconds if first else left) / per_step)
            steps = max(1, min(steps, stage.steps) if first else steps)
            left -= steps * per_step
            found.append(steps)
        return tuple(found)

    def least_seconds(self, steps: int) -> float:
        """The seconds of a training in which each stage takes that many steps, or all of its own if these are fewer.

        Stages of unknown speed count nothing.
        """
        first, last = AUTOENCODER_SHARE, 1 - AUTOENCODER_SHARE
        shares = (first, last) if len(self.stages) > 1 else (1.0,)
        needed = (stage.seconds_for(min(steps, stage.steps)) or 0.0 for stage in self.stages)
        return max(seconds / share for seconds, share in zip(needed, shares, strict=True))


def estimate(
    config: GeneratorConfig,
    image_size: int,
    num_classes: int,
    device: torch.device,
    *,
    processes: int = 1,
    seconds: float = 1.0,
    start: Start | None = None,
) -> Estimate:
    """Measure the costs of a training on that device.

    processes: how many share each batch, on a device each. start: the start of a fine-tuning, which has only one stage.
    seconds: how long to measure each stage's speed, about; 0 finds only parameters and memory. A stage that does not fit
    into memory is not run.
    """
    device, free = own_device(device), free_memory(device)
    with shortage_explained(lambda: ComputeError(f"Out of memory on {device}, even for measuring the costs.", _SMALLER)):
        stages = _stages(config, image_size, num_classes, start)
        probes = (_Probe(stage, device, config.precision, processes) for stage in stages)
        return Estimate(tuple(probe.estimate(seconds, _RESERVE * free) for probe in probes), free)


def shortage(
    needed: Estimate,
    config: GeneratorConfig,
    image_size: int,
    num_classes: int,
    device: torch.device,
    *,
    processes: int = 1,
) -> ComputeError:
    """The error for a training that does not fit, with what would."""
    *others, last = needed.stages
    fitting = 0 if any(stage.memory > needed.limit for stage in others) else last.fitting(needed.limit)
    if fitting and config.minimax is not None:  # its criteria compare within a part, so more parts are another training
        remedy = f"--batch-size {fitting * processes * config.denoiser_optimizer.accumulation} would fit."
    elif fitting:
        share = last.batch_size // processes
        parts = next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= fitting)
        remedy = f"--accumulation {parts} would fit."
    elif config.minimax is not None:
        remedy = "Leave out --full, start from a smaller generator with --init, or use another --device."
    else:
        remedy = "No smaller preset fits: close other programs, or use another --device."
        for name in GPU_PRESETS:
            smaller = preset(name).config(image_size)
            if smaller.denoiser.depth * smaller.denoiser.hidden_size**2 < (
                config.denoiser.depth * config.denoiser.hidden_size**2
            ):
                costs = estimate(smaller, image_size, num_classes, device, processes=processes, seconds=0)
                if costs.memory <= needed.limit:
                    remedy = f"--preset {name} would fit."
                    break
    return ComputeError(
        f"This training needs about {needed.memory / 2**30:.1f} GiB of memory, but {own_device(device)} has "
        f"{needed.free_memory / 2**30:.1f} GiB free.",
        remedy + larger_gpu(device, needed.memory),
    )


def _stages(config: GeneratorConfig, image_size: int, num_classes: int, start: Start | None) -> tuple[Stage, ...]:
    """The stages over made-up data of the right shapes. A pretrained autoencoder has no stage.

    Fine-tuning has one stage, whose network is the start's own and does not change.
    """
    labels = torch.arange(num_classes)  # one image each, drawn as often as batches need
    if start is not None and config.minimax is not None:
        network = start.generator.denoiser
        side = network.config.sample_size
        made_up = torch.zeros(num_classes, 1, network.config.in_channels, side, side, dtype=torch.float16)
        return (MinimaxStage(config, config.minimax, network, LatentSet(made_up, labels, std=1.0), num_classes),)
    names = tuple(map(str, range(num_classes)))
    images = ImageSet(torch.zeros(num_classes, 3, image_size, image_size, dtype=torch.uint8), labels, names)
    shape = config.autoencoder.latent_shape(image_size)
    latents = LatentSet(torch.zeros(num_classes, 1, *shape, dtype=torch.float16), labels, std=1.0)
    denoiser = DenoiserStage(config, build_denoiser(config.denoiser, shape, num_classes, seed=0), latents)
    if config.pretrained_autoencoder:
        return (denoiser,)
    autoencoder = build_autoencoder(config.autoencoder, image_size, seed=0)
    return AutoencoderStage(config, autoencoder, images), denoiser


class _Probe:
    """A stage on its device, run on one batch in the precision of its training."""

    def __init__(self, stage: Stage, device: torch.device, precision: str, processes: int) -> None:
        self._stage, self._device, self._precision, self._processes = stage, device, precision, processes
        stage.loss.to(device)
        self._batch = stage.draw(0, device)

    def estimate(self, seconds: float, limit: float) -> StageEstimate:
        """seconds: how long to measure the speed; 0 for not at all. limit: bytes of memory that measuring may take."""
        stage, optimizer = self._stage, self._stage.optimizer
        at_once = max(1, optimizer.batch_size // (optimizer.accumulation * self._processes))
        counts = count_parameters(stage.network)
        # Bytes that a forward pass keeps for the backward pass: of each image, and once, such as weights in half precision.
        some = min(_PROBE_BATCH, len(next(iter(self._batch.values()))))
        of_some = self._bytes_kept_of(some)
        per_image: float = of_some if some == 1 else (of_some - self._bytes_kept_of(1)) / (some - 1)
        kept_once = max(0, round(of_some - some * per_image))
        workers = workers_for(stage, self._device, self._processes)
        # Processes that share a batch hold the gradients a second time, in the buckets that are sent around.
        copies = _COPIES_OF_PARAMETERS - 1 + (workers if workers > 1 else 0) + (self._processes > 1)
        fixed = _BYTES_PER_VALUE * (counts.total + copies * counts.trainable)
        # The batch above has allocated the minimax memories, which are buffers.
        fixed += kept_once + sum(buffer.nbytes for buffer in stage.loss.buffers())
        found = StageEstimate(
            stage=stage.name,
            parameters=counts.total,
            at_once=at_once,
            memory=int(fixed + per_image * at_once),
            fixed_memory=fixed,
            images_per_second=None,
            steps=optimizer.steps,
            batch_size=optimizer.batch_size,
        )
        most = min(at_once, found.fitting(limit)) // workers * workers
        if seconds == 0 or most == 0:
            return found
        return replace(found, images_per_second=self._processes * self._speed(workers, seconds, most))

    def _bytes_kept_of(self, count: int) -> int:
        """Bytes that a forward pass over so many images keeps, each storage counted once."""
        kept: dict[int, int] = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in self._stage.loss.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        few = {name: values[:count].clone() for name, values in self._batch.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self._loss(few)
        return sum(kept.values())

    def _speed(self, workers: int, seconds: float, most: int) -> float:
        """Images per second of forward and backward passes, not compiled, shared by as many cores as in training.

        most: images of a pass, as in training; on a CPU, fewer are measured if they take long enough.
        """
        # A GPU prepares for each size anew, which takes as long as many images do.
        count = most if self._device.type == "cuda" else workers
        self._seconds(count, workers)  # the first pass is slower
        while self._seconds(count, workers) <= seconds / _PASSES and count < most:
            count = min(2 * count, most)
        began, images = time.perf_counter(), 0
        while images == 0 or time.perf_counter() - began < seconds:
            self._seconds(count, workers)
            images += count
        return images / (time.perf_counter() - began)

    def _seconds(self, count: int, workers: int) -> float:
        trained = [parameter for parameter in self._stage.loss.parameters() if parameter.requires_grad]

        def work(piece: Mapping[str, Tensor]) -> None:
            torch.autograd.grad(self._loss(piece), trained, allow_unused=True)

        began = time.perf_counter()
        some = {name: values[:count] for name, values in self._batch.items()}
        for _ in parallel_map(work, cut(some, workers), workers):
            pass
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - began

    def _loss(self, part: Mapping[str, Tensor]) -> Tensor:
        lower = self._precision != "float32"
        with torch.autocast(self._device.type, getattr(torch, self._precision), enabled=lower):
            loss, *_ = self._stage.loss(**part)
        return loss
