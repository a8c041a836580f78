"""The training set as latents, encoded once and kept on disk, memory-mapped on reading."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddkit.data.store import ImageSet
from ddkit.generator.autoencoder import encode, images_at_once, to_signed
from ddkit.progress import Listener, Progress, ignore
from ddkit.tensor_files import save_safetensors

log = logging.getLogger(__name__)

LATENTS_FILE = "latents.safetensors"


@dataclass(frozen=True)
class LatentSet:
    """Encoded training images.

    latents: (N, V, C, s, s) float16, not scaled; V = 2 where the mirrored image is there too, encoded itself:
    mirroring a latent is not the same. labels: (N,) int64. std: of all latents, one over the latent scale.
    """

    latents: Tensor
    labels: Tensor
    std: float

    def __len__(self) -> int:
        return len(self.labels)


def cached_latents(
    path: Path,
    autoencoder: AutoencoderKL,
    images: ImageSet,
    latent_side: int,
    *,
    flips: bool,
    identity: str,
    progress: Listener = ignore,
) -> LatentSet:
    """The latents of `images`, read from `path` if they were made of the same things, else encoded and written there.

    identity: names the pixels and the autoencoder; latents of another identity are replaced.
    """
    if (found := _read(path, images, identity)) is not None:
        return found
    if path.exists():
        log.warning("The data or the autoencoder changed since the latents were made: encoding them again.")
    latents = _encode_all(autoencoder, images, latent_side, flips, progress)
    std = float(latents.float().std())
    save_safetensors({"latents": latents}, path, {"identity": identity, "std": repr(std)})
    return LatentSet(latents, images.labels, std)


def _read(path: Path, images: ImageSet, identity: str) -> LatentSet | None:
    """None where there are none, they are of another identity, or the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != identity:
                return None
            latents = file.get_tensor("latents")
    except (FileNotFoundError, SafetensorError):
        return None
    return LatentSet(latents, images.labels, float(metadata["std"]))


@torch.inference_mode()
def _encode_all(
    autoencoder: AutoencoderKL, images: ImageSet, latent_side: int, flips: bool, progress: Listener
) -> Tensor:
    """(N, V, C, s, s) float16 on the CPU."""
    encoded, count = [], images_at_once(autoencoder, latent_side)
    for start in range(0, len(images), count):
        pixels = to_signed(images.images[start : start + count].to(autoencoder.device))
        views = [pixels, pixels.flip(-1)] if flips else [pixels]
        encoded.append(torch.stack([encode(autoencoder, view, latent_side) for view in views], dim=1).half().cpu())
        progress(Progress("Encoding the training set", start + len(pixels), len(images), "images"))
    return torch.cat(encoded)
