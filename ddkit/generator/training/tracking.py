"""Scoring a generator while it trains: the Frechet distance of its samples to real images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddkit.data.store import ImageSet, dataset_spec
from ddkit.errors import UsageError
from ddkit.generator.config import TRACKING, SamplingSettings
from ddkit.generator.model_folder import Model
from ddkit.generator.sampling import Sampler
from ddkit.metrics.features import FeatureSettings, convnet_features, resolve_precision
from ddkit.metrics.frechet import frechet_distance
from ddkit.metrics.inception import InceptionFeatures
from ddkit.runtime.progress import Listener, ignore
from ddkit.runtime.seeds import generator_for

Features = Callable[[Tensor], Tensor]  # (N, 3, S, S) uint8 -> (N, D)

# The name of the distance in the records, by the network that gives the features.
SCORE_NAMES = {"convnet": "frechet", "inception": "frechet_inception"}
# The precisions of the convnet's features, which distances must share to be compared, by the name of the distance.
SCORE_PRECISIONS = {"frechet": "float32", "frechet_bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Tracking:
    """Scoring the model during training; the folder then keeps the best one.

    name: the score's name in the records. score: a function of a model with averaged weights to a number, lower is
    better. every_steps: steps between two scores.
    """

    name: str
    score: Callable[[Model], float]
    every_steps: int = 1000

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise UsageError(f"The number of steps between two scores must be at least 1, got {self.every_steps}.")


def track_frechet(
    real: ImageSet,
    make_features: Callable[[], Features],
    *,
    every_steps: int,
    name: str = SCORE_NAMES["convnet"],
    images: int = 1000,
    sampling: SamplingSettings = TRACKING,
    device: torch.device | str = "cpu",
) -> Tracking:
    """A Tracking by the Frechet distance of `images` samples to as many real images of the same classes.

    make_features: called when the first score is due, because making features can mean training a network. name: the
    distance's name in the records; distances in other features or of other numbers of images should have other names.
    Every score samples from the same noise, so that only the model differs.
    """
    count = min(images, len(real))
    rows = torch.randperm(len(real), generator=generator_for("cpu", "tracking", sampling.seed))[:count]

    @functools.cache
    def real_features() -> tuple[Features, Tensor]:
        features = make_features()
        return features, features(real.images[rows])

    def score(model: Model) -> float:
        features, of_real = real_features()
        settings = replace(sampling, guidance=1.0) if model.facts.label_dropout == 0 else sampling
        sampler = Sampler(model, settings, device)
        return frechet_distance(of_real, features(torch.cat([*sampler.images(real.labels[rows], torch.arange(count))])))

    return Tracking(name, score, every_steps)


def track_frechet_in(
    features: str,
    dataset: str,
    real: ImageSet,
    *,
    every_steps: int,
    recorded: str = "",
    device: torch.device | str = "cpu",
    progress: Listener = ignore,
) -> Tracking:
    """`track_frechet` in the features of that name: "convnet", a network trained on the real images, or "inception".

    recorded: the name of the score of the training that is to be continued, whose features keep their precision.
    Raises what InceptionFeatures raises, before hours of work and not when the first score is due.
    """
    if features == "inception":
        inception = InceptionFeatures(device)
        return track_frechet(real, lambda: inception, every_steps=every_steps, name=SCORE_NAMES["inception"], device=device)
    spec = dataset_spec(dataset)
    settings = resolve_precision(FeatureSettings(precision=SCORE_PRECISIONS.get(recorded, "auto")), spec, device)
    return track_frechet(
        real,
        lambda: convnet_features(real, spec, settings, device=device, progress=progress),
        every_steps=every_steps,
        name=next(name for name, precision in SCORE_PRECISIONS.items() if precision == settings.precision),
        device=device,
    )
