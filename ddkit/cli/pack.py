"""`ddkit pack`: the zip to upload."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.markup import escape

from ddkit.challenge import CHALLENGE_DATASETS
from ddkit.cli._bundle import bundle_options, files_table, pack_track_2
from ddkit.cli._options import BUNDLE_FILE, FILE, FOLDER, SUBMISSION_FOLDER, TRACK, example, ignore_option, output_options
from ddkit.cli._output import Output
from ddkit.errors import UsageError
from ddkit.history import PACKED_FILE, PackedRecords
from ddkit.runtime.files import sha256_of

if TYPE_CHECKING:
    from ddkit.sets.findings import Finding, Report

_SUBMISSION_FILE = Path("submission.zip")
_OF_TRACK_1 = ("folder", "strict", "ignore_codes")
_OF_BOTH = ("track", "out", "name")
_ORDER_NOT_COMPARED = "L011"  # a note that nobody should miss before the upload


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
@bundle_options
@output_options
@click.pass_context
def pack(
    ctx: click.Context,
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
    unpacked into an empty folder and run there without ddkit, and the images it makes are checked.
    """
    _refuse_options_of_the_other_track(ctx, track)
    if track == "2":
        pack_track_2(output, out, name, options)
    else:
        _pack_track_1(output, folder, out or _SUBMISSION_FILE, name, strict, ignore_codes)


def _refuse_options_of_the_other_track(ctx: click.Context, track: str) -> None:
    """Raise UsageError for an option that would do nothing."""
    common = {*_OF_BOTH, "as_json", "quiet", "verbose", "debug", "help"}
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name in common or (name in _OF_TRACK_1) == (track == "1"):
            continue
        if ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None):
            raise UsageError(
                f"{parameter.opts[0]} applies to track {3 - int(track)} only.",
                f"Leave it out, or add --track {3 - int(track)}.",
            )


def _pack_track_1(
    output: Output, folder: Path, out: Path, name: str | None, strict: bool, ignore_codes: tuple[str, ...]
) -> None:
    from ddkit.packing import pack as packing

    output.event(f"Checking {folder} and packing it into {out}.")
    findings: list[Finding] = []

    def on_report(report: Report) -> None:
        findings.extend(report.findings)
        for finding in report.findings:
            if finding.level == "warning" or finding.code == _ORDER_NOT_COMPARED:
                output.note(f"[yellow]{finding.level}[/yellow] {escape(f'{finding.code}: {finding.message}')}")

    path = packing.pack(
        folder,
        out,
        strict=strict,
        ignore_codes=ignore_codes,
        name=name,
        records=PackedRecords(),
        on_report=on_report,
        on_event=output.event,
        progress=output.progress,
    )
    files = packing.packed_files(path)
    sha256 = sha256_of(path)
    data = {"path": str(path), "sha256": sha256, "files": [vars(file) for file in files],
            "findings": [vars(finding) for finding in findings]}  # fmt: skip
    output.result(data, files_table(files, path, sha256))
    scored = any(file.name == f"{spec.name}.pt" for file in files for spec in CHALLENGE_DATASETS)
    use = f"Upload {path}." if scored else "For practice only: the challenge does not score these datasets."
    output.event(f"The zip was read back and verified. {use}")
    output.finish([path], "ddkit report")
