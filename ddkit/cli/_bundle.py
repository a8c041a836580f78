"""Shared by `ddkit pack --track 2` and `ddkit tune`: models by dataset, their settings, and packing them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click
from rich.markup import escape
from rich.table import Table

from ddkit.challenge import CHALLENGE_DATASETS
from ddkit.cli._options import BUNDLE_FILE, COUNT, RUNS_FOLDER, Duration
from ddkit.cli._output import Output
from ddkit.errors import UsageError
from ddkit.generator.config import MOST_SAMPLING_STEPS, SAMPLERS, SAMPLING_PRECISIONS, SamplingSettings, default_guidance
from ddkit.history import PackedRecords

if TYPE_CHECKING:
    from ddkit.packing.bundle import BundleModel, PackedBundle
    from ddkit.packing.pack import PackedFile
    from ddkit.packing.proof import ProofSettings

TRIALS_FOLDER = RUNS_FOLDER / "tune"
_SAMPLING = ("sampler", "steps", "guidance", "precision")
SAMPLER_CHOICE = click.Choice(SAMPLERS)
PRECISION_CHOICE = click.Choice(SAMPLING_PRECISIONS)
_DEFAULTS = SamplingSettings(guidance=default_guidance(None))  # as BundleSettings has them


class Size(click.ParamType):
    """A size such as 500MB or 2GB; becomes bytes, an int."""

    name = "size"
    _bytes_per: ClassVar[dict[str, int]] = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?b?)", value.strip().lower())
        if match is None or match[2] not in self._bytes_per:
            self.fail(f"'{value}' is not a size; write 500MB or 2GB.", param, ctx)
        return int(float(match[1]) * self._bytes_per[match[2]])


_OPTIONS = (
    click.option("--model", "models", multiple=True, metavar="DATASET=FOLDER",
                 help="Track 2: bundle the model in this folder, or the one with this id on the Hugging Face hub; repeatable.  "
                 "[default: runs/<dataset> of both datasets]"),
    click.option("--tuned", is_flag=True, help="Track 2: use the best settings that ddkit tune found."),
    click.option("--sampler", type=SAMPLER_CHOICE, help=f"Track 2: choose the sampler.  [default: {_DEFAULTS.sampler}]"),
    click.option("--sampling-steps", "steps", type=click.IntRange(1, MOST_SAMPLING_STEPS),
                 help=f"Track 2: sample in this many steps.  [default: {_DEFAULTS.steps}]"),
    click.option("--guidance", type=click.FloatRange(0),
                 help=f"Track 2: scale classifier-free guidance; 1 turns it off.  [default: {_DEFAULTS.guidance:g}]"),
    click.option("--images-per-class", type=COUNT, metavar="N",
                 help="Track 2: stop at N images of each class.  [default: as many as the time allows]"),
    click.option("--keep", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, metavar="SHARE",
                 help="Track 2: keep this share of each class's images, those that a classifier trained on the real images is "
                 "surest of."),
    click.option("--precision", type=PRECISION_CHOICE,
                 help="Track 2: sample in this precision; auto is bfloat16 on GPUs that are fast at it, else float32.  "
                 f"[default: {_DEFAULTS.precision}]"),
    click.option("--bundle-device", type=click.Choice(["auto", "cpu", "cuda"]),
                 default="auto", help="Track 2: run the bundle on this device; cuda requires a GPU."),
    click.option("--half", is_flag=True, help="Track 2: store weights as float16, and print what that changes."),
    click.option("--size-limit", type=Size(), metavar="SIZE", help="Track 2: warn if the zip is larger, such as 2GB."),
    click.option("--proof-budget", type=Duration(), default="60s",
                 help="Track 2: test the bundle by running it for this long on each dataset."),
    click.option("--proof-images", type=COUNT, metavar="N",
                 help="Track 2: end the test after this many images of each dataset.  [default: as many as the budget allows]"),
    click.option("--fresh-venv", is_flag=True, help="Track 2: test the bundle in an environment that pip installs."),
    click.option("--no-proof", is_flag=True, help="Track 2: do not test the bundle."),
)  # fmt: skip


def bundle_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `ddkit pack` that apply to track 2."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def models_by_dataset(values: Sequence[str]) -> dict[str, Path]:
    """Folders from DATASET=FOLDER or DATASET=user/name; those of both challenge datasets in runs/ if none is given."""
    from ddkit.generator.model_folder import find_model

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
    from ddkit.packing.proof import ProofSettings

    proof = ProofSettings(options["proof_budget"], options["fresh_venv"], most=options["proof_images"])
    models = _models(options)
    records = PackedRecords()
    if name is not None:
        records.choose_name(name, "")  # which refuses a name in use before the work begins
    packed = pack_models(output, models, out or BUNDLE_FILE, None if options["no_proof"] else proof)
    files = {file.name: file.sha256 for file in packed.files}
    chosen, remark = records.choose_name(name, packed.path.stem, files)
    records.add(chosen, packed.path, packed.sha256, 2, files)
    if remark:
        output.event(remark)
    _report(output, packed, options["size_limit"])


def pack_models(output: Output, models: Sequence[BundleModel], out: Path, proof: ProofSettings | None) -> PackedBundle:
    """Bundle these models, zip and prove, with a note on what is missing."""
    from ddkit.packing.bundle import pack_bundle
    from ddkit.runtime.hub import source_name

    names = ", ".join(f"{model.dataset} ({source_name(model.folder)})" for model in models)
    output.note(f"Bundling {escape(names)} into {escape(str(out))}.")
    for spec in CHALLENGE_DATASETS:
        if spec.name not in [model.dataset for model in models]:
            output.note(
                f"[yellow]warning[/yellow] There is no model for {spec.name}, but the score is the mean of both datasets."
            )
    for model in models:
        if model.settings.half:
            _note_rounding(output, model)
    return pack_bundle(models, out, proof=proof, progress=output.progress)


def _models(options: dict[str, Any]) -> list[BundleModel]:
    from ddkit.packing.bundle import BundleModel, BundleSettings
    from ddkit.packing.tune import with_best_settings

    chosen = {name: options[name] for name in _SAMPLING if options[name] is not None}
    sampling = dataclasses.replace(BundleSettings().sampling, **chosen)
    settings = BundleSettings(sampling, options["bundle_device"], options["half"], options["images_per_class"], options["keep"])
    models = [BundleModel(name, folder, settings) for name, folder in models_by_dataset(options["models"]).items()]
    if not options["tuned"]:
        return models
    if chosen.keys() & {"sampler", "steps", "guidance"} or options["images_per_class"] or options["keep"] != 1:
        raise UsageError(
            "--tuned sets the sampler, steps, guidance, images per class and the share kept.",
            "Leave out --tuned or those options.",
        )
    return [with_best_settings(model, TRIALS_FOLDER / f"{model.dataset}.jsonl") for model in models]


def _note_rounding(output: Output, model: BundleModel) -> None:
    from ddkit.packing.bundle import rounding_cost

    cost = rounding_cost(model)
    output.note(
        f"{escape(model.dataset)}: weights as float16 change the pixels of {cost.images} images by {cost.mean:.4f} steps of "
        f"1/255 on average, {cost.largest} at most."
    )


def files_table(files: Sequence[PackedFile], path: Path, sha256: str) -> Table:
    """The files in a zip, and the zip itself, with sizes and hashes."""
    table = Table("in the zip", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("bytes", justify="right")
    table.add_column("SHA-256")
    for file in files:
        table.add_row(escape(file.name), f"{file.size:,}", file.sha256)
    table.add_row(f"[bold]{escape(path.name)}[/]", f"{path.stat().st_size:,}", sha256)
    return table


def _report(output: Output, packed: PackedBundle, limit: int | None) -> None:
    table = files_table(packed.files, packed.path, packed.sha256)
    data = {"path": str(packed.path), "sha256": packed.sha256, "bytes": packed.size,
            "files": [vars(file) for file in packed.files], "proofs": [asdict(proof) for proof in packed.proofs]}  # fmt: skip
    output.result(data, table)
    for proof in packed.proofs:
        least, most = proof.images_per_class
        output.note(
            f"Without ddkit, the bundle made {proof.images:,} {escape(proof.dataset)} images, {least} to {most} of each class, "
            f"in {proof.seconds:.1f} s of its {proof.budget:g} s."
        )
        if least == 0:
            output.note("[yellow]warning[/yellow] Some classes have no image, because the budget is too short on this machine.")
    if not packed.proofs:
        output.note("[yellow]warning[/yellow] The bundle was not tested.")
    if limit is not None and packed.size > limit:
        output.note(f"[yellow]warning[/yellow] The zip has {packed.size:,} bytes; the limit is {limit:,}. Add --half.")
    output.finish([packed.path], f"ddkit evaluate --track 2 {packed.path}")
