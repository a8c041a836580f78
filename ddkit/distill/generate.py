"""Making a distilled set: images of a generator, or real ones to hold it against, in the challenge's form."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.data.images import normalize
from ddkit.data.prepare import open_dataset
from ddkit.data.store import ImageSet, class_names, class_titles, dataset_spec, store_hash
from ddkit.distill.partial_set import PartialSet
from ddkit.errors import InterruptedRunError, UsageError
from ddkit.generator.model_folder import Model, load_model, model_hash
from ddkit.generator.sampling import Sampler, SamplingSettings, class_ordered, sample
from ddkit.metrics.features import reference_features
from ddkit.runtime.device import resolve_device
from ddkit.runtime.distributed import ProcessGroup
from ddkit.runtime.environment import versions
from ddkit.runtime.interrupt import StopRequest, stop_requests
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.sets.distilled import (
    KIND_GENERATED,
    KIND_REFINED,
    SetFiles,
    draw_sheet,
    load_tensor,
    read_provenance,
    require_tensor_name,
    save_set,
    set_files,
)
from ddkit.sets.select import BLIND_CHOICES, ImageFeatures, check_choice, choose, choose_in_class

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FromModel:
    """Images of a trained generator.

    folder: of the model. device: as `resolve_device` names it. candidates: images of each class to choose from, None
    for as many as the set takes. select: how to choose, as `ddkit.sets.select.choose` has it.
    """

    folder: Path
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    device: str = "cpu"
    candidates: int | None = None
    select: str = "easy"

    def __post_init__(self) -> None:
        check_choice(self.select)

    @property
    def looks(self) -> bool:
        """Whether images are looked at to choose among them."""
        return self.candidates is not None and self.select not in BLIND_CHOICES


@dataclass(frozen=True)
class FromReal:
    """Real training images. choice: as `ddkit.sets.select.choose` has it. device: to look at them on."""

    choice: str = "random"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_choice(self.choice)


def generate(
    dataset: str, ipc: int, source: FromModel | FromReal, out: Path, *, replace: bool = False, progress: Listener = ignore
) -> SetFiles:
    """Write a distilled set of `ipc` images per class, its JSON and its contact sheet; earlier ones are replaced.

    out: where the tensor goes, a .pt file. Samples of a model are kept beside it as they are made: stopped, even
    killed, the same call goes on with what is missing, and does nothing where all of it is there. Processes that
    `accelerate launch` started share the classes; the images do not depend on how many there are. replace: make it anew
    in any case, also in the place of a refined set, which has cost hours.
    Raises UsageError for an ipc below one, another ending, an unknown dataset or a model of another one, or a refined
    set at `out`, InterruptedRunError once asked to stop, and what `load_model`, `open_dataset` and `save_set` raise.
    """
    if ipc < 1:
        raise UsageError(f"A set needs at least one image per class, not {ipc}.", "The challenge asks for --ipc 10.")
    require_tensor_name(out)
    if not replace and read_provenance(out).get("kind") == KIND_REFINED:
        raise UsageError(f"{out} has been refined, which would be lost.", "Name another file with --out, or say --replace.")
    if isinstance(source, FromReal):
        return _save(dataset, out, *_real(dataset, ipc, source, progress))
    return _generate_samples(dataset, ipc, source, out, replace, progress)


def _save(dataset: str, out: Path, images: Tensor, made_by: dict[str, Any]) -> SetFiles:
    spec = dataset_spec(dataset)
    return save_set(out, normalize(images, spec), spec, class_titles(dataset), {**made_by, "versions": versions()})


def _generate_samples(dataset: str, ipc: int, source: FromModel, out: Path, replace: bool, progress: Listener) -> SetFiles:
    """A set of a model's images; what an earlier call has made of it is taken up, and a whole one is left as it is."""
    spec = dataset_spec(dataset)
    group = ProcessGroup(resolve_device(source.device))
    model = load_model(source.folder, dataset=dataset)
    _check_model(model, dataset, source.folder)
    if source.candidates is not None and source.candidates < ipc:
        raise UsageError(
            f"{ipc} images of each class cannot be chosen from {source.candidates}.", f"Ask for --candidates {ipc} or more."
        )
    made_by = _made_by(model, source)
    identity = _identity(made_by, ipc, spec, store_hash(dataset, "train") if source.looks else "")
    classes = group.local_items(range(spec.num_classes))
    parts = PartialSet(out, identity, spec.image_shape)
    if not replace and read_provenance(out).get("request") == parts.digest:
        log.info("%s has just these images already", out)
        return _with_sheet(out, spec) if group.is_main else set_files(out)
    if group.size > 1:  # each process keeps its own
        parts = PartialSet(out.with_stem(f"{out.stem}-{group.rank}-of-{group.size}"), identity, spec.image_shape)
    request, view = parts.digest, None
    if source.looks:
        real = open_dataset(dataset, "train", progress=progress)
        if not group.is_main:
            group.gather([])  # what looks at images is trained once, by the process that leads
        view = _views(real, dataset, group.device, progress)
        if group.is_main:
            group.gather([])
    rows = _Rows(classes, ipc, source, Sampler(model, source.sampling, group.device), view, progress)
    of_classes = group.gather(list(zip(classes, _complete(rows, parts).unflatten(0, (len(classes), ipc)), strict=True)))
    if group.is_main:
        images = torch.cat([of_class for _, of_class in sorted(of_classes, key=lambda one: one[0])])
        _save(dataset, out, images, made_by | {"request": request})
    group.gather([])  # the set is there before anybody drops what it was made of, or goes on
    parts.drop()
    return set_files(out)


def _with_sheet(out: Path, spec: DatasetSpec) -> SetFiles:
    """The files of the set that is there, the contact sheet drawn again where it is missing."""
    files = set_files(out)
    if not files.sheet.exists():
        draw_sheet(load_tensor(out, spec), spec, class_titles(spec.name), files.sheet)
    return files


def _made_by(model: Model, source: FromModel) -> dict[str, Any]:
    """How a model's images are made, for the JSON beside them."""
    return {
        "kind": KIND_GENERATED,
        "model": str(source.folder),
        "model_sha256": model_hash(source.folder),
        "model_steps": model.facts.steps,
        "selection": "none" if source.candidates is None else source.select,
        **({} if source.candidates is None else {"candidates": source.candidates}),
        **{name: value for name, value in dataclasses.asdict(source.sampling).items() if name != "compile"},
    }


def _identity(made_by: dict[str, Any], ipc: int, spec: DatasetSpec, dataset_sha256: str) -> dict[str, Any]:
    """What decides on the images and on how they are written: not the folder's name, nor how many are made at once."""
    own = {name: value for name, value in made_by.items() if name not in ("model", "batch_size")}
    normalization = [spec.mean, spec.std]
    return {**own, "ipc": ipc, "normalisation": normalization, "dataset_sha256": dataset_sha256, "ddkit": versions()["ddkit"]}


def _complete(rows: _Rows, parts: PartialSet) -> Tensor:
    """All rows of a set, (classes * ipc, 3, S, S) uint8: those kept, and what is missing, kept as it is made.

    Raises InterruptedRunError once asked to stop.
    """
    made = [parts.kept()[: rows.total]]
    done = len(made[0])
    if done:
        log.info("Going on after %d of %d images that an earlier run has made", done, rows.total)
    with stop_requests() as stop:
        for new in rows.after(done, stop):
            made.append(new)
            done += len(new)
            if done < rows.total or stop:  # else the last ones are in the set at once
                parts.keep(done - len(new), new)
            if stop:
                break
        if stop:
            kept = f"with {done} of {rows.total} images made; they are kept" if done else "before any image was made"
            raise InterruptedRunError(f"Stopped {kept}.", "Run the same command again to go on.")
    return torch.cat(made)


@dataclass(frozen=True)
class _Rows:
    """What makes the rows of a set's classes. view: what is seen in images of labels; None where no choice looks."""

    classes: list[int]
    ipc: int
    source: FromModel
    sampler: Sampler
    view: Callable[[Tensor, Tensor], ImageFeatures] | None
    progress: Listener

    @property
    def total(self) -> int:
        return len(self.classes) * self.ipc

    def after(self, done: int, stop: StopRequest) -> Iterator[Tensor]:
        """(n, 3, S, S) uint8, again and again: the rows that follow the first `done`."""
        return self._samples(done) if self.source.candidates is None else self._chosen(done, stop)

    def _samples(self, done: int) -> Iterator[Tensor]:
        """All samples, batch by batch."""
        places, indices = class_ordered(self.ipc, len(self.classes))
        labels = torch.tensor(self.classes, dtype=torch.int64)[places]
        for batch in sample(self.sampler, labels[done:], indices[done:]):
            yield batch.images
            done += len(batch.images)
            self.progress(Progress("Sampling", done, self.total, "images"))

    def _chosen(self, done: int, stop: StopRequest) -> Iterator[Tensor]:
        """Class by class: its candidates are sampled, looked at, and only the chosen kept. Ends when asked to stop."""
        for place in range(done // self.ipc, len(self.classes)):
            label = self.classes[place]
            candidates = self._candidates(place, stop)
            if stop:
                return
            labels = torch.full((len(candidates),), label)
            yield candidates[
                choose_in_class(
                    self.source.select, len(candidates), self.ipc, seed=self.source.sampling.seed, label=label,
                    view=self.view(candidates, labels) if self.view else None,
                )
            ]  # fmt: skip

    def _candidates(self, place: int, stop: StopRequest) -> Tensor:
        """(candidates, 3, S, S) uint8 of the class at that place; fewer when asked to stop."""
        count, made = self.source.candidates, []
        for batch in sample(self.sampler, torch.full((count,), self.classes[place]), torch.arange(count)):
            made.append(batch.images)
            done = place * count + sum(map(len, made))
            self.progress(Progress("Sampling and choosing", done, len(self.classes) * count, "images"))
            if stop:
                break
        return torch.cat(made)


def _views(real: ImageSet, dataset: str, device: torch.device, progress: Listener) -> Callable[[Tensor, Tensor], ImageFeatures]:
    """A function of images and labels to what a network trained on the real images sees in them."""
    features = reference_features(real, dataset_spec(dataset), device=device, progress=progress)
    return lambda images, labels: ImageFeatures(*features.with_confidence(images, labels))


def _real(dataset: str, ipc: int, source: FromReal, progress: Listener) -> tuple[Tensor, dict[str, Any]]:
    """(classes * ipc, 3, S, S) uint8 of the training set, and how they were chosen."""
    real = open_dataset(dataset, "train", progress=progress)
    view = None if source.choice in BLIND_CHOICES else _views(real, dataset, resolve_device(source.device), progress)

    def look(rows: Tensor) -> ImageFeatures:
        return view(real.images[rows], real.labels[rows])

    rows = choose(source.choice, real.labels, ipc, len(real.class_names), seed=source.seed, look=look)
    made_by = {
        "kind": f"{source.choice}-real",
        "selection": source.choice,
        "seed": source.seed,
        "dataset_sha256": store_hash(dataset, "train"),
    }
    return real.images[rows], made_by


def _check_model(model: Model, dataset: str, folder: Path) -> None:
    """Raise UsageError where a dataset was prepared anew, with other classes or sizes, after the model was trained."""
    known, asked = model.facts.class_names, class_names(dataset)
    remedy = "Train a model on the dataset as it is now."
    if len(known) != len(asked):
        raise UsageError(f"The model in {folder} knows {len(known)} classes, the dataset has {len(asked)}.", remedy)
    if known != asked:
        label = next(label for label in range(len(asked)) if known[label] != asked[label])
        raise UsageError(
            f"The model in {folder} knows other classes than '{dataset}' has now: class {label} is {known[label]} there, "
            f"and {asked[label]} in the dataset.",
            remedy,
        )
    size = dataset_spec(dataset).image_size
    if model.facts.image_size != size:
        raise UsageError(
            f"The model in {folder} makes images of {model.facts.image_size} pixels, '{dataset}' has {size}.", remedy
        )
