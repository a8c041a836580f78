"""From a trained generator to images: any number of any classes, the same ones whatever the batch size.

Image i of class c under seed s begins with noise from a generator that is seeded with (s, c, i), and the samplers draw
nothing more. So every image can be made again alone, in another batch or by another process.

On a CPU each core computes a part of the batch, which is faster than all cores sharing every operation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor, nn

from ddkit.data.images import to_uint8
from ddkit.errors import ComputeError
from ddkit.generator.autoencoder import decode, images_at_once
from ddkit.generator.compiling import compiled_for_inference
from ddkit.generator.config import BATCH_ELSEWHERE, BATCH_ON_GPU, ObjectiveConfig, SamplingSettings
from ddkit.generator.influence import Influence
from ddkit.generator.linear_plan import weighted_sum
from ddkit.generator.model_facts import require_label_dropout
from ddkit.generator.model_folder import Model
from ddkit.generator.networks import null_class, predict
from ddkit.generator.objective import TIME_SCALE, Objective
from ddkit.generator.samplers import make_plan
from ddkit.runtime.device import has_bfloat16, is_out_of_memory, release_memory, shortage_explained, upload
from ddkit.runtime.seeds import generator_for
from ddkit.runtime.threads import cores_for, parallel_map

log = logging.getLogger(__name__)

_OTHERS = "Close other programs that use it, or choose another --device."
_PART = 32  # images that a core computes together; more are not faster
_INFLUENCE_GUIDED = (0.08, 0.4)  # from which to which share of the steps (IGD's code: steps 5 to 20 of 50)


def resolve_settings(settings: SamplingSettings, device: torch.device) -> SamplingSettings:
    """The settings with the batch size and the precision that "auto" means on that device."""
    size = settings.batch_size or (BATCH_ON_GPU if device.type == "cuda" else BATCH_ELSEWHERE)
    precision = settings.precision
    if precision == "auto":
        precision = "bfloat16" if has_bfloat16(device) else "float32"
    return replace(settings, batch_size=size, precision=precision)


class Sampler:
    """A model made ready to sample on one device.

    modes: (classes, k, C, s, s), the centers that mode guidance steers to, as `ddkit.generator.modes.find_modes` makes them.
    influence: what influence guidance raises, as `ddkit.generator.influence.find_influence` makes it.
    Raises UsageError for settings that the model cannot follow.
    """

    def __init__(
        self,
        model: Model,
        settings: SamplingSettings,
        device: torch.device | str = "cpu",
        *,
        modes: Tensor | None = None,
        influence: Influence | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.settings = resolve_settings(settings, self.device)
        self.facts = model.facts
        require_label_dropout(self.facts, self.settings.guidance)
        assert (self.settings.mode_guidance > 0) == (modes is not None)
        assert (self.settings.influence_guidance > 0) == (influence is not None)
        self._latent_shape = model.latent_shape
        self._null_class = null_class(model.denoiser)
        self._objective = Objective(ObjectiveConfig(model.facts.prediction))
        with shortage_explained(lambda: ComputeError(f"The generator does not fit into the memory of {device}.", _OTHERS)):
            model = model.to(self.device)
        self._workers = cores_for(self.device)
        self._part = self.settings.batch_size or 1
        if self.device.type == "cpu":
            self._part = min(_PART, -(-self._part // self._workers))
        # A part is decoded in pieces of one size, because each size is compiled and tuned separately.
        self._decoded_at_once = min(self._part, images_at_once(model.autoencoder, self._latent_shape[1]))
        self._part -= self._part % self._decoded_at_once
        self._differentiable = GuidedDenoiser(model.denoiser), Decoder(model)  # what is compiled for inference has no gradients
        self._guided: Callable[..., Tensor]
        self._decoder: Callable[..., Tensor]
        self._guided, self._decoder = self._differentiable
        if self.settings.compile:
            self._guided, self._decoder = (compiled_for_inference(each, self.device) for each in self._differentiable)
        self._compiling = self.settings.compile  # until the first part is made
        plan = make_plan(
            self.settings.sampler,
            model.facts.prediction,
            self.settings.steps,
            mode_guidance=self.settings.mode_guidance,
            shifts=influence is not None,
        )
        self._plan, self._times = plan, plan.times.tolist()
        self._inputs, self._final = plan.inputs.to(self.device), plan.final.to(self.device)
        self._modes, self._influence = modes, influence
        first, end = (round(share * len(self._times)) for share in _INFLUENCE_GUIDED)
        self._influenced = range(first, max(end, 1)) if influence else range(0)

    def images(self, labels: Tensor, indices: Tensor) -> Iterator[Tensor]:
        """Yield images in the order asked for, a batch at a time: (n, 3, S, S) uint8 on the CPU.

        labels, indices: (N,) int64, the class of each image and its number within the class. Raises ComputeError where
        memory is too little for one image.
        """
        size = self.settings.batch_size or 1
        batches = list(zip(labels.split(size), indices.split(size), strict=True)) if len(labels) else []
        with ThreadPoolExecutor(1, "ddkit-noise") as ahead:
            drawn = [ahead.submit(self.noise, *batch) for batch in batches[:1]]
            for following, (some, numbers) in zip([*batches[1:], None], batches, strict=False):
                noise = drawn.pop().result()
                if following is not None:  # drawn while this batch is computed
                    drawn.append(ahead.submit(self.noise, *following))
                yield self.from_noise(noise, some, numbers)

    def noise(self, labels: Tensor, indices: Tensor) -> Tensor:
        """(n, C, s, s) float32: the noise of each image, always drawn on the CPU so that all devices begin with the same."""
        pairs = zip(labels.tolist(), indices.tolist(), strict=True)
        seed = self.settings.seed
        return torch.stack(
            [torch.randn(self._latent_shape, generator=generator_for("cpu", "sample", seed, c, i)) for c, i in pairs]
        )

    def from_noise(self, noise: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """The images that given noise becomes: (n, C, s, s) standard normal, (n,) -> (n, 3, S, S) uint8 on the CPU.

        indices: (n,) numbers of the images within their classes, by which mode guidance chooses the mode.
        n is at most the batch size. Where memory runs out, fewer are computed at a time from then on; raises ComputeError
        where it is too little for one.
        """
        centers = noise.new_empty(len(noise), 0)
        if self._modes is not None:
            centers = self._modes[labels, indices % self._modes.shape[1]]
        while True:
            parts = list(zip(*(rows.split(self._part) for rows in (noise, labels, centers)), strict=True))
            try:
                images = list(parallel_map(self._sample_part, parts, self._workers, first_alone=self._compiling))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self._part == 1:
                    raise ComputeError("Out of memory while sampling one image at a time.", _OTHERS) from error
            else:
                self._compiling = False
                return torch.cat(images)
            # Outside the handler, so that the traceback does not hold on to the memory.
            self._part = max(1, self._part // 2)
            self._decoded_at_once = min(self._part, self._decoded_at_once)
            self._part -= self._part % self._decoded_at_once
            log.warning("Not enough memory: sampling %d images at a time from now on.", self._part)
            release_memory(self.device)

    @torch.no_grad()
    def _sample_part(self, part: tuple[Tensor, ...]) -> Tensor:
        """(n, 3, S, S) uint8 on the CPU from a part's noise, labels and centers."""
        count = len(part[0])
        # Compiled code is made for one size, so a short part is filled up.
        whole = self._part if self.settings.compile else count
        filled = [torch.cat([rows, rows[:1].expand(whole - count, *rows.shape[1:])]) for rows in part]
        noise, labels, centers = (upload(rows, self.device) for rows in filled)
        terms = noise.new_zeros(len(self._final), *noise.shape)  # as LinearPlan orders them
        terms[0] = noise
        first, per_step = 1, 1 + (self._influence is not None)
        if self._modes is not None:
            terms[1], first = centers, 2
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            for i, time in enumerate(self._times):
                known = first + per_step * i
                point = weighted_sum(self._inputs[i, :known], terms[:known])
                if i in self._influenced:
                    output, terms[known + 1] = self._influence_term(point, time, filled[1])
                else:
                    output = self._output(self._guided, point, time, labels)
                terms[known] = self._plan.term(i, point, output)
            latents = weighted_sum(self._final, terms)
            made = torch.cat([to_uint8(self._decoder(some)) for some in latents.split(self._decoded_at_once)])
        return made[:count].cpu()

    def _output(self, denoiser: Callable[..., Tensor], point: Tensor, time: float, labels: Tensor) -> Tensor:
        """(n, C, s, s): the denoiser's output, with classifier-free guidance where the settings want it."""
        count, (low, high) = len(point), self.settings.guidance_interval
        if self.settings.guidance == 1 or not low <= time / TIME_SCALE <= high:
            return denoiser(point, point.new_full((count,), time), labels)
        both = torch.cat([labels, torch.full_like(labels, self._null_class)])
        return denoiser(point, point.new_full((2 * count,), time), both, self.settings.guidance)

    def _influence_term(self, point: Tensor, time: float, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The denoiser's output, and the term that influence guidance adds after a step, both (n, C, s, s).

        The term is scale * |sigma_t * predicted noise| * g / |g|, where g is the gradient of the influence of the predicted
        clean image, through the classifier, the decoder and the denoiser, with respect to the point.
        Source: Chen et al. 2025 (IGD, ICLR 2025), equations 7 and 9. The authors' code makes the length relative to the noise
        as well, but by another constant, so its k is not this scale. labels: on the CPU.
        """
        assert self._influence is not None
        (denoiser, decoder), pieces = self._differentiable, self._decoded_at_once
        times = point.new_full((len(point),), time)
        slopes = []
        with torch.enable_grad():
            point.requires_grad_()
            output = self._output(denoiser, point, time, upload(labels, self.device))
            clean = self._objective.clean(point, output, times)
            # In pieces, as the feature maps of the decoder and of several networks take the most memory.
            for latents, of in zip(clean.detach().split(pieces), labels.split(pieces), strict=True):
                latents.requires_grad_()
                slopes += torch.autograd.grad(self._influence(decoder(latents), of).sum(), latents)
            (gradient,) = torch.autograd.grad(clean, point, torch.cat(slopes))
        point.requires_grad_(False)
        signal, _ = self._objective.levels(times, point)
        noise = (point - signal * clean.detach()).flatten(1).norm(dim=1)
        length = self.settings.influence_guidance * noise / gradient.flatten(1).norm(dim=1).clamp_min(1e-20)
        return output.detach(), length.view(-1, 1, 1, 1) * gradient


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


def class_ordered(images_per_class: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Labels and indices of `images_per_class` images of every class, class by class: both (N,) int64."""
    labels = torch.arange(num_classes).repeat_interleave(images_per_class)
    return labels, torch.arange(images_per_class).repeat(num_classes)
