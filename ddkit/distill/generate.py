"""Making a distilled set: images of a generator, or real ones to compare it with, in the challenge's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ddkit.data.prepare import open_dataset
from ddkit.data.store import dataset_spec, train_sha256
from ddkit.distill.sources import FromModel, FromReal, feature_extractor, save
from ddkit.errors import UsageError
from ddkit.metrics.features import FeatureSettings, resolve_precision
from ddkit.runtime.device import resolve_device
from ddkit.runtime.files import require_ending
from ddkit.runtime.progress import Listener, ignore
from ddkit.sets.distilled import (
    KIND_REFINED,
    KIND_SUBMISSION,
    SetFiles,
    read_provenance,
    require_nothing_else,
)
from ddkit.sets.select import LABEL_METHODS, ImageFeatures, choose


def generate(
    dataset: str, ipc: int, source: FromModel | FromReal, out: Path, *, replace: bool = False, progress: Listener = ignore
) -> SetFiles:
    """Write a distilled set of `ipc` images per class, its JSON and its contact sheet; earlier ones are replaced.

    out: the tensor's path, a .pt file. A model's samples are kept next to it while they are made, so that the same call
    continues after an interruption or a kill; it does nothing when the set is complete. Processes that
    `accelerate launch` started share the classes. The images do not depend on their number, but another number of them does
    not continue. replace: make the set again in any case, even over a refined set, which has cost hours, or files that are
    the user's own.
    Raises UsageError for fewer than one image a class, another ending than .pt, an unknown dataset, a model of another
    dataset, or such files at `out`; InterruptedRunError once asked to stop; and what `load_model`, `open_dataset`,
    `find_modes`, `find_influence` and `save_set` raise.
    """
    if ipc < 1:
        raise UsageError(f"A set needs at least one image per class, got {ipc}.", "The challenge asks for --ipc 10.")
    require_ending(out, ".pt")
    if not replace:
        require_nothing_else(out)
    kind = read_provenance(out).get("kind", KIND_SUBMISSION)
    if out.exists() and not replace and kind in (KIND_REFINED, KIND_SUBMISSION):
        what = "a refined set" if kind == KIND_REFINED else "a set that ddkit generate did not make"
        raise UsageError(f"{out} is {what}, which would be lost.", "Name another file with --out, or add --replace.")
    if isinstance(source, FromReal):
        return save(dataset, out, *_choose_real(dataset, ipc, source, progress))
    from ddkit.distill.samples import generate_samples  # imports diffusers, which takes seconds

    return generate_samples(dataset, ipc, source, out, replace, progress)


def _choose_real(dataset: str, ipc: int, source: FromReal, progress: Listener) -> tuple[Tensor, dict[str, Any]]:
    """(classes * ipc, 3, S, S) uint8 of the training set, and their provenance."""
    real = open_dataset(dataset, "train", progress=progress)
    by_rows, computed = None, {}
    if source.select not in LABEL_METHODS:
        device = resolve_device(source.device)
        settings = resolve_precision(FeatureSettings(precision=source.select_precision), dataset_spec(dataset), device)
        computed = {"selected_in": settings.precision}
        extract = feature_extractor(real, dataset, settings, device, progress)

        def by_rows(rows: Tensor) -> ImageFeatures:
            return extract(real.images[rows], real.labels[rows])

    rows = choose(source.select, real.labels, ipc, len(real.class_names), seed=source.seed, extract=by_rows)
    provenance = {
        "kind": f"{source.select}-real",
        "selection": source.select,
        **computed,
        "seed": source.seed,
        "dataset_sha256": train_sha256(dataset),
    }
    return real.images[rows], provenance
