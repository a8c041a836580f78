"""The training set as latents, encoded once and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddkit.data.store import ImageSet
from ddkit.errors import InterruptedRunError
from ddkit.generator.autoencoder import encode, images_at_once, to_signed
from ddkit.runtime.device import upload
from ddkit.runtime.files import explain_os_error
from ddkit.runtime.interrupt import stop_requests
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.runtime.tensor_files import save_safetensors

log = logging.getLogger(__name__)

LATENTS_FILE = "latents.safetensors"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class LatentSet:
    """Encoded training images.

    latents: (N, V, C, s, s) float16, not scaled. V = 2 with mirrored images, which are encoded themselves, because
    mirroring a latent is not the same. labels: (N,) int64. std: the deviation of all latents, one over the latent scale.
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
    """The latents of `images`, read from `path` if they have the same identity, else encoded and written there.

    identity: names the pixels and the autoencoder. Raises InterruptedRunError once asked to stop, with the encoded
    images kept, and BadFileError when a file cannot be written.
    """
    if (found := read_latents(path, images.labels, identity)) is not None:
        return found
    if path.exists():
        log.warning("The images or the autoencoder have changed, so the latents are encoded again.")
    # Latents are written to a partial file as they come, from which a later run continues.
    shape = (1 + flips, autoencoder.config.latent_channels, latent_side, latent_side)
    bytes_per_image = torch.float16.itemsize * math.prod(shape)
    name = hashlib.sha256(f"{identity} {shape}".encode()).hexdigest()[:16]
    partial = path.with_name(f"{path.stem}-{name}{_PARTIAL}")
    count = images_at_once(autoencoder, latent_side)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as file, stop_requests() as stop:
            # A kill may have cut the last image short.
            done = min(file.tell() // bytes_per_image, len(images))
            file.truncate(done * bytes_per_image)
            for start in range(done, len(images), count):
                some = images.images[start : start + count]
                file.write(_encoded(autoencoder, some, latent_side, flips).numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
                done += len(some)
                progress(Progress("Encoding the training set", done, len(images), "images"))
                if stop:
                    raise InterruptedRunError(
                        f"Stopped after encoding {done:,} of {len(images):,} images; their latents are kept.",
                        "Run the same command again, without --fresh, to continue.",
                    )
        values = torch.from_numpy(np.fromfile(partial, dtype=np.float16))
    except OSError as error:
        raise explain_os_error(error, partial) from error
    latents = values.view(len(images), *shape)
    std = float(latents.float().std())
    save_safetensors({"latents": latents}, path, {"identity": identity, "std": repr(std)})
    for earlier in path.parent.glob(f"{path.stem}-*{_PARTIAL}"):
        earlier.unlink(missing_ok=True)
    return read_latents(path, images.labels, identity) or LatentSet(latents, images.labels, std)


@torch.inference_mode()
def _encoded(autoencoder: AutoencoderKL, images: Tensor, latent_side: int, flips: bool) -> Tensor:
    """(n, 3, S, S) uint8 -> (n, V, C, s, s) float16 on the CPU, as a LatentSet has them."""
    pixels = to_signed(upload(images, autoencoder.device))
    views = [pixels, pixels.flip(-1)] if flips else [pixels]
    return torch.stack([encode(autoencoder, view, latent_side) for view in views], dim=1).half().cpu()


def latents_identity(dataset_sha256: str, autoencoder_sha256: str, *, flips: bool) -> str:
    """The identity of the latents of those images by that autoencoder."""
    return f"{dataset_sha256} {autoencoder_sha256} flips={flips}"


def read_latents(path: Path, labels: Tensor, identity: str) -> LatentSet | None:
    """The latents in a file; None when there is none, it is damaged or it has another identity."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != identity:
                return None
            latents = file.get_tensor("latents")
    except (FileNotFoundError, SafetensorError):
        return None
    return LatentSet(latents, labels, float(metadata["std"]))
