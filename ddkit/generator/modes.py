"""The modes of each class in latent space, which mode guidance steers samples to.

Source: Chan-Santiago et al. 2025, "MGD3: Mode-Guided Dataset Distillation using Diffusion Models", arXiv 2505.18963.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from ddkit.errors import MissingModelError, UsageError
from ddkit.generator.model_facts import WEIGHTS_FILE
from ddkit.generator.model_folder import Model
from ddkit.generator.training.latents import LATENTS_FILE, latents_identity, read_latents
from ddkit.generator.training.run_folder import CHECKPOINTS
from ddkit.runtime.files import sha256_of
from ddkit.runtime.seeds import network_seed

_KMEANS_ROUNDS = 50


def find_modes(folder: Path, model: Model, labels: Tensor, count: int, *, seed: int, dataset_sha256: str) -> Tensor:
    """The centers of k-means in each class's latents: (classes, k, C, s, s) float32, scaled as the denoiser sees them.

    folder: the model's folder, whose training has left the latents of its images there. labels: (N,) int64 of those
    images. count: k, or fewer where a class has fewer images. dataset_sha256: hash of the prepared training split.
    Raises MissingModelError when the latents are missing or belong to other images or another autoencoder.
    """
    path = folder / CHECKPOINTS / LATENTS_FILE
    autoencoder = sha256_of(folder / "vae" / WEIGHTS_FILE)
    identities = (latents_identity(dataset_sha256, autoencoder, flips=flips) for flips in (True, False))
    found = next((found for identity in identities if (found := read_latents(path, labels, identity))), None)
    if found is None:
        problem = "belongs to other images or another autoencoder" if path.exists() else "is missing"
        raise MissingModelError(
            f"Mode guidance needs the latents of the training images, but {path} {problem}.",
            f"Train the model in its folder: ddkit train --dataset {model.facts.dataset} --out {folder}. "
            "Or leave out --mode-guidance.",
        )
    latents = found.latents[:, 0].float() * float(model.autoencoder.config.scaling_factor)
    by_class = [latents[labels == label].flatten(1).numpy() for label in range(len(model.facts.class_names))]
    if any(not len(members) for members in by_class):
        raise UsageError("Mode guidance needs at least one training image of every class.")
    count = min(count, *(len(members) for members in by_class))
    centers = []
    with warnings.catch_warnings():
        # A cluster may lose all its images; its center then stays where it was.
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        for label, members in enumerate(by_class):
            random = network_seed("modes", seed, label)
            centers.append(kmeans2(members, count, iter=_KMEANS_ROUNDS, minit="++", seed=random)[0])
    return torch.stack([torch.from_numpy(each).float() for each in centers]).unflatten(2, latents.shape[1:])
