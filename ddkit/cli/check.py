"""The command `ddkit check`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from ddkit.challenge import TRACKS
from ddkit.cli._options import COUNT, FILE, PATH, SUBMISSION_FOLDER, example, ignore_option, output_options, refuse_unused
from ddkit.cli._output import Output, plain_table
from ddkit.errors import counted
from ddkit.results import RESULTS_FILE
from ddkit.sets.findings import Report

if TYPE_CHECKING:
    from ddkit.history import Known

_COLORS = {"error": "red", "warning": "yellow", "info": "cyan"}


@click.command(short_help="Find what is wrong with a submission.", epilog=example("ddkit check submission.zip --strict"))
@click.argument("path", type=PATH, default=SUBMISSION_FOLDER)
@click.option("--dataset", metavar="NAME", help="Name the dataset of a single file that is not named after it.")
@click.option("--ipc", type=COUNT, default=TRACKS[1].ipc, help="Require this many images per class.")
@click.option("--strict", is_flag=True, help="Treat warnings as errors.")
@ignore_option("Leave out findings with this code; repeatable.")
@click.option(
    "--fix-order",
    type=FILE,
    metavar="OUT",
    help="Write the tensor to OUT with its rows in the order that the real images suggest, and check nothing.",
)
@click.option(
    "--results",
    type=FILE,
    default=RESULTS_FILE,
    help="Look up in this file what was evaluated, and in packed.jsonl next to it what was packed.",
)
@output_options
@click.pass_context
def check(
    ctx: click.Context, output: Output, path: Path, dataset: str | None, ipc: int, strict: bool,
    ignore_codes: tuple[str, ...], fix_order: Path | None, results: Path,
) -> None:  # fmt: skip
    """Check a submission folder, a zip, or one tensor, without executing anything in it.

    The check covers files, shapes and values. If the real images are prepared, the rows are compared with them as well:
    the order of the rows implies the labels, and the official scorer does not notice when it is wrong.
    It also says which of the files were evaluated or packed before, by their hashes.
    The codes are explained in submission/README.md. The exit status is 1 if the submission is unacceptable.
    """
    from ddkit.checks import check as checks
    from ddkit.checks import order, recorded
    from ddkit.sets.distilled import check_command, dataset_of

    if fix_order is not None:
        refuse_unused(("ipc", "strict", "ignore_codes", "results"), "with --fix-order, which checks nothing")
        moved = order.reorder_rows(path, fix_order, dataset=dataset)
        output.result({"wrote": str(fix_order), "moved_rows": moved}, f"{moved} rows moved.")
        output.finish([fix_order], check_command(fix_order, dataset_of(path, dataset)))
        return
    output.note(f"Checking {path}.")
    report = checks.check_path(path, dataset=dataset, ipc=ipc, progress=output.progress).ignoring(ignore_codes)
    report = report.strict() if strict else report
    known = recorded.recorded_files(path, results)
    shown = Group(_findings_table(report, path), *(Text(text) for each in known for text in each.sentences()))
    data = {"path": str(path), **report.to_json(), "recorded": [_known_data(each) for each in known]}
    output.result(data, shown)
    if not report.ok:
        ctx.exit(1)
    folder = "" if path == SUBMISSION_FOLDER else f" {shlex.quote(str(path))}"
    output.finish([], f"ddkit pack{folder}" if path.is_dir() else "")


def _known_data(known: Known) -> dict[str, Any]:
    evaluated = [
        {"name": each.name, "dataset": each.dataset, "date": each.date, "accuracy": each.mean, "official": each.official,
         "epochs_setting": each.epochs_setting, "source": each.source}
        for each in known.results
    ]  # fmt: skip
    packed = [{"name": each.name, "date": each.date, "path": each.path} for each in known.packed]
    return {"file": known.file, "sha256": known.sha256, "evaluated": evaluated, "packed": packed, "recipe": known.recipe}


def _findings_table(report: Report, path: Path) -> RenderableType:
    """The verdict in one line, with a table of the findings below."""
    counts = {level: sum(finding.level == level for finding in report.findings) for level in _COLORS}
    verdict = Text.assemble(
        ("acceptable", "bold green") if report.ok else ("unacceptable", "bold red"),
        f"  {path}  ",
        (", ".join(counted(counts[level], level, level + "s") for level in ("error", "warning")), "dim"),
    )
    table = plain_table("", "", "", "")
    table.show_header = False
    for finding in report.findings:
        level = Text(finding.level, style=_COLORS[finding.level])
        table.add_row(level, finding.code, Text(finding.where), Text(finding.message))
    return Group(verdict, table) if report.findings else verdict
