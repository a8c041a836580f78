"""A distilled set of a generator's samples, all of them or the best of more, made batch by batch and kept on the way."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.data.prepare import open_dataset
from ddkit.data.store import dataset_spec, train_sha256
from ddkit.distill.partial_set import PartialSet, digest_of
from ddkit.distill.sources import Extract, FromModel, feature_extractor, save
from ddkit.errors import InterruptedRunError, UsageError
from ddkit.generator.config import SamplingSettings
from ddkit.generator.influence import find_influence
from ddkit.generator.model_facts import model_hash, require_present_dataset
from ddkit.generator.model_folder import Model, load_model
from ddkit.generator.modes import find_modes
from ddkit.generator.sampling import Sampler, class_ordered, resolve_settings
from ddkit.metrics.features import FeatureSettings, resolve_precision
from ddkit.runtime.device import resolve_device
from ddkit.runtime.distributed import ProcessGroup
from ddkit.runtime.environment import versions
from ddkit.runtime.hub import source_name
from ddkit.runtime.interrupt import StopRequest, stop_requests
from ddkit.runtime.progress import Listener, Progress
from ddkit.sets.distilled import KIND_GENERATED, SetFiles, draw_sheet, read_provenance, read_set, set_files
from ddkit.sets.select import LABEL_METHODS, choose_for_each_mode, choose_in_class

log = logging.getLogger(__name__)


def generate_samples(dataset: str, ipc: int, source: FromModel, out: Path, replace: bool, progress: Listener) -> SetFiles:
    """A set of a model's images, continuing what an earlier call has left."""
    spec = dataset_spec(dataset)
    group = ProcessGroup(resolve_device(source.device))
    settings = resolve_settings(source.sampling, group.device)
    model = load_model(source.folder, dataset=dataset)
    require_present_dataset(model.facts, source.folder)
    if source.candidates is not None and source.candidates < ipc:
        raise UsageError(
            f"{ipc} images of each class cannot be chosen from {source.candidates}.", f"Ask for --candidates {ipc} or more."
        )
    needs_features = source.candidates is not None and source.method not in LABEL_METHODS
    provenance = _provenance(model, source, settings)
    if needs_features:
        features = resolve_precision(FeatureSettings(precision=source.sampling.precision), spec, group.device)
        provenance["selected_in"] = features.precision
    looks_at_real = needs_features or settings.mode_guidance > 0 or settings.influence_guidance > 0
    if looks_at_real:
        real = open_dataset(dataset, "train", progress=progress)
        sha256 = provenance["dataset_sha256"] = train_sha256(dataset)
    identity = _identity(provenance, ipc, spec)
    classes = group.local_items(range(spec.num_classes))
    request = digest_of(identity)
    if not replace and read_provenance(out).get("request") == request:
        log.info("%s already holds exactly these images", out)
        files = set_files(out)
        if group.is_main and not files.sheet.exists():
            draw_sheet(read_set(out, spec.name).images, spec, files.sheet)
        return files
    partial = PartialSet(out, identity, spec.image_shape, rank=group.rank, size=group.size)
    modes = influence = extract = None
    if settings.mode_guidance:
        modes = find_modes(
            source.folder, model, real, ipc,
            dataset_sha256=sha256, seed=settings.seed, device=group.device, progress=progress,
        )  # fmt: skip
    if needs_features:
        extract = feature_extractor(real, dataset, features, group.device, progress)
    if settings.influence_guidance:
        influence = find_influence(real, spec, dataset_sha256=sha256, device=group.device, progress=progress)
    sampler = Sampler(model, settings, group.device, modes=modes, influence=influence)
    images = _complete(sampler, classes, ipc, source, extract, partial, progress)
    by_class = group.gather(list(zip(classes, images.unflatten(0, (len(classes), ipc)), strict=True)))
    if group.is_main:
        whole = torch.cat([images for _, images in sorted(by_class, key=lambda pair: pair[0])])
        save(dataset, out, whole, provenance | {"request": request})
    group.gather([])  # the set is written before any process removes its partial set or continues
    partial.discard()
    return set_files(out)


def _complete(
    sampler: Sampler,
    classes: Sequence[int],
    ipc: int,
    source: FromModel,
    extract: Extract | None,
    partial: PartialSet,
    progress: Listener,
) -> Tensor:
    """All rows of some classes, (classes * ipc, 3, S, S) uint8: those kept by earlier calls, and the missing ones.

    Raises InterruptedRunError once asked to stop, with the rows made so far kept.
    """
    total = len(classes) * ipc
    made = [partial.load()[:total]]
    done = len(made[0])
    if done:
        log.info("Continuing after %d of %d images that an earlier run has made", done, total)
    with stop_requests() as stop:
        for new in _missing_rows(sampler, classes, ipc, source, extract, done, stop, progress):
            made.append(new)
            done += len(new)
            if done < total or stop:  # the last rows go straight into the set
                partial.append(done - len(new), new)
            if stop:
                break
        if stop:
            kept = f"with {done} of {total} images made; they are kept" if done else "before any image was made"
            raise InterruptedRunError(f"Stopped {kept}.", "Run the same command again to continue.")
    return torch.cat(made)


def _missing_rows(
    sampler: Sampler,
    classes: Sequence[int],
    ipc: int,
    source: FromModel,
    extract: Extract | None,
    done: int,
    stop: StopRequest,
    progress: Listener,
) -> Iterator[Tensor]:
    """Yield the rows that follow the first `done`, (n, 3, S, S) uint8: batch by batch, or class by class if chosen.

    Chosen from candidates, the sequence ends early when asked to stop.
    """
    if source.candidates is None:
        places, indices = class_ordered(ipc, len(classes))
        labels = torch.tensor(classes, dtype=torch.int64)[places]
        for images in sampler.images(labels[done:], indices[done:]):
            yield images
            done += len(images)
            progress(Progress("Sampling", done, len(labels), "images"))
        return
    for place, label in list(enumerate(classes))[done // ipc :]:
        labels = torch.full((source.candidates,), label)
        made: list[Tensor] = []
        for images in sampler.images(labels, torch.arange(source.candidates)):
            made.append(images)
            sampled = place * source.candidates + sum(map(len, made))
            progress(Progress("Sampling and choosing", sampled, len(classes) * source.candidates, "images"))
            if stop:
                return
        candidates = torch.cat(made)
        features = extract(candidates, labels) if extract else None
        # The best of all would show only the modes that are easiest to tell.
        choose = choose_for_each_mode if sampler.settings.mode_guidance else choose_in_class
        seed = sampler.settings.seed
        yield candidates[choose(source.method, len(labels), ipc, seed=seed, label=label, features=features)]


def _provenance(model: Model, source: FromModel, settings: SamplingSettings) -> dict[str, Any]:
    """The provenance of a model's images."""
    sampling = dataclasses.asdict(settings)
    del sampling["compile"]
    for name in ("mode_guidance", "influence_guidance"):
        if not sampling[name]:
            del sampling[name]
    return {
        "kind": KIND_GENERATED,
        "model": source_name(source.folder),
        "model_sha256": model_hash(source.folder),
        "model_steps": model.facts.steps,
        "selection": "none" if source.candidates is None else source.method,
        **({} if source.candidates is None else {"candidates": source.candidates}),
        **sampling,
    }


def _identity(provenance: dict[str, Any], ipc: int, spec: DatasetSpec) -> dict[str, Any]:
    """Everything that decides the set's bytes: neither the model folder's name nor the batch size does."""
    own = {name: value for name, value in provenance.items() if name not in ("model", "batch_size")}
    return {**own, "ipc": ipc, "normalization": [spec.mean, spec.std], "ddkit": versions()["ddkit"]}
