"""`ddkit pack`: the zip to upload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from ddkit.challenge import CHALLENGE_DATASETS
from ddkit.cli._options import (
    BUNDLE_FILE,
    COUNT,
    FILE,
    FOLDER,
    SAMPLER,
    SAMPLING_PRECISION,
    SUBMISSION_FOLDER,
    TRACK,
    Duration,
    example,
    given_options,
    ignore_option,
    output_options,
    refuse_unused,
)
from ddkit.cli._output import Output, plain_table
from ddkit.errors import UsageError
from ddkit.generator.config import BUNDLE_KEEP, BUNDLE_SAMPLING, MOST_SAMPLING_STEPS, default_mode_guidance
from ddkit.history import PACKED_FILE, PackedRecords
from ddkit.runtime.files import sha256_of

if TYPE_CHECKING:
    from ddkit.packing.pack import PackedFile
    from ddkit.sets.findings import Finding, Report

_SUBMISSION_FILE = Path("submission.zip")
_ORDER_NOT_COMPARED = "L011"  # a note that nobody should miss before the upload


_TRACK_2_OPTIONS = (
    click.option("--model", "models", multiple=True, metavar="DATASET=FOLDER",
                 help="Track 2: bundle the model in this folder, or the one with this id on the Hugging Face hub; repeatable.  "
                 "[default: runs/<dataset> of both datasets]"),
    click.option("--tuned", is_flag=True, help="Track 2: use the best settings that ddkit tune found."),
    click.option("--sampler", type=SAMPLER, help=f"Track 2: choose the sampler.  [default: {BUNDLE_SAMPLING.sampler}]"),
    click.option("--sampling-steps", "steps", type=click.IntRange(1, MOST_SAMPLING_STEPS),
                 help=f"Track 2: sample in this many steps.  [default: {BUNDLE_SAMPLING.steps}]"),
    click.option("--guidance", type=click.FloatRange(0),
                 help=f"Track 2: scale classifier-free guidance; 1 turns it off.  [default: {BUNDLE_SAMPLING.guidance:g}]"),
    click.option("--mode-guidance", type=click.FloatRange(0), metavar="SCALE",
                 help="Track 2: set the scale of mode guidance, which steers each image early in sampling to a mode of its "
                 "class's real images; 0 turns it off.  "
                 f"[default: {default_mode_guidance('flow'):g} for models of flow matching, else "
                 f"{default_mode_guidance('epsilon'):g}]"),
    click.option("--images-per-class", type=COUNT, metavar="N",
                 help="Track 2: stop at N images of each class.  [default: as many as the time allows]"),
    click.option("--keep", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE",
                 help="Track 2: keep this share of the images. A classifier trained on the real images labels them, and those "
                 f"that show their class most clearly are kept; 1 keeps all, as they were sampled.  [default: {BUNDLE_KEEP}]"),
    click.option("--precision", type=SAMPLING_PRECISION,
                 help="Track 2: sample in this precision; auto is bfloat16 on GPUs and processors with instructions for it, "
                 f"else float32.  [default: {BUNDLE_SAMPLING.precision}]"),
    click.option("--bundle-device", type=click.Choice(["auto", "cpu", "cuda"]),
                 default="auto", help="Track 2: run the bundle on this device; cuda requires a GPU."),
    click.option("--half", is_flag=True, help="Track 2: store weights as float16, and print what that changes."),
    click.option("--proof-budget", type=Duration(), default="60s",
                 help="Track 2: test the bundle by running it for this long on each dataset."),
    click.option("--proof-images", type=COUNT, metavar="N",
                 help="Track 2: end the test after this many images of each dataset, one of each class or more.  "
                 "[default: as many as the budget allows]"),
    click.option("--fresh-venv", is_flag=True,
                 help="Track 2: test the bundle in a new environment into which pip installs its requirements."),
    click.option("--no-proof", is_flag=True, help="Track 2: do not test the bundle."),
)  # fmt: skip


def _bundle_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `ddkit pack` that apply to track 2."""
    for option in reversed(_TRACK_2_OPTIONS):
        command = option(command)
    return command


@click.command(
    short_help="Pack the zip to upload.",
    epilog=example("ddkit pack submission --out my-entry.zip\nddkit pack --track 2 --tuned"),
)
@click.argument("folder", type=FOLDER, default=SUBMISSION_FOLDER)
@click.option(
    "--track",
    type=TRACK,
    default="1",
    help="Pack for this track; 2 bundles the trained models with a script that samples them.",
)
@click.option(
    "--out", type=FILE, help=f"Write the zip to this file.  [default: {_SUBMISSION_FILE}, or {BUNDLE_FILE} on track 2]"
)
@click.option(
    "--name",
    help=f"Record the zip in {PACKED_FILE} under this name, which no other files may have.  "
    "[default: the zip's own name, with a number if that is in use]",
)
@click.option("--strict", is_flag=True, help="Refuse a submission that has warnings.")
@ignore_option("Ignore findings with this code; repeatable.")
@_bundle_options
@output_options
def pack(
    output: Output,
    folder: Path,
    track: str,
    out: Path | None,
    name: str | None,
    strict: bool,
    ignore_codes: tuple[str, ...],
    **options: Any,
) -> None:
    """Check FOLDER and write the submission zip, with the tensors at its root.

    The zip is read back as the scorer reads it. If `ddkit check` refuses the submission, nothing is packed and an earlier
    zip is kept. The same tensors always make the same zip.
    `ddkit report --history` lists what was packed, and `ddkit check` recognizes a zip by its hash.

    On track 2 the models are bundled with a stand-alone generate.py. Before the zip takes its place, the bundle is
    unpacked into an empty folder and run there without ddkit, and the images it makes are checked. Before that, a
    classifier is trained on the dataset's real images, and their modes are found, once, in minutes on a CPU; a bundle with
    --keep 1 and --mode-guidance 0 needs neither.
    """
    if given := given_options(options if track == "1" else ("folder", "strict", "ignore_codes")):
        other = 3 - int(track)
        raise UsageError(f"{given[0]} applies to track {other} only.", f"Leave it out, or pack for --track {other}.")
    if options["no_proof"]:
        refuse_unused(("proof_budget", "proof_images", "fresh_venv"), "with --no-proof")
    if track == "2":
        from ddkit.cli._bundle import pack_track_2

        pack_track_2(output, out, name, options)
    else:
        _pack_track_1(output, folder, out or _SUBMISSION_FILE, name, strict, ignore_codes)


def _pack_track_1(
    output: Output, folder: Path, out: Path, name: str | None, strict: bool, ignore_codes: tuple[str, ...]
) -> None:
    from ddkit.packing import pack as packing

    output.note(f"Checking {folder} and packing it into {out}.")
    findings: list[Finding] = []

    def on_report(report: Report) -> None:
        findings.extend(report.findings)
        for finding in report.findings:
            if finding.level == "warning" or finding.code == _ORDER_NOT_COMPARED:
                output.note(f"{finding.code}: {finding.message}", label=finding.level)

    path = packing.pack(
        folder,
        out,
        strict=strict,
        ignore_codes=ignore_codes,
        name=name,
        records=PackedRecords(),
        on_report=on_report,
        on_event=output.note,
        progress=output.progress,
    )
    files = packing.packed_files(path)
    sha256 = sha256_of(path)
    data = {"path": str(path), "sha256": sha256, "files": [vars(file) for file in files],
            "findings": [vars(finding) for finding in findings]}  # fmt: skip
    output.result(data, files_table(files, path, sha256))
    scored = any(file.name == f"{spec.name}.pt" for file in files for spec in CHALLENGE_DATASETS)
    use = f"Upload {path}." if scored else "For practice only: the challenge does not score these datasets."
    output.note(f"The zip was read back and verified. {use}")
    output.finish([path], "ddkit report")


def files_table(files: Sequence[PackedFile], path: Path, sha256: str) -> Table:
    """The files in a zip, and the zip itself, with sizes and hashes."""
    table = plain_table("in the zip", "bytes", "SHA-256", right=("bytes",))
    for file in files:
        table.add_row(file.name, f"{file.size:,}", file.sha256)
    table.add_row(Text(path.name, style="bold"), f"{path.stat().st_size:,}", sha256)
    return table
