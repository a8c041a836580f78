"""`ddkit demo`: every step on built-in images, as the commands that a person would type."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
from rich.markup import escape

from ddkit.cli import wants_traceback
from ddkit.cli._options import device_option, example, output_options, seed_option
from ddkit.cli._output import Output

# The official setting is 1000. With 60 the demo takes minutes, and good sets still differ from bad ones.
_EPOCHS_SETTING = "60"


@click.command(short_help="Run every step on built-in images.", epilog=example("ddkit demo --folder /tmp/ddkit-demo"))
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("ddkit-demo"),
    show_default=True,
    help="Write everything to this folder.",
)
@device_option
@seed_option
@output_options
@click.pass_context
def demo(ctx: click.Context, output: Output, folder: Path, device: str, seed: int) -> None:
    """Run every step on built-in images: train, generate, evaluate, refine, check, pack, report.

    It takes minutes on a laptop's CPU and downloads nothing. If it is interrupted, run it again to continue.
    """
    output.note(f"Running every step on built-in images of letters, in {escape(str(folder))}. This takes minutes on two cores.")
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    flags = ["--quiet"] * output.quiet + ["--verbose"] * output.verbosity + ["--debug"] * wants_traceback(ctx)
    # With --json there must be only one document on standard output.
    shown = contextlib.redirect_stdout(sys.stderr) if output.as_json else contextlib.nullcontext()
    with _inside(folder), shown:
        for words in _steps(device, seed):
            output.note(f"\n[bold]$ ddkit {escape(shlex.join(words))}[/bold]")
            status = ctx.find_root().command.main([*words, *flags], prog_name="ddkit", standalone_mode=False)
            if status:
                ctx.exit(status)
    seconds = time.monotonic() - began
    written = [folder / name for name in ("submission/glyphs.png", "report.html", "submission.zip")]
    output.note(f"\nAll steps together took {seconds:.0f} s.")
    output.finish(written, "ddkit train --dataset cifar100")
    output.result({"seconds": seconds, "files": written})


def _steps(device: str, seed: int) -> list[list[str]]:
    compute = ["--device", device, "--seed", str(seed)]
    quick = ["--epochs-setting", _EPOCHS_SETTING, *compute]
    return [
        ["data", "prepare", "glyphs"],
        ["train", "--dataset", "glyphs", "--preset", "demo", *compute],
        ["generate", "--dataset", "glyphs", "--ipc", "10", "--replace", *compute],
        ["generate", "--dataset", "glyphs", "--ipc", "10", "--from-real", "random", "--out", "baseline/glyphs.pt",
         "--seed", str(seed)],
        ["evaluate", "submission/glyphs.pt", *quick],
        ["evaluate", "baseline/glyphs.pt", *quick],
        ["refine", "submission/glyphs.pt", "--steps", "60", "--batch-real", "16", "--set", "val_every=60",
         "--set", "val_epochs=20", *compute],
        ["evaluate", "submission/glyphs.pt", *quick],
        ["check"],
        ["pack"],
        ["report", "--html", "report.html"],
    ]  # fmt: skip


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Make `folder` the current folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
