"""Making a distilled set: images of a generator, or real ones to hold it against, in the challenge's form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit.data.images import normalise
from ddkit.data.prepare import open_dataset
from ddkit.data.store import ImageSet, class_titles, dataset_spec, store_hash
from ddkit.device import resolve_device
from ddkit.distill.select import BLIND_CHOICES, View, check_choice, choose, choose_in_class
from ddkit.environment import versions
from ddkit.errors import UsageError
from ddkit.generator.pipeline import Model, load_model, model_hash
from ddkit.generator.sampling import Sampler, SamplingConfig, class_ordered, sample_all
from ddkit.metrics.features import reference_features
from ddkit.progress import Listener, Progress, ignore
from ddkit.submission.layout import SavedSet, save_set

# How the JSON beside a set calls what it is; `ddkit report` holds others against "random-real".
KIND_GENERATED = "generated"


@dataclass(frozen=True)
class FromModel:
    """Images of a trained generator.

    folder: of the model. device: as `resolve_device` names it. candidates: images of each class to choose from, None
    for as many as the set takes. select: how to choose, as `ddkit.distill.select.choose` has it.
    """

    folder: Path
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    device: str = "cpu"
    candidates: int | None = None
    select: str = "herding"

    def __post_init__(self) -> None:
        check_choice(self.select)


@dataclass(frozen=True)
class FromReal:
    """Real training images. choice: as `ddkit.distill.select.choose` has it. device: to look at them on."""

    choice: str = "random"
    seed: int = 0
    device: str = "cpu"


def generate(
    dataset: str, ipc: int, source: FromModel | FromReal, out: Path, *, progress: Listener = ignore
) -> SavedSet:
    """Write a distilled set of `ipc` images per class, its JSON and its contact sheet; earlier ones are replaced.

    out: where the tensor goes, a .pt file. Raises UsageError for an ipc below one, another ending, an unknown dataset
    or a model of another one, and what `load_model`, `open_dataset` and `save_set` raise.
    """
    if ipc < 1:
        raise UsageError(f"A set needs at least one image per class, not {ipc}.", "The challenge asks for --ipc 10.")
    if out.suffix != ".pt":
        raise UsageError(f"{out} does not end in .pt.", "Name the tensor's file, such as submission/cifar100.pt.")
    make = _sampled if isinstance(source, FromModel) else _real
    images, made_by = make(dataset, ipc, source, progress)
    titles = class_titles(dataset)
    made_by |= {"versions": versions()}
    return save_set(out, normalise(images, dataset_spec(dataset)), dataset_spec(dataset), titles, made_by)


def _sampled(dataset: str, ipc: int, source: FromModel, progress: Listener) -> tuple[Tensor, dict[str, Any]]:
    """(classes * ipc, 3, S, S) uint8 of the model, and how they were made."""
    spec = dataset_spec(dataset)
    model = load_model(source.folder, dataset=dataset)
    _check_classes(model, spec.num_classes, source.folder)
    sampler = Sampler(model, source.sampling, resolve_device(source.device))
    if source.candidates is None:
        images = sample_all(sampler, *class_ordered(ipc, spec.num_classes), progress=progress)
    else:
        images = _chosen_samples(dataset, sampler, ipc, source, progress)
    made_by = {
        "kind": KIND_GENERATED,
        "model": str(source.folder),
        "model_sha256": model_hash(source.folder),
        "model_steps": model.facts.steps,
        "selection": "none" if source.candidates is None else source.select,
        **({} if source.candidates is None else {"candidates": source.candidates}),
        **{name: value for name, value in dataclasses.asdict(source.sampling).items() if name != "compile"},
    }
    return images, made_by


def _chosen_samples(
    dataset: str, sampler: Sampler, ipc: int, source: FromModel, progress: Listener
) -> Tensor:
    """(classes * ipc, 3, S, S) uint8: of each class its candidates are sampled, looked at, and only the chosen kept."""
    num_classes, candidates = dataset_spec(dataset).num_classes, source.candidates
    if candidates < ipc:
        raise UsageError(f"{ipc} images of each class cannot be chosen from {candidates}.", f"Ask for --candidates {ipc} or more.")
    view = None
    if source.select not in BLIND_CHOICES:
        view = _views(open_dataset(dataset, "train", progress=progress), dataset, source.device, progress)
    chosen = []
    for c in range(num_classes):
        labels = torch.full((candidates,), c)
        images = sampler(labels, torch.arange(candidates)).images
        seen = view(images, labels) if view else None
        rows = choose_in_class(source.select, candidates, ipc, seed=source.sampling.seed, label=c, view=seen)
        chosen.append(images[rows])
        progress(Progress("Sampling and choosing", (c + 1) * candidates, num_classes * candidates, "images"))
    return torch.cat(chosen)


def _views(real: ImageSet, dataset: str, device: str, progress: Listener) -> Callable[[Tensor, Tensor], View]:
    """A function of images and labels to what a network trained on the real images sees in them."""
    features = reference_features(real, dataset_spec(dataset), device=resolve_device(device), progress=progress)
    return lambda images, labels: View(*features.with_confidence(images, labels))


def _real(dataset: str, ipc: int, source: FromReal, progress: Listener) -> tuple[Tensor, dict[str, Any]]:
    """(classes * ipc, 3, S, S) uint8 of the training set, and how they were chosen."""
    real = open_dataset(dataset, "train", progress=progress)
    view = None if source.choice in BLIND_CHOICES else _views(real, dataset, source.device, progress)

    def look(rows: Tensor) -> View:
        return view(real.images[rows], real.labels[rows])

    rows = choose(source.choice, real.labels, ipc, len(real.class_names), seed=source.seed, look=look)
    made_by = {
        "kind": f"{source.choice}-real",
        "selection": source.choice,
        "seed": source.seed,
        "dataset_sha256": store_hash(dataset, "train"),
    }
    return real.images[rows], made_by


def _check_classes(model: Model, num_classes: int, folder: Path) -> None:
    if len(model.facts.class_names) != num_classes:
        raise UsageError(
            f"The model in {folder} knows {len(model.facts.class_names)} classes, the dataset has {num_classes}.",
            "Train a model on the dataset as it is now.",
        )
