"""The modes of each class in latent space, which mode guidance steers samples to.

Source: Chan-Santiago et al. 2025, "MGD3: Mode-Guided Dataset Distillation using Diffusion Models", arXiv 2505.18963.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from ddkit.data.store import ImageSet
from ddkit.errors import BadFileError, UsageError
from ddkit.generator.model_facts import WEIGHTS_FILE
from ddkit.generator.model_folder import Model
from ddkit.generator.training.latents import LATENTS_FILE, cached_latents, latents_identity, read_latents
from ddkit.generator.training.run_folder import CHECKPOINTS
from ddkit.runtime.cached import cache_key, cached_tensors
from ddkit.runtime.files import cache_folder, one_at_a_time, sha256_of
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.runtime.seeds import network_seed

_CACHE_FOLDER = "_modes"  # a dataset cannot have this name
_VERSION = 2  # counts changes to what is computed
_KMEANS_ROUNDS = 50


def find_modes(
    folder: Path,
    model: Model,
    images: ImageSet,
    count: int,
    *,
    dataset_sha256: str,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Listener = ignore,
) -> Tensor:
    """The centers of k-means in each class's latents: (classes, k, C, s, s) float32, scaled as the denoiser sees them.

    folder: the model's folder. If its training has left the latents of the images there, they are used; else `images` are
    encoded on the device. images: the prepared training split. dataset_sha256: its hash. count: k. The modes of a class with
    no more images are the latents of its images in random order, repeated. The cache keeps the modes, and the latents that
    were encoded; where it may not be written, both are computed each time.
    Raises UsageError for a class without images, and what `cached_latents` raises.
    """
    autoencoder = sha256_of(folder / "vae" / WEIGHTS_FILE)
    scale = float(model.autoencoder.config.scaling_factor)
    members = images.labels.bincount(minlength=len(model.facts.class_names))
    if not members.all():
        raise UsageError("Mode guidance needs at least one training image of every class.")

    cache = cache_folder() / _CACHE_FOLDER

    def make() -> dict[str, Tensor]:
        path = folder / CHECKPOINTS / LATENTS_FILE
        with_flips, identity = (latents_identity(dataset_sha256, autoencoder, flips=flips) for flips in (True, False))
        kept = read_latents(path, images.labels, with_flips) or read_latents(path, images.labels, identity)
        if kept is None:
            own = cache / f"{name}-{cache_key((identity, model.latent_shape))}-{LATENTS_FILE}"
            encoded = functools.partial(
                cached_latents, autoencoder=model.autoencoder.to(device), images=images, latent_side=model.latent_shape[1],
                flips=False, identity=identity, progress=progress,
            )  # fmt: skip
            # Another process that finds another number of modes writes to the same file.
            with one_at_a_time(own.with_name(f".{own.name}.lock"), f"encodes the images of {name}"):
                try:
                    kept = encoded(own)
                except BadFileError:  # such as a cache that others share for reading
                    with tempfile.TemporaryDirectory(prefix="ddkit-latents-", ignore_cleanup_errors=True) as temporary:
                        kept = encoded(Path(temporary, LATENTS_FILE))
        latents = scale * kept.latents[:, 0].float()
        return {"modes": _centers(latents, images.labels, len(members), count, seed, progress)}

    key = cache_key((_VERSION, dataset_sha256, autoencoder, model.latent_shape, scale, count, seed))
    name = model.facts.dataset
    return cached_tensors(cache / f"{name}-{key}.safetensors", ("modes",), f"the modes of {name}'s latents", make)["modes"]


def _centers(latents: Tensor, labels: Tensor, classes: int, count: int, seed: int, progress: Listener) -> Tensor:
    """(classes, count, C, s, s) from (N, C, s, s)."""
    centers = []
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        # A cluster may lose all its images, or begin at an image that is there twice; its center then stays where it was.
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        for label in range(classes):
            members = latents[labels == label].flatten(1)
            random = network_seed("modes", seed, label)
            # A store has a class's images by file name, which in CIFAR-100 begins with their kind; where fewer samples are made
            # than there are modes, these have to show all kinds.
            found = members[torch.randperm(len(members), generator=torch.Generator().manual_seed(random))]
            if count < len(members):
                found = torch.from_numpy(kmeans2(members.numpy(), count, iter=_KMEANS_ROUNDS, minit="++", seed=random)[0])
            centers.append(found[torch.arange(count) % len(found)])
            progress(Progress("Finding modes", label + 1, classes, "classes"))
    return torch.stack(centers).float().unflatten(2, latents.shape[1:])
