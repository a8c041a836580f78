"""Shared by `ddkit pack --track 2` and `ddkit tune`: models by dataset, their settings, and packing them.

These commands import it when they run, because it needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ddkit.challenge import CHALLENGE_DATASETS
from ddkit.cli._options import BUNDLE_FILE, RUNS_FOLDER, TRIALS_FOLDER
from ddkit.cli._output import Output
from ddkit.cli.pack import files_table
from ddkit.errors import MissingDataError, UsageError
from ddkit.generator.config import BUNDLE_KEEP, BUNDLE_SAMPLING, BundleSettings, default_mode_guidance
from ddkit.generator.model_facts import find_model, read_facts
from ddkit.history import PackedRecords
from ddkit.packing.bundle import BundleModel, PackedBundle, pack_bundle, rounding_cost
from ddkit.packing.proof import ProofSettings
from ddkit.packing.tune import with_best_settings
from ddkit.runtime.hub import source_name

_SAMPLING = ("sampler", "steps", "guidance", "mode_guidance", "precision")


def models_by_dataset(values: Sequence[str]) -> dict[str, Path]:
    """Folders from DATASET=FOLDER or DATASET=user/name; those of both challenge datasets in runs/ if none is given."""
    if not values:
        return {spec.name: RUNS_FOLDER / spec.name for spec in CHALLENGE_DATASETS}
    found: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or name in found:
            raise UsageError(f"--model {value} is not DATASET=FOLDER, or names a dataset twice.", "Write --model NAME=FOLDER.")
        found[name] = find_model(folder)
    return found


def pack_track_2(output: Output, out: Path | None, name: str | None, options: dict[str, Any]) -> None:
    """Bundle, zip, prove, record and report, by the options of `ddkit pack`."""
    proof = ProofSettings(options["proof_budget"], options["fresh_venv"], most=options["proof_images"])
    packed = pack_models(output, _models(output, options), out or BUNDLE_FILE, None if options["no_proof"] else proof, name)
    table = files_table(packed.files, packed.path, packed.sha256)
    data = {"path": str(packed.path), "sha256": packed.sha256, "bytes": packed.path.stat().st_size,
            "files": [vars(file) for file in packed.files], "proofs": [asdict(proof) for proof in packed.proofs]}  # fmt: skip
    output.result(data, table)
    output.finish([packed.path], "ddkit evaluate --track 2", packed.path)


def pack_models(
    output: Output, models: Sequence[BundleModel], out: Path, proof: ProofSettings | None, name: str | None = None
) -> PackedBundle:
    """Bundle these models, zip, prove and record, with notes on what is missing and on the proof."""
    records = PackedRecords()
    for model in models:
        output.note(f"Bundling {model.dataset} ({source_name(model.folder)}) into {out}: {model.settings}.")
    for spec in CHALLENGE_DATASETS:
        if spec.name not in [model.dataset for model in models]:
            output.note(f"There is no model for {spec.name}, but the score is the mean of both datasets.", label="warning")
    for model in models:
        if model.settings.half:
            cost = rounding_cost(model)
            output.note(
                f"{model.dataset}: weights as float16 change the pixels of {cost.images} images by {cost.mean:.4f} "
                f"steps of 1/255 on average, {cost.largest} at most."
            )
    packed = pack_bundle(models, out, proof=proof, name=name, records=records, on_event=output.note, progress=output.progress)
    for each in packed.proofs:
        least, most = each.images_per_class
        output.note(
            f"Without ddkit, the bundle made {each.images:,} {each.dataset} images, {least} to {most} of each class, "
            f"in {each.seconds:.1f} s of its {each.budget:g} s."
        )
        if least == 0:
            output.note("Some classes have no image, because the budget is too short on this machine.", label="warning")
    if not packed.proofs:
        output.note("The bundle was not tested.", label="warning")
    return packed


def tuned_models(output: Output, model: BundleModel, out: Path) -> list[BundleModel]:
    """The model with its best settings, with those of the challenge's other datasets that were tuned."""
    models = [_tuned(output, model, out)]
    for name in (spec.name for spec in CHALLENGE_DATASETS if spec.name != model.dataset):
        other = replace(model, dataset=name, folder=RUNS_FOLDER / name)
        if other.folder.is_dir() and (out / f"{name}.jsonl").is_file():
            try:
                models.append(_tuned(output, other, out))
            except MissingDataError as error:
                output.note(f"{name} is left out: {error}", label="warning")
    return models


def _tuned(output: Output, model: BundleModel, trials: Path) -> BundleModel:
    """The model with its best settings by the trials in that folder, with a warning if the search is unfinished."""
    records = trials / f"{model.dataset}.jsonl"
    return with_best_settings(model, records, on_event=lambda text: output.note(text, label="warning"))


def _models(output: Output, options: dict[str, Any]) -> list[BundleModel]:
    chosen = {name: options[name] for name in _SAMPLING if options[name] is not None}
    if options["tuned"] and (chosen or options["images_per_class"] or options["keep"]):
        raise UsageError(
            "--tuned sets the sampler, steps, guidance, mode guidance, precision, images per class and the share kept.",
            "Leave out --tuned or those options.",
        )
    keep = BUNDLE_KEEP if options["keep"] is None else options["keep"]
    models = []
    for name, folder in models_by_dataset(options["models"]).items():
        scale = default_mode_guidance(read_facts(folder, dataset=name).prediction)
        sampling = replace(BUNDLE_SAMPLING, **{"mode_guidance": scale, **chosen})
        settings = BundleSettings(sampling, options["bundle_device"], options["half"], options["images_per_class"], keep)
        models.append(BundleModel(name, folder, settings))
    if not options["tuned"]:
        return models
    return [_tuned(output, model, TRIALS_FOLDER) for model in models]
