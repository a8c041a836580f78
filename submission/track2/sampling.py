"""A model folder made ready to sample: which image of which class in, pixels out.

Needs torch, diffusers and safetensors, and `denoiser.py` next to it if the model is a U-ViT.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
MODES_FILE = "modes.safetensors"
MODE_GUIDED = 0.5  # of the steps, from the first on


class Sampler:
    """The networks of a model folder on a device. Call it with classes and indices.

    folder: holds vae/, scheduler/ and transformer/, in diffusers' format, and for mode guidance modes.safetensors.
    entry: its entry.json, with the steps, the guidance and its interval, the mode guidance, and the precision.
    """

    def __init__(self, folder: Path, entry: Mapping[str, Any], device: str, seed: int) -> None:
        self._entry, self._seed = entry, seed
        self._device = torch.device(device)
        self._in_bfloat16 = computes_in_bfloat16(entry["precision"], self._device)
        self._denoiser = _load_denoiser(folder).to(self._device)
        self._autoencoder = _load(AutoencoderKL, folder / "vae").to(self._device, memory_format=torch.channels_last)
        self._modes = load_file(folder / MODES_FILE)["modes"] if entry["mode_guidance"] else None
        times, inputs, final = _plan(_load_scheduler(folder / "scheduler"), entry["steps"], entry["mode_guidance"])
        self._times, self._inputs, self._final = times.tolist(), inputs.to(self._device), final.to(self._device)
        config = self._denoiser.config
        self._latent_shape = (config.in_channels, config.sample_size, config.sample_size)

    @torch.inference_mode()
    def __call__(self, classes: Sequence[int], indices: Sequence[int]) -> Tensor:
        """Image `indices[i]` of class `classes[i]`, for all i: (n, 3, S, S) uint8 on the CPU.

        The same image for the same seed, class and index, in whatever batch.
        """
        noise = torch.stack([self._noise(c, i) for c, i in zip(classes, indices, strict=True)])
        given = [upload(noise, self._device)]
        if self._modes is not None:
            modes = torch.tensor(indices) % self._modes.shape[1]
            given.append(upload(self._modes[torch.tensor(classes), modes].float(), self._device))
        labels = upload(torch.tensor(classes), self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._in_bfloat16):
            pixels = self._decode(self._latents(given, labels))
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous()

    def _noise(self, class_label: int, index: int) -> Tensor:
        """(C, s, s), drawn on the CPU with a generator for this image alone, so that all devices begin with the same noise."""
        digest = hashlib.blake2b(f"sample/{self._seed}/{class_label}/{index}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(self._latent_shape, generator=generator)

    def _latents(self, given: list[Tensor], labels: Tensor) -> Tensor:
        """From the noise, and with mode guidance the modes, to clean latents, all (n, C, s, s), along the plan."""
        known = given[0].new_empty(len(self._final), *given[0].shape)  # what is given, and the outputs so far
        known[: len(given)] = torch.stack(given)
        for count, (inputs, time) in enumerate(zip(self._inputs, self._times, strict=True), len(given)):
            known[count] = self._guided(self._sum(inputs[:count], known[:count]), time, labels)
        return self._sum(self._final, known)

    def _sum(self, coefficients: Tensor, known: Tensor) -> Tensor:
        """In float32 whatever the precision: coefficients can be a hundred times as large as what comes out."""
        with torch.autocast(self._device.type, enabled=False):
            return torch.tensordot(coefficients, known, dims=1)

    def _guided(self, noisy: Tensor, time: float, labels: Tensor) -> Tensor:
        """The denoiser's output, with classifier-free guidance if the time is within the interval."""
        low, high = self._entry["guidance_interval"]
        guidance = self._entry["guidance"]
        if guidance == 1 or not low <= time / 1000 <= high:
            return self._predict(noisy, time, labels)
        both = torch.cat([labels, torch.full_like(labels, self._entry["num_classes"])])  # the last label: no class
        with_class, without = self._predict(torch.cat([noisy, noisy]), time, both).chunk(2)
        return torch.lerp(without, with_class, guidance)

    def _predict(self, noisy: Tensor, time: float, labels: Tensor) -> Tensor:
        output = self._denoiser(noisy, timestep=noisy.new_full((len(noisy),), time), class_labels=labels)
        return (output if isinstance(output, Tensor) else output.sample).float()

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels around [0, 1], (n, 3, S, S) float32."""
        latents = (latents / self._autoencoder.config.scaling_factor).contiguous(memory_format=torch.channels_last)
        patch = math.isqrt(self._autoencoder.config.out_channels // 3)  # pixels that lie in the channels
        pixels = F.pixel_shuffle(self._autoencoder.decode(latents).sample, patch)
        side = self._entry["image_size"]
        if pixels.shape[-1] != side:
            pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        return pixels.float() / 2 + 0.5


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A GPU is not waited for."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def computes_in_bfloat16(precision: str, device: torch.device) -> bool:
    """True if a precision is bfloat16 on a device; "auto" is on GPUs of capability 8.0 and more, which are fast at it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return precision == "bfloat16"


def _plan(scheduler: Any, steps: int, mode_guidance: float) -> tuple[Tensor, Tensor, Tensor]:
    """What a deterministic scheduler's steps amount to: fixed combinations of the noise and the network's outputs.

    Found by letting the scheduler work on vectors of coefficients instead of images. Returns the times (n,), the
    coefficients of each step's input (n, m), and those of the result (m,); the first is the noise's and, with mode guidance,
    the second the mode's. Mode guidance adds lambda * sigma_t * (mode - predicted clean latents) to what comes out of each
    step of the first half (Chan-Santiago et al. 2025, arXiv 2505.18963, section 4.2).
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    times = scheduler.timesteps
    first = 2 if mode_guidance else 1
    symbols = torch.eye(first + len(times), dtype=torch.float64).reshape(first + len(times), 1, -1, 1, 1)  # image-like
    point, inputs = symbols[0], []
    for step, time in enumerate(times):
        inputs.append(point)
        output = symbols[first + step]
        after = scheduler.step(output, time, point, return_dict=False)[0].double()
        if mode_guidance and step < MODE_GUIDED * len(times):
            clean, sigma = _clean(scheduler, point, output, time)
            after = after + mode_guidance * sigma * (symbols[1] - clean)
        point = after
    return times.float(), torch.stack(inputs).flatten(1).float(), point.flatten().float()


def _clean(scheduler: Any, point: Tensor, output: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The clean latents that an output for a point implies, and the noise level of the time."""
    prediction = getattr(scheduler.config, "prediction_type", "flow_prediction")  # Euler's method is for flows alone
    if prediction == "flow_prediction":
        sigma = time.float() / 1000
        return point - sigma * output, sigma
    power = scheduler.alphas_cumprod[time.long()]
    signal, sigma = power.sqrt(), (1 - power).sqrt()
    if prediction == "epsilon":
        return (point - sigma * output) / signal, sigma
    return signal * point - sigma * output, sigma


def _load_scheduler(folder: Path) -> Any:
    config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    return getattr(diffusers, config["_class_name"]).from_config(config)


def _load_denoiser(folder: Path) -> nn.Module:
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    if config["_class_name"] == "DiTTransformer2DModel":
        return _load(DiTTransformer2DModel, folder / "transformer")
    from denoiser import UViT

    return _load(UViT, folder / "transformer")


def _load(kind: Any, folder: Path) -> nn.Module:
    """A network and its weights, which must fit to the last key; computed in float32 however they are stored."""
    network = kind.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    network.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return network.eval()
