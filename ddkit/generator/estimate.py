"""What a training will cost, before it begins: parameters, memory and speed, found by trying for a few seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from ddkit.data.store import ImageSet
from ddkit.errors import ComputeError
from ddkit.generator.autoencoder import build_autoencoder
from ddkit.generator.difffit import count_parameters
from ddkit.generator.engine import Stage, cut, workers_for
from ddkit.generator.latents import LatentSet
from ddkit.generator.networks import build_denoiser
from ddkit.generator.presets import GeneratorConfig
from ddkit.generator.pretrained import Start
from ddkit.generator.stages import AutoencoderStage, DenoiserStage, MinimaxStage
from ddkit.threads import side_by_side

# Of what is trained: weights, gradients, two moments of AdamW, averaged weights; all float32. Cores that share a step
# have gradients of their own besides.
_COPIES_OF_PARAMETERS = 5
_BYTES_PER_VALUE = 4
_PROBE_BATCH = 4  # images, of which memory is measured
_RESERVE = 0.9  # of the free memory may be planned for


@dataclass(frozen=True)
class StageEstimate:
    """parameters: of the network, trainable or not. memory: bytes at the peak of a step, fixed_memory: those of them that
    do not depend on the batch. images_per_second: None where not measured.
    """

    stage: str
    parameters: int
    memory: int
    fixed_memory: int
    images_per_second: float | None
    steps: int
    batch_size: int

    @property
    def seconds(self) -> float | None:
        """Of all its steps at that speed."""
        if self.images_per_second is None:
            return None
        return self.steps * self.batch_size / self.images_per_second


@dataclass(frozen=True)
class Estimate:
    """The stages of a training, and the device's free memory in bytes."""

    stages: tuple[StageEstimate, ...]
    free_memory: int

    @property
    def memory(self) -> int:
        """Of the hungrier stage; they run one after the other."""
        return max(stage.memory for stage in self.stages)


def estimate(
    config: GeneratorConfig,
    image_size: int,
    num_classes: int,
    device: torch.device,
    *,
    seconds: float = 3.0,
    start: Start | None = None,
) -> Estimate:
    """Find out what training costs on that device.

    start: of fine-tuning, which has one stage alone.
    seconds: to measure each stage's speed for; 0 to find parameters and memory only.
    """
    stages = (_fine_tuning(config, start, num_classes),) if start else _stages(config, image_size, num_classes)
    estimates = tuple(_estimate_stage(stage, device, seconds) for stage in stages)
    return Estimate(estimates, free_memory(device))


def check_memory(
    config: GeneratorConfig, image_size: int, num_classes: int, device: torch.device, *, start: Start | None = None
) -> None:
    """Raise ComputeError, saying what would fit, where a training needs more memory than the device has free."""
    needed = estimate(config, image_size, num_classes, device, seconds=0, start=start)
    limit = _RESERVE * needed.free_memory
    if needed.memory <= limit:
        return
    *others, last = needed.stages
    # The option is of the last stage's batches alone.
    fitting = int((limit - last.fixed_memory) / ((last.memory - last.fixed_memory) / last.batch_size))
    would_help = fitting >= 1 and all(stage.memory <= limit for stage in others)
    remedy = f"--batch-size {fitting} would fit." if would_help else "Choose a smaller --preset."
    raise ComputeError(
        f"This training needs about {needed.memory / 2**30:.1f} GiB of memory; "
        f"{needed.free_memory / 2**30:.1f} GiB are free on {device}.",
        remedy,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _stages(config: GeneratorConfig, image_size: int, num_classes: int) -> tuple[Stage, ...]:
    """The stages over made-up data of the right shapes; an autoencoder that is there already has none."""
    count = max(config.autoencoder_optimiser.batch_size, config.denoiser_optimiser.batch_size, num_classes)
    labels = torch.arange(count) % num_classes
    names = tuple(map(str, range(num_classes)))
    images = ImageSet(torch.zeros(count, 3, image_size, image_size, dtype=torch.uint8), labels, names)
    shape = config.autoencoder.latent_shape(image_size)
    latents = LatentSet(torch.zeros(count, 1, *shape, dtype=torch.float16), labels, std=1.0)
    denoiser = DenoiserStage(config, build_denoiser(config.denoiser, shape, num_classes, seed=0), latents)
    if config.pretrained_autoencoder:
        return (denoiser,)
    autoencoder = build_autoencoder(config.autoencoder, image_size, seed=0)
    return AutoencoderStage(config, autoencoder, images), denoiser


def _fine_tuning(config: GeneratorConfig, start: Start, num_classes: int) -> Stage:
    """The same of fine-tuning. The network is the start's own, which stays as it is."""
    network = start.generator.denoiser
    count, side = max(config.denoiser_optimiser.batch_size, num_classes), network.config.sample_size
    made_up = torch.zeros(count, 1, network.config.in_channels, side, side, dtype=torch.float16)
    latents = LatentSet(made_up, torch.arange(count) % num_classes, std=1.0)
    return MinimaxStage(config, network, latents, num_classes)


def _estimate_stage(stage: Stage, device: torch.device, seconds: float) -> StageEstimate:
    stage.loss.to(device)
    counts = count_parameters(stage.network)
    batch = stage.draw(0, device)
    part = stage.optimiser.batch_size // stage.optimiser.accumulation
    per_image = _bytes_kept(stage.loss, batch) / min(_PROBE_BATCH, len(next(iter(batch.values()))))
    # Only now, as memories are allocated when a first batch shows how large latents are.
    workers = workers_for(stage, device)
    copies = _COPIES_OF_PARAMETERS - 1 + (workers if workers > 1 else 0)
    fixed = _BYTES_PER_VALUE * (counts.total + copies * counts.trainable)
    fixed += sum(buffer.nbytes for buffer in stage.loss.buffers())
    return StageEstimate(
        stage=stage.name,
        parameters=counts.total,
        memory=int(fixed + per_image * part),
        fixed_memory=fixed,
        images_per_second=_speed(stage.loss, batch, workers, seconds) if seconds > 0 else None,
        steps=stage.optimiser.steps,
        batch_size=stage.optimiser.batch_size,
    )


def _bytes_kept(loss: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """What a forward pass over a few images keeps for the backward pass, each storage counted once."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in loss.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    few = {name: values[:_PROBE_BATCH] for name, values in batch.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(**{name: values.clone() for name, values in few.items()})
    return sum(kept.values())


def _speed(loss: nn.Module, batch: Mapping[str, Tensor], workers: int, seconds: float) -> float:
    """Images per second of forward and backward passes, not compiled, shared by so many cores as in training."""
    size = len(next(iter(batch.values())))
    _pass(loss, batch, workers)
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        _pass(loss, batch, workers)
        images += size
    return images / (time.perf_counter() - began)


def _pass(loss: nn.Module, batch: Mapping[str, Tensor], workers: int) -> None:
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]

    def work(piece: Mapping[str, Tensor]) -> Tensor:
        value, *_ = loss(**piece)
        torch.autograd.grad(value, trained, allow_unused=True)
        return value

    for value in side_by_side(work, cut(batch, workers), workers):
        if value.is_cuda:
            torch.cuda.synchronize(value.device)
