"""From a trained generator to images: any number of any classes, the same ones whatever the batch size.

Image i of class c under seed s begins with noise drawn by a generator of its own, seeded with (s, c, i); the
samplers draw nothing more. So every image can be made again alone, in another batch or by another process.

On a CPU the parts of a batch are computed side by side, one a core, which is faster than all cores on the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddkit.data.images import to_uint8
from ddkit.errors import ComputeError, UsageError
from ddkit.generator.autoencoder import decode, images_at_once
from ddkit.generator.compiling import compiled_for_inference
from ddkit.generator.model_folder import Model
from ddkit.generator.networks import null_class, predict
from ddkit.generator.objective import TIME_SCALE
from ddkit.generator.samplers import linear_plan, make_scheduler
from ddkit.runtime.device import shortage_explained
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.runtime.seeds import generator_for
from ddkit.runtime.threads import cores_for, side_by_side

_PART = 32  # images that a core computes together; more are no faster


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled.

    guidance: w of classifier-free guidance, null + w * (class - null); 1 is none (Ho & Salimans 2022, arXiv 2207.12598).
        The default is what a network learned most from, of ten images a class of CIFAR-100.
    guidance_interval: the times, 0 (clean) to 1 (noise), in which guidance acts (Kynkaanniemi et al. 2024,
        arXiv 2404.07724).
    compile: with torch.compile; pays from some thousands of images on.
    """

    sampler: str = "dpm++"
    steps: int = 20
    guidance: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    batch_size: int = 256
    precision: str = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= TIME_SCALE:
            raise UsageError(f"Sampling takes 1 to {TIME_SCALE} steps, not {self.steps}.")
        if self.batch_size < 1:
            raise UsageError(f"A batch needs at least one image, not {self.batch_size}.")
        if not 0 <= self.guidance < math.inf:
            raise UsageError(f"Guidance is a number from 0 on, not {self.guidance}.")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise UsageError(f"A guidance interval lies within 0 and 1, got {low} to {high}.")
        if self.precision not in ("float32", "bfloat16"):
            raise UsageError(f"Sampling knows float32 and bfloat16, not '{self.precision}'.")


@dataclass(frozen=True)
class Samples:
    """Some of the images asked for, in the order asked. images: (n, 3, S, S) uint8. labels: (n,) int64; both on the CPU."""

    images: Tensor
    labels: Tensor


class Sampler:
    """A model made ready to sample on one device. Call it with labels and indices."""

    def __init__(self, model: Model, config: SamplingSettings, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self.facts = model.facts
        self._latent_shape = model.latent_shape
        model = model.to(self.device)
        self._guided = GuidedDenoiser(model.denoiser)
        self._decoder = Decoder(model)
        self._decoded_at_once = images_at_once(model.autoencoder, self._latent_shape[1])
        self._null_class = null_class(model.denoiser)
        self._workers = cores_for(self.device)
        self._part = config.batch_size
        if self.device.type == "cpu":
            self._part = min(_PART, -(-config.batch_size // self._workers))
        if config.compile:
            self._guided = compiled_for_inference(self._guided, self.device)
            self._decoder = compiled_for_inference(self._decoder, self.device)
        self._compiling = config.compile  # until the first part was made
        self._plan = linear_plan(make_scheduler(config.sampler, model.facts.prediction), config.steps)

    def __call__(self, labels: Tensor, indices: Tensor) -> Samples:
        """labels, indices: (n,) int64, which image of which class. Returns them in that order.

        Raises UsageError for labels that the model lacks, ComputeError where memory is short.
        """
        self._check(labels)
        size = self.facts.image_size
        images = torch.empty(len(labels), 3, size, size, dtype=torch.uint8)
        for start in range(0, len(labels), self.config.batch_size):
            part = slice(start, start + self.config.batch_size)
            images[part] = self.from_noise(self._noise(labels[part], indices[part]), labels[part])
        return Samples(images, labels)

    def from_noise(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Images of noise of one's own: (n, C, s, s) standard normal, (n,) -> (n, 3, S, S) uint8 on the CPU.

        n is at most the batch size. Raises ComputeError where memory is short.
        """
        parts = list(zip(noise.split(self._part), labels.split(self._part), strict=True))
        with shortage_explained(self._shortage):
            # What compiles, compiles once; the parts after the first find it done.
            alone = 1 if self._compiling else 0
            images = [
                *side_by_side(self._images, parts[:alone], self._workers),
                *side_by_side(self._images, parts[alone:], self._workers),
            ]
        self._compiling = False
        return torch.cat(images)

    def _shortage(self) -> ComputeError:
        size = self.config.batch_size
        return ComputeError(f"Memory is short for batches of {size} images.", f"Try --batch-size {max(1, size // 2)}.")

    @torch.inference_mode()
    def _images(self, part: tuple[Tensor, Tensor]) -> Tensor:
        """(n, 3, S, S) uint8 on the CPU of a part's noise and labels, which are no more than fit one part."""
        noise, labels = part
        count = len(labels)
        # What is compiled is compiled for one shape.
        fillers = self._part - count if self.config.compile else 0
        noise = torch.cat([noise, noise[:1].expand(fillers, -1, -1, -1)]).to(self.device)
        labels = torch.cat([labels, labels[:1].expand(fillers)]).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            latents = self._latents(noise, labels)
            return torch.cat([to_uint8(self._decoder(some)).cpu() for some in latents.split(self._decoded_at_once)])[:count]

    def _latents(self, noise: Tensor, labels: Tensor) -> Tensor:
        """The sampler's loop: clean latents, scaled, from noise, both (n, C, s, s) float32."""
        known = noise.new_empty(self._plan.steps + 1, *noise.shape)  # the noise and the outputs so far
        known[0] = noise
        inputs, final = self._plan.inputs.to(noise), self._plan.final.to(noise)
        for i, time in enumerate(self._plan.times.tolist()):
            known[i + 1] = self._output(self._sum(inputs[i, : i + 1], known[: i + 1]), time, labels)
        return self._sum(final, known)

    def _sum(self, coefficients: Tensor, known: Tensor) -> Tensor:
        """The combination of (k, n, C, s, s) by (k,) coefficients, in float32 whatever the networks compute in.

        Coefficients can be a hundred times as large as what comes out.
        """
        with torch.autocast(self.device.type, enabled=False):
            return torch.tensordot(coefficients, known, dims=1)

    def _output(self, noisy: Tensor, time: float, labels: Tensor) -> Tensor:
        low, high = self.config.guidance_interval
        guidance = self.config.guidance
        if guidance == 1 or not low <= time / TIME_SCALE <= high:
            return self._guided(noisy, noisy.new_full((len(noisy),), time), labels)
        both = torch.cat([labels, torch.full_like(labels, self._null_class)])
        return self._guided(noisy, noisy.new_full((2 * len(noisy),), time), both, guidance)

    def _noise(self, labels: Tensor, indices: Tensor) -> Tensor:
        """(n, C, s, s) float32, always drawn on the CPU so that all devices begin with the same."""
        pairs = zip(labels.tolist(), indices.tolist(), strict=True)
        seed = self.config.seed
        return torch.stack(
            [torch.randn(self._latent_shape, generator=generator_for("cpu", "sample", seed, c, i)) for c, i in pairs]
        )

    def _check(self, labels: Tensor) -> None:
        classes = len(self.facts.class_names)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise UsageError(f"The model knows classes 0 to {classes - 1}, asked for {labels.min()} to {labels.max()}.")


class GuidedDenoiser(nn.Module):
    """The denoiser with classifier-free guidance, both its passes in one batch."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, noisy: Tensor, times: Tensor, labels: Tensor, guidance: float | None = None) -> Tensor:
        """noisy: (n, C, s, s). With guidance, times and labels are (2n,): the classes, then the null class."""
        if guidance is None:
            return predict(self.denoiser, noisy, times, labels).float()
        with_class, without = predict(self.denoiser, torch.cat([noisy, noisy]), times, labels).float().chunk(2)
        return torch.lerp(without, with_class, guidance)


class Decoder(nn.Module):
    """Scaled latents (n, C, s, s) to images (n, 3, S, S) in [0, 1]."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.autoencoder = model.autoencoder.to(memory_format=torch.channels_last)
        self.scale = float(model.autoencoder.config.scaling_factor)
        self.image_size = model.facts.image_size

    def forward(self, latents: Tensor) -> Tensor:
        latents = (latents / self.scale).contiguous(memory_format=torch.channels_last)
        return decode(self.autoencoder, latents, self.image_size).float() / 2 + 0.5


def class_ordered(images_per_class: int, num_classes: int, *, start: int = 0) -> tuple[Tensor, Tensor]:
    """Labels and indices of `images_per_class` images of every class, class by class: both (N,) int64."""
    labels = torch.arange(num_classes).repeat_interleave(images_per_class)
    indices = torch.arange(start, start + images_per_class).repeat(num_classes)
    return labels, indices


def sample(sampler: Sampler, labels: Tensor, indices: Tensor, *, progress: Listener = ignore) -> Iterator[Samples]:
    """Yield the images asked for, batch by batch, in order."""
    size = sampler.config.batch_size
    for start in range(0, len(labels), size):
        yield sampler(labels[start : start + size], indices[start : start + size])
        progress(Progress("Sampling", min(start + size, len(labels)), len(labels), "images"))


def sample_all(sampler: Sampler, labels: Tensor, indices: Tensor, *, progress: Listener = ignore) -> Tensor:
    """(N, 3, S, S) uint8: all the images asked for, in order."""
    return torch.cat([batch.images for batch in sample(sampler, labels, indices, progress=progress)])
