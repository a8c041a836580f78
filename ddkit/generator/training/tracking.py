"""Following a generator's quality while it trains: the Frechet distance of its samples to real images."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ddkit.data.store import ImageSet, dataset_spec
from ddkit.errors import UsageError
from ddkit.generator.model_folder import Model
from ddkit.generator.sampling import Sampler, SamplingSettings, sample_all
from ddkit.generator.training.train import Tracking, TrainingData
from ddkit.metrics.features import reference_features
from ddkit.metrics.frechet import frechet_distance
from ddkit.metrics.inception import InceptionFeatures
from ddkit.runtime.progress import Listener, ignore
from ddkit.runtime.seeds import generator_for

Features = Callable[[Tensor], Tensor]  # (N, 3, S, S) uint8 -> (N, D)

# Few steps and little guidance: the course of the distance is wanted, not the best picture.
SAMPLING = SamplingSettings(steps=10, guidance=1.5, batch_size=250)
NAME = "frechet"
# Of the distance in the records, by what looks at the images.
NAMES = {"convnet": NAME, "inception": "frechet_inception"}


def track_frechet(
    real: ImageSet,
    make_features: Callable[[], Features],
    *,
    every_steps: int,
    name: str = NAME,
    images: int = 1000,
    sampling: SamplingSettings = SAMPLING,
    device: torch.device | str = "cpu",
) -> Tracking:
    """A Tracking by the Frechet distance of `images` samples to as many real images, classes alike in both.

    make_features: called once, when the first score is due, as making features may mean training a network; such as
    `ddkit.metrics.features.reference_features`. name: of the distance in the records; distances of different features
    or numbers of images cannot be compared and should not share one. The same noise is sampled from every time, so
    that only the model differs.
    Raises UsageError for fewer than two images.
    """
    count = min(images, len(real))
    if count < 2:
        raise UsageError(f"The Frechet distance needs at least two images, not {count}.")
    rows = torch.randperm(len(real), generator=generator_for("cpu", "tracking", sampling.seed))[:count]

    @functools.cache
    def reference() -> tuple[Features, Tensor]:
        features = make_features()
        return features, features(real.images[rows])

    def score(model: Model) -> float:
        features, of_real = reference()
        made = sample_all(Sampler(model, sampling, device), real.labels[rows], torch.arange(count))
        return frechet_distance(of_real, features(made))

    return Tracking(name, score, every_steps)


def track_frechet_in(
    features: str,
    data: TrainingData,
    *,
    every_steps: int,
    device: torch.device | str = "cpu",
    progress: Listener = ignore,
) -> Tracking:
    """`track_frechet` in features of that name: "convnet", of a network trained on the real images, or "inception".

    Raises what InceptionFeatures does, at once.
    """
    if features == "inception":
        inception = InceptionFeatures(device)  # before hours of work, not when the first score is due
        return track_frechet(data.images, lambda: inception, every_steps=every_steps, name=NAMES[features], device=device)
    return track_frechet(
        data.images,
        lambda: reference_features(data.images, dataset_spec(data.name), device=device, progress=progress),
        every_steps=every_steps,
        device=device,
    )
