"""The options of `ddkit train --method minimax`, and words for the generator that it starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from ddkit.errors import BadFileError
from ddkit.runtime.files import read_json

if TYPE_CHECKING:
    from ddkit.generator.pretrained import Start

_MOST_NAMED = 5  # classes


def _read_class_map(
    context: click.Context, option: click.Parameter, path: Path | None
) -> tuple[tuple[str, str | int | None], ...] | None:
    if path is None:
        return None
    value = read_json(path)
    if not isinstance(value, dict) or not all(type(label) in (str, int, type(None)) for label in value.values()):
        raise BadFileError(f"{path} is not a map of classes.", 'Write it as {"bear": "brown bear", "cloud": null, "ox": 345}.')
    return tuple(sorted(value.items(), key=lambda pair: pair[0]))


_OPTIONS = (
    click.option("--method", type=click.Choice(["diffusion", "minimax"]),
                 help="Train a new generator (diffusion), or fine-tune one by the minimax criteria (minimax)."),
    click.option("--init", metavar="FOLDER_OR_HUB_ID",
                 help="Minimax: start from this generator.  [default: runs/<dataset>, if it holds one]"),
    click.option("--full", is_flag=True, default=None, help="Minimax: train all parameters, not only those of DiffFit."),
    click.option("--lambda-r", type=click.FloatRange(0), help="Minimax: set the weight of representativeness."),
    click.option("--lambda-d", type=click.FloatRange(0), help="Minimax: set the weight of diversity."),
    click.option("--memory-size", type=click.IntRange(1), help="Minimax: compare with this many latents of each class."),
    click.option("--epochs", type=click.IntRange(1),
                 help="Minimax: train for this many passes over the training set, instead of --steps."),
    click.option("--class-map", type=click.Path(exists=True, dir_okay=False, path_type=Path), callback=_read_class_map,
                 help="Minimax: read from this JSON file which label of --init each class takes; null takes the mean."),
)  # fmt: skip


def minimax_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--method and the options of --method minimax."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def described(start: Start) -> str:
    """The start of a fine-tuning: how much of it is trained, and which classes it knows."""
    counts, unmatched = start.parameters, start.classes.unmatched
    known = len(start.classes.names) - len(unmatched)
    text = (
        f"Starting from {escape(start.source)}: {counts.trainable / 1e6:,.2f} M of {counts.total / 1e6:,.2f} M parameters "
        f"are trained ({100 * counts.fraction:.3g} %), {known} of {len(start.classes.names)} classes are known by name"
    )
    if not unmatched:
        return f"{text}."
    more = " ..." if len(unmatched) > _MOST_NAMED else ""
    return f"{text}; the mean of all labels stands for {escape(', '.join(unmatched[:_MOST_NAMED]))}{more}."
