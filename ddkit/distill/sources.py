"""What a distilled set can be made of, and what making it from either has in common."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit.data.images import normalize
from ddkit.data.store import ImageSet, dataset_spec
from ddkit.errors import UsageError
from ddkit.generator.config import SamplingSettings, default_sampling
from ddkit.generator.model_facts import find_model, read_facts
from ddkit.metrics.features import FeatureSettings, convnet_features
from ddkit.runtime.environment import versions
from ddkit.runtime.progress import Listener
from ddkit.sets.distilled import SetFiles, save_set
from ddkit.sets.select import DEFAULT_METHOD, ImageFeatures, check_method

Extract = Callable[[Tensor, Tensor], ImageFeatures]  # images (n, 3, S, S) uint8 and labels (n,) -> their features


@dataclass(frozen=True)
class FromModel:
    """Images of a trained generator.

    folder: the model's. device: a name for `resolve_device`. candidates: images of each class to choose from; None
    takes the samples as they come. select: the selection method, one of `ddkit.sets.select`; None takes DEFAULT_METHOD.
    Features that it compares are computed in the precision of `sampling`, where "auto" takes the faster one on a CPU and
    float32 on other devices.
    Raises UsageError for an unknown method, and for one without candidates.
    """

    folder: Path
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    device: str = "cpu"
    candidates: int | None = None
    select: str | None = None

    def __post_init__(self) -> None:
        check_method(self.method)
        if self.select is not None and self.candidates is None:
            raise UsageError(f"Selecting by {self.select} needs candidates.", "Give their number for each class, such as 100.")

    @property
    def method(self) -> str:
        return self.select or DEFAULT_METHOD

    @classmethod
    def find(
        cls, dataset: str, model: str | os.PathLike[str] | None, *, device: str, candidates: int | None,
        select: str | None, sampling: SamplingSettings | None = None, **given: Any,
    ) -> FromModel:  # fmt: skip
        """model: the folder, or an id on the Hugging Face hub; None means runs/<dataset>. sampling: None takes that of
        `default_sampling` for the model and the settings that are given. Raises MissingModelError."""
        found = cls(Path("runs", dataset), device=device, candidates=candidates, select=select)  # refuses before a download
        folder = found.folder if model is None else find_model(model)
        sampling = sampling or default_sampling(read_facts(folder, dataset=dataset).prediction, **given)
        return dataclasses.replace(found, folder=folder, sampling=sampling)


@dataclass(frozen=True)
class FromReal:
    """Real training images. select: the selection method, one of `ddkit.sets.select`. device, select_precision: where and
    in which precision it computes features, "float32", "bfloat16" or "auto", as in `FeatureSettings`."""

    select: str = "random"
    seed: int = 0
    device: str = "cpu"
    select_precision: str = "auto"

    def __post_init__(self) -> None:
        check_method(self.select)


def feature_extractor(
    real: ImageSet, dataset: str, settings: FeatureSettings, device: torch.device, progress: Listener
) -> Extract:
    """The features and confidences of a network that is trained on the real images."""
    features = convnet_features(real, dataset_spec(dataset), settings, device=device, progress=progress)
    return lambda images, labels: ImageFeatures(*features.with_confidence(images, labels))


def save(dataset: str, out: Path, images: Tensor, provenance: dict[str, Any]) -> SetFiles:
    """Write a set of 8-bit images, with its JSON and its contact sheet."""
    spec = dataset_spec(dataset)
    return save_set(out, normalize(images, spec), spec, {**provenance, "versions": versions()})
