"""A model folder made ready to sample: which image of which class in, pixels out.

Needs torch, diffusers and safetensors, `container.py` and `linear_plan.py` next to it, and for a U-ViT `denoiser.py`.
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
from container import BFLOAT16_FLAGS, cpu_flags
from diffusers import AutoencoderKL, DiTTransformer2DModel
from linear_plan import linear_plan, weighted_sum
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
MODES_FILE = "modes.safetensors"


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
        plan = linear_plan(_load_scheduler(folder / "scheduler"), entry["steps"], mode_guidance=entry["mode_guidance"])
        self._plan, self._times = plan, plan.times.tolist()
        self._inputs, self._final = plan.inputs.to(self._device), plan.final.to(self._device)
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
        known = given[0].new_empty(len(self._final), *given[0].shape)  # what is given, and the terms of the steps so far
        known[: len(given)] = torch.stack(given)
        for step, (inputs, time) in enumerate(zip(self._inputs, self._times, strict=True)):
            count = len(given) + step
            point = weighted_sum(inputs[:count], known[:count])
            known[count] = self._plan.term(step, point, self._guided(point, time, labels))
        return weighted_sum(self._final, known)

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
        pixels = F.pixel_shuffle(self._autoencoder.decode(latents).sample, patch).float()
        side = self._entry["image_size"]
        if pixels.shape[-1] != side:
            pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        return pixels / 2 + 0.5


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A GPU is not waited for."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def computes_in_bfloat16(precision: str, device: torch.device) -> bool:
    """True if a precision is bfloat16 on a device; "auto" is where the device has instructions for it, and so is faster."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and bool(BFLOAT16_FLAGS & cpu_flags())


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
