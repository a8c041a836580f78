"""What a training will cost, before it begins: parameters, memory and speed, found by trying for a few seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddkit.data.store import ImageSet
from ddkit.errors import ComputeError
from ddkit.generator.autoencoder import build_autoencoder
from ddkit.generator.difffit import count_parameters
from ddkit.generator.networks import build_denoiser
from ddkit.generator.presets import BY_SIZE, PRESETS, GeneratorConfig
from ddkit.generator.pretrained import Start
from ddkit.generator.training.latents import LatentSet
from ddkit.generator.training.stages import AutoencoderStage, DenoiserStage, MinimaxStage
from ddkit.generator.training.train import AUTOENCODER_SHARE
from ddkit.generator.training.trainer import Stage, cut, workers_for
from ddkit.runtime.device import free_memory, own_device, shortage_explained
from ddkit.runtime.threads import side_by_side

# Of what is trained: weights, gradients, two moments of AdamW, averaged weights; all float32. Cores that share a step
# have gradients of their own besides.
_COPIES_OF_PARAMETERS = 5
_BYTES_PER_VALUE = 4
_PROBE_BATCH = 4  # images, of which memory is measured
_RESERVE = 0.9  # of the free memory may be planned for
_SMALLER = "Choose a smaller --preset, or another --device."
_PASSES = 4  # that speed is measured over, at least, where images are slow


@dataclass(frozen=True)
class StageEstimate:
    """What a stage costs.

    parameters: of the network, trainable or not. at_once: images that a process computes with at a time.
    memory: bytes of a process at the peak of a step; fixed_memory: those of them that do not depend on `at_once`.
    images_per_second: of all processes; None where it was not measured, or nothing fits that could be. steps: at most.
    """

    stage: str
    parameters: int
    at_once: int
    memory: int
    fixed_memory: int
    images_per_second: float | None
    steps: int
    batch_size: int

    @property
    def seconds(self) -> float | None:
        """Of all its steps at that speed."""
        return None if self.images_per_second is None else self.steps * self.seconds_a_step

    @property
    def seconds_a_step(self) -> float:
        """Where the speed is known."""
        return self.batch_size / self.images_per_second

    def fitting(self, memory: float) -> int:
        """How many images at a time fit into so many bytes."""
        per_image = (self.memory - self.fixed_memory) / self.at_once
        return max(0, int((memory - self.fixed_memory) / per_image))


@dataclass(frozen=True)
class Estimate:
    """The stages of a training, and the device's free memory in bytes."""

    stages: tuple[StageEstimate, ...]
    free_memory: int

    @property
    def memory(self) -> int:
        """Of the hungrier stage; they run one after the other."""
        return max(stage.memory for stage in self.stages)

    @property
    def limit(self) -> float:
        """Bytes of memory that may be planned for."""
        return _RESERVE * self.free_memory

    @property
    def fits(self) -> bool:
        return self.memory <= self.limit

    def steps_within(self, seconds: float) -> tuple[int | None, ...]:
        """How many steps of each stage a training of so many seconds has; None where the speed is not known.

        Of a training from nothing the autoencoder comes first, with its share of the time and no more steps than its own.
        """
        found, left = [], seconds
        for stage in self.stages:
            first = stage is not self.stages[-1]
            if stage.images_per_second is None:
                found.append(None)
                continue
            steps = int((AUTOENCODER_SHARE * seconds if first else left) / stage.seconds_a_step)
            found.append(max(1, min(steps, stage.steps) if first else steps))
            left -= found[-1] * stage.seconds_a_step
        return tuple(found)


def estimate(
    config: GeneratorConfig,
    image_size: int,
    num_classes: int,
    device: torch.device,
    *,
    processes: int = 1,
    seconds: float = 3.0,
    start: Start | None = None,
) -> Estimate:
    """Find out what training costs on that device.

    processes: that share each batch, on a device each. start: of fine-tuning, which has one stage alone.
    seconds: to measure each stage's speed for, or a little longer; 0 to find parameters and memory only. What does not fit
    into memory is not tried.
    """
    device, free = own_device(device), free_memory(device)
    with shortage_explained(lambda: ComputeError(f"Memory is short on {device}, even for trying what is asked for.", _SMALLER)):
        stages = (_fine_tuning(config, start, num_classes),) if start else _stages(config, image_size, num_classes)
        probes = (_Probe(stage, device, config.precision, processes) for stage in stages)
        return Estimate(tuple(probe.estimate(seconds, _RESERVE * free) for probe in probes), free)


def check_memory(
    config: GeneratorConfig,
    image_size: int,
    num_classes: int,
    device: torch.device,
    *,
    processes: int = 1,
    start: Start | None = None,
) -> None:
    """Raise ComputeError, saying what would fit, where a training needs more memory than the device has free."""
    needed = estimate(config, image_size, num_classes, device, processes=processes, seconds=0, start=start)
    if not needed.fits:
        raise shortage(needed, config, image_size, num_classes, device, processes=processes)


def shortage(
    needed: Estimate,
    config: GeneratorConfig,
    image_size: int,
    num_classes: int,
    device: torch.device,
    *,
    processes: int = 1,
) -> ComputeError:
    """What there is to say of a training that does not fit, and what would."""
    return ComputeError(
        f"This training needs about {needed.memory / 2**30:.1f} GiB of memory; "
        f"{needed.free_memory / 2**30:.1f} GiB are free on {device}.",
        _in_parts(needed, config, processes) or _something_smaller(needed, config, image_size, num_classes, device, processes),
    )


def _in_parts(needed: Estimate, config: GeneratorConfig, processes: int) -> str:
    """How the last stage's batches would fit, as the options are of those alone; "" where they cannot."""
    *others, last = needed.stages
    fitting = last.fitting(needed.limit)
    if not fitting or any(stage.memory > needed.limit for stage in others):
        return ""
    if config.minimax is not None:  # whose criteria are of a part each, so that parts are another training
        return f"--batch-size {fitting * processes * config.denoiser_optimizer.accumulation} would fit."
    share = last.batch_size // processes
    parts = next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= fitting)
    return f"--accumulation {parts} would fit."


def _something_smaller(
    needed: Estimate,
    config: GeneratorConfig,
    image_size: int,
    num_classes: int,
    device: torch.device,
    processes: int,
) -> str:
    if config.minimax is not None:
        return "Leave --full away, start from a smaller generator with --init, or use another --device."
    for name in reversed(BY_SIZE):
        smaller = PRESETS[name].config(image_size)
        if _size(smaller) < _size(config):
            found = estimate(smaller, image_size, num_classes, device, processes=processes, seconds=0)
            if found.memory <= needed.limit:
                return f"--preset {name} would fit, with its own batches."
    return "No smaller preset fits: close other programs, or use another --device."


def _size(config: GeneratorConfig) -> int:
    """Grows with the denoiser's parameters."""
    return config.denoiser.depth * config.denoiser.hidden_size**2


def _stages(config: GeneratorConfig, image_size: int, num_classes: int) -> tuple[Stage, ...]:
    """The stages over made-up data of the right shapes; an autoencoder that is there already has none."""
    labels = torch.arange(num_classes)  # an image of each, drawn as often as batches want
    names = tuple(map(str, range(num_classes)))
    images = ImageSet(torch.zeros(num_classes, 3, image_size, image_size, dtype=torch.uint8), labels, names)
    shape = config.autoencoder.latent_shape(image_size)
    latents = LatentSet(torch.zeros(num_classes, 1, *shape, dtype=torch.float16), labels, std=1.0)
    denoiser = DenoiserStage(config, build_denoiser(config.denoiser, shape, num_classes, seed=0), latents)
    if config.pretrained_autoencoder:
        return (denoiser,)
    autoencoder = build_autoencoder(config.autoencoder, image_size, seed=0)
    return AutoencoderStage(config, autoencoder, images), denoiser


def _fine_tuning(config: GeneratorConfig, start: Start, num_classes: int) -> Stage:
    """The same of fine-tuning. The network is the start's own, which stays as it is."""
    network = start.generator.denoiser
    side = network.config.sample_size
    made_up = torch.zeros(num_classes, 1, network.config.in_channels, side, side, dtype=torch.float16)
    latents = LatentSet(made_up, torch.arange(num_classes), std=1.0)
    return MinimaxStage(config, network, latents, num_classes)


class _Probe:
    """A stage on its device, tried on one batch in the precision it is to be trained in."""

    def __init__(self, stage: Stage, device: torch.device, precision: str, processes: int) -> None:
        self._stage, self._device, self._precision, self._processes = stage, device, precision, processes
        stage.loss.to(device)
        self._batch = stage.draw(0, device)

    def estimate(self, seconds: float, limit: float) -> StageEstimate:
        """seconds: to measure speed for; 0 not to. limit: bytes of memory that measuring may take."""
        stage, optimizer = self._stage, self._stage.optimizer
        at_once = max(1, optimizer.batch_size // (optimizer.accumulation * self._processes))
        counts = count_parameters(stage.network)
        per_image, kept_once = self._bytes_kept()
        # Only now, as memories are allocated when a first batch shows how large latents are.
        workers = workers_for(stage, self._device, self._processes)
        # Processes that share a batch have the gradients once more, in the buckets that are sent around.
        copies = _COPIES_OF_PARAMETERS - 1 + (workers if workers > 1 else 0) + (self._processes > 1)
        fixed = _BYTES_PER_VALUE * (counts.total + copies * counts.trainable)
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

    def _bytes_kept(self) -> tuple[float, int]:
        """What a forward pass keeps for the backward pass: of each image, and whatever their number, such as weights in
        half precision."""
        some = min(_PROBE_BATCH, len(next(iter(self._batch.values()))))
        of_some = self._bytes_kept_of(some)
        if some == 1:
            return of_some, 0
        per_image = (of_some - self._bytes_kept_of(1)) / (some - 1)
        return per_image, max(0, round(of_some - some * per_image))

    def _bytes_kept_of(self, count: int) -> int:
        """What a forward pass over so many images keeps, each storage counted once."""
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
        """Images per second of forward and backward passes, not compiled, shared by so many cores as in training.

        most: images of a pass, as in training, unless fewer already take a good part of the time.
        """
        count = workers
        self._seconds(count, workers)  # the first is slow for reasons of its own
        while self._seconds(count, workers) <= seconds / _PASSES and count < most:
            count = min(2 * count, most)
        began, images = time.perf_counter(), 0
        while images == 0 or time.perf_counter() - began < seconds:
            self._seconds(count, workers)
            images += count
        return images / (time.perf_counter() - began)

    def _seconds(self, count: int, workers: int) -> float:
        """That one pass over so many images takes."""
        trained = [parameter for parameter in self._stage.loss.parameters() if parameter.requires_grad]

        def work(piece: Mapping[str, Tensor]) -> None:
            torch.autograd.grad(self._loss(piece), trained, allow_unused=True)

        began = time.perf_counter()
        some = {name: values[:count] for name, values in self._batch.items()}
        for _ in side_by_side(work, cut(some, workers), workers):
            pass
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - began

    def _loss(self, part: Mapping[str, Tensor]) -> Tensor:
        lower = self._precision != "float32"
        with torch.autocast(self._device.type, getattr(torch, self._precision), enabled=lower):
            loss, *_ = self._stage.loss(**part)
        return loss
