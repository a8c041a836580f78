"""Making a distilled set: images of a generator, or real ones to hold it against, in the challenge's form."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ddkit.data.images import normalise
from ddkit.data.prepare import open_dataset
from ddkit.data.store import class_titles, dataset_spec, store_hash
from ddkit.device import resolve_device
from ddkit.distill.select import choose
from ddkit.environment import versions
from ddkit.errors import UsageError
from ddkit.generator.pipeline import Model, load_model, model_hash
from ddkit.generator.sampling import Sampler, SamplingConfig, class_ordered, sample_all
from ddkit.progress import Listener, ignore
from ddkit.submission.layout import SavedSet, save_set

# How the JSON beside a set calls what it is; `ddkit report` holds others against "random-real".
KIND_GENERATED = "generated"


@dataclass(frozen=True)
class FromModel:
    """Images of a trained generator. folder: of the model. device: as `resolve_device` names it."""

    folder: Path
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    device: str = "cpu"


@dataclass(frozen=True)
class FromReal:
    """Real training images. choice: "random" or "first", as `ddkit.distill.select.choose` has them."""

    choice: str = "random"
    seed: int = 0


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
    labels, indices = class_ordered(ipc, spec.num_classes)
    sampler = Sampler(model, source.sampling, resolve_device(source.device))
    images = sample_all(sampler, labels, indices, progress=progress)
    made_by = {
        "kind": KIND_GENERATED,
        "model": str(source.folder),
        "model_sha256": model_hash(source.folder),
        "model_steps": model.facts.steps,
        "selection": "none",
        **{name: value for name, value in dataclasses.asdict(source.sampling).items() if name != "compile"},
    }
    return images, made_by


def _real(dataset: str, ipc: int, source: FromReal, progress: Listener) -> tuple[Tensor, dict[str, Any]]:
    """(classes * ipc, 3, S, S) uint8 of the training set, and how they were chosen."""
    real = open_dataset(dataset, "train", progress=progress)
    rows = choose(source.choice, real.labels, ipc, len(real.class_names), seed=source.seed)
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
