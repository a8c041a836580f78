"""`ddkit demo`: every stage of an entry on built-in images."""

from __future__ import annotations

from pathlib import Path

import click

from ddkit.cli._options import FOLDER, compute_options, example
from ddkit.cli._output import Output
from ddkit.cli.enter import make_entry
from ddkit.distill.settings import RefineSettings
from ddkit.entering.recipe import Recipe, SetRecipe

# The official setting is 1000. With 60 the demo takes minutes, and good sets still differ from bad ones.
_EPOCHS_SETTING = 60


@click.command(short_help="Run every step on built-in images.", epilog=example("ddkit demo --folder /tmp/ddkit-demo"))
@click.option(
    "--folder",
    type=FOLDER,
    default=Path("ddkit-demo"),
    help="Write everything to this folder.",
)
@compute_options
def demo(output: Output, folder: Path, device: str, seed: int) -> None:
    """Run every step on built-in images: train, generate, refine, evaluate, check, pack, report.

    It takes minutes on a laptop's CPU and downloads nothing. If it is interrupted, run it again to continue. It is
    `ddkit enter` with a built-in recipe.
    """
    output.note(f"Running every step on built-in images of letters, in {folder}. This takes minutes on two cores.")
    make_entry(output, _recipe(seed), folder, None, device, then="ddkit enter --time 8h")


def _recipe(seed: int) -> Recipe:
    refining = RefineSettings(batch_real=16, val_every=60, val_epochs=20, seed=seed)
    letters = SetRecipe("glyphs", preset="demo", refine=refining, refine_steps=60)
    return Recipe((letters,), seed=seed, epochs_setting=_EPOCHS_SETTING)
