"""What `ddkit pack --track 2` and `ddkit tune` share: models by dataset, their settings, and sizes."""

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
from ddkit.cli._options import ENTRY_FILE, RUNS_FOLDER, Duration
from ddkit.cli._output import Output
from ddkit.errors import UsageError
from ddkit.generator.config import SAMPLERS

if TYPE_CHECKING:
    from ddkit.packing.bundle import EntryModel
    from ddkit.packing.track2 import PackedEntry

TRIALS_FOLDER = RUNS_FOLDER / "tune"
_SAMPLING = ("sampler", "steps", "guidance", "precision")


class Size(click.ParamType):
    """A size such as 500MB or 2GB; becomes bytes, an int."""

    name = "size"
    _bytes_per: ClassVar[dict[str, int]] = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?b?)", value.strip().lower())
        if match is None or match[2] not in self._bytes_per:
            self.fail(f"'{value}' is no size; write 500MB or 2GB.", param, ctx)
        return int(float(match[1]) * self._bytes_per[match[2]])


_OPTIONS = (
    click.option("--model", "models", multiple=True, metavar="DATASET=FOLDER",
                 help="Track 2: what to bundle; repeatable.  [default: runs/<dataset> of both datasets]"),
    click.option("--tuned", is_flag=True, help="Track 2: with the best settings that ddkit tune found."),
    click.option("--sampler", type=click.Choice(SAMPLERS), help="Track 2: how to sample."),
    click.option("--sampling-steps", "steps", type=click.IntRange(1, 1000), help="Track 2: of the sampler."),
    click.option("--guidance", type=click.FloatRange(0), help="Track 2: 1 is none."),
    click.option("--precision", type=click.Choice(["float32", "bfloat16"]), help="Track 2: of sampling."),
    click.option("--entry-device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
                 help="Track 2: cuda refuses to run without a GPU."),
    click.option("--half", is_flag=True, help="Track 2: store weights as float16; says what that changes."),
    click.option("--size-limit", type=Size(), metavar="SIZE", help="Track 2: warn of a larger zip, such as 2GB."),
    click.option("--proof-budget", type=Duration(), default="60s", show_default=True,
                 help="Track 2: how long the bundle is run for each dataset, to prove it."),
    click.option("--proof-images", type=click.IntRange(1), metavar="N",
                 help="Track 2: enough of each dataset for the proof.  [default: what the budget allows]"),
    click.option("--fresh-venv", is_flag=True, help="Track 2: prove it in an environment that pip installs anew."),
    click.option("--no-proof", is_flag=True, help="Track 2: do not run the bundle."),
)  # fmt: skip


def entry_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `ddkit pack` that are of track 2."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def models_by_dataset(values: Sequence[str]) -> dict[str, Path]:
    """Folders from DATASET=FOLDER; those of both challenge datasets in runs/ where none is given."""
    if not values:
        return {spec.name: RUNS_FOLDER / spec.name for spec in CHALLENGE_DATASETS}
    found: dict[str, Path] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals or name in found:
            raise UsageError(f"--model {value}: write DATASET=FOLDER, each dataset once.")
        found[name] = Path(folder)
    return found


def pack_track_2(output: Output, out: Path | None, options: dict[str, Any]) -> None:
    """Bundle, zip, prove, and report."""
    from ddkit.packing.bundle import lacking
    from ddkit.packing.proof import ProofSettings
    from ddkit.packing.track2 import pack_entry

    out = out or ENTRY_FILE
    models = _models(options)
    names = ", ".join(f"{model.dataset} ({model.folder})" for model in models)
    output.say(f"Bundling {escape(names)} into {escape(str(out))}.")
    for name in lacking([model.dataset for model in models]):
        output.say(f"[yellow]warning[/yellow] There is no model for {name}: the score is the mean of both datasets.")
    if options["half"]:
        _say_rounding(output, models)
    proof = ProofSettings(options["proof_budget"], options["fresh_venv"], most=options["proof_images"])
    packed = pack_entry(models, out, proof=None if options["no_proof"] else proof, progress=output.listen)
    _report(output, packed, options["size_limit"])


def _models(options: dict[str, Any]) -> list[EntryModel]:
    from ddkit.packing.bundle import EntryModel, EntrySettings
    from ddkit.packing.tune import tuned

    chosen = {name: options[name] for name in _SAMPLING if options[name] is not None}
    sampling = dataclasses.replace(EntrySettings().sampling, **chosen)
    settings = EntrySettings(sampling, options["entry_device"], options["half"])
    models = [EntryModel(name, folder, settings) for name, folder in models_by_dataset(options["models"]).items()]
    if not options["tuned"]:
        return models
    if chosen.keys() & {"sampler", "steps", "guidance"}:
        raise UsageError("--tuned brings its own sampler, steps and guidance.", "Give either.")
    return [tuned(model, TRIALS_FOLDER / f"{model.dataset}.jsonl") for model in models]


def _say_rounding(output: Output, models: Sequence[EntryModel]) -> None:
    from ddkit.packing.track2 import rounding_cost

    for model in models:
        cost = rounding_cost(model)
        output.say(
            f"{escape(model.dataset)}: weights as float16 change {cost.images} images by {cost.mean:.4f} steps of 1/255 "
            f"in the mean, {cost.largest} at most."
        )


def _report(output: Output, packed: PackedEntry, limit: int | None) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading, justify in (("in the zip", "left"), ("bytes", "right"), ("SHA-256", "left")):
        table.add_column(heading, justify=justify)
    for file in packed.files:
        table.add_row(escape(file.name), f"{file.size:,}", file.sha256)
    table.add_row(f"[bold]{escape(packed.path.name)}[/]", f"{packed.size:,}", packed.sha256)
    data = {"path": str(packed.path), "sha256": packed.sha256, "bytes": packed.size,
            "files": [vars(file) for file in packed.files], "proofs": [asdict(proof) for proof in packed.proofs]}  # fmt: skip
    output.result(data, table)
    for proof in packed.proofs:
        least, most = proof.images_per_class
        output.say(
            f"proved: {escape(proof.dataset)}, {proof.images:,} images, {least} to {most} of each class, in "
            f"{proof.seconds:.1f} of {proof.budget:g} s, without ddkit."
        )
        if least == 0:
            output.say("[yellow]warning[/yellow] Some classes have no image: here the budget is too short for the model.")
    if not packed.proofs:
        output.say("[yellow]warning[/yellow] The bundle was not run.")
    if limit is not None and packed.size > limit:
        output.say(f"[yellow]warning[/yellow] {packed.size:,} bytes are more than the limit of {limit:,}; see --half.")
    output.done([packed.path], f"ddkit evaluate --track 2 {packed.path}")
