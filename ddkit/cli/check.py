"""`ddkit check`: whether a submission is what the challenge takes, and means what its rows say."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
from rich.markup import escape

from ddkit.cli._options import SUBMISSION_FOLDER, FindingCode, example, output_options
from ddkit.cli._output import Output
from ddkit.errors import UsageError


@click.command(epilog=example("ddkit check submission.zip --strict"))
@click.argument("path", type=click.Path(path_type=Path), default=SUBMISSION_FOLDER)
@click.option("--dataset", metavar="NAME", help="Of a single file whose name does not say it.")
@click.option("--ipc", type=click.IntRange(min=1), help="Images per class there must be.  [default: the challenge's 10]")
@click.option("--strict", is_flag=True, help="Warnings make it unacceptable too.")
@click.option(
    "--ignore",
    "ignored",
    multiple=True,
    type=FindingCode(),
    metavar="CODE",
    help="Leave out findings of this code; repeatable.",
)
@click.option(
    "--fix-order",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="OUT",
    help="Write the tensor with its rows in the right order, as far as the real images tell it.",
)
@output_options
@click.pass_context
def check(
    ctx: click.Context, output: Output, path: Path, dataset: str | None, ipc: int | None, strict: bool,
    ignored: tuple[str, ...], fix_order: Path | None,
) -> None:  # fmt: skip
    """Check a submission folder, a zip or one tensor; nothing in it is executed.

    Looks at files, shapes and values, and, where the real images are prepared, at what the rows show: labels are
    implied by the order of the rows, and nothing in the official scorer notices when that is wrong.
    Codes are explained in submission/README.md. Ends with status 1 where the submission is unacceptable.
    """
    from dataclasses import replace

    from ddkit.checks.check import CheckSettings, check_path
    from ddkit.checks.order import reorder_rows
    from ddkit.cli._findings import findings_table

    if dataset is not None and (path.is_dir() or path.suffix.lower() == ".zip"):
        raise UsageError("--dataset is of a single file; in a folder or a zip the files' names say it.")
    if fix_order is not None and (ipc or strict or ignored):
        raise UsageError("--fix-order writes a tensor and judges nothing: --ipc, --strict and --ignore do not go with it.")
    if fix_order is not None:
        moved = reorder_rows(path, fix_order, dataset=dataset)
        output.result({"wrote": str(fix_order), "moved_rows": moved}, f"{moved} rows moved.")
        output.done([fix_order], f"ddkit check {fix_order}" + (f" --dataset {dataset}" if dataset else ""))
        return
    output.say(f"Checking {escape(str(path))}.")
    settings = CheckSettings() if ipc is None else replace(CheckSettings(), ipc=ipc)
    report = check_path(path, dataset=dataset, settings=settings, progress=output.listen).ignoring(ignored)
    report = report.strict() if strict else report
    output.result({"path": str(path), **report.to_json()}, findings_table(report, path))
    if not report.ok:
        ctx.exit(1)
    output.done([], f"ddkit pack{'' if path == SUBMISSION_FOLDER else f' {shlex.quote(str(path))}'}" if path.is_dir() else "")
