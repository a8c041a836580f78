"""What `ddkit train --method minimax` adds: its options, and its start from a generator that is there already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from ddkit.cli._options import RUNS_FOLDER
from ddkit.cli._surface import Surface
from ddkit.errors import BadFile, MissingModel, UsageError
from ddkit.files import read_json

if TYPE_CHECKING:
    from ddkit.generator.presets import GeneratorConfig
    from ddkit.generator.pretrained import Start
    from ddkit.generator.training import TrainingData

_SETTINGS = ("init", "full", "lambda_r", "lambda_d", "memory_size", "epochs")  # of MinimaxConfig
_FROM_START = ("prediction", "architecture", "autoencoder")  # what a start decides
_MOST_NAMED = 5  # classes

_OPTIONS = (
    click.option("--method", type=click.Choice(["diffusion", "minimax"]),
                 help="diffusion: train from nothing; minimax: fine-tune a generator by the minimax criteria."),
    click.option("--init", metavar="FOLDER_OR_HUB_ID",
                 help="minimax: what to start from.  [default: runs/<dataset>, else facebook/DiT-XL-2-256]"),
    click.option("--full", is_flag=True, default=None, help="minimax: tune all parameters, not only DiffFit's."),
    click.option("--lambda-r", type=click.FloatRange(0), help="minimax: weight of representativeness."),
    click.option("--lambda-d", type=click.FloatRange(0), help="minimax: weight of diversity."),
    click.option("--memory-size", type=click.IntRange(1), help="minimax: latents of each class to compare with."),
    click.option("--epochs", type=click.IntRange(1), help="minimax: over the training set, in place of --steps."),
    click.option("--class-map", type=click.Path(exists=True, dir_okay=False, path_type=Path),
                 help="minimax: JSON of classes and the start's labels, by name or number, or null for their mean."),
)  # fmt: skip


def minimax_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of --method minimax and --method itself."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def wants_minimax(
    preset_name: str | None, settings: dict[str, Any], begun: GeneratorConfig | None = None
) -> bool:
    """Whether the options, or the training that is to go on, ask for fine-tuning.

    Raises UsageError where they contradict each other.
    """
    from ddkit.generator.presets import MINIMAX_PRESET

    method = settings["method"]
    implied = preset_name == MINIMAX_PRESET or settings["init"] is not None or bool(begun and begun.minimax)
    if method == "diffusion" and implied:
        raise UsageError(
            "--method diffusion starts from nothing.",
            f"It does not go with --init, --preset {MINIMAX_PRESET} or a folder that holds a fine-tuning.",
        )
    wanted = method == "minimax" or (method is None and implied)
    if alien := [name for name in _FROM_START if wanted and settings[name] is not None]:
        raise UsageError(f"--{alien[0]} is decided by what fine-tuning starts from, --init.")
    return wanted


def refuse_minimax_settings(settings: dict[str, Any]) -> None:
    """Raise UsageError where options of --method minimax are given without it."""
    if alien := [name for name in (*_SETTINGS, "class_map") if settings[name] is not None]:
        raise UsageError(f"--{alien[0].replace('_', '-')} goes with --method minimax.")


def configure_minimax(
    config: GeneratorConfig, begun: GeneratorConfig | None, dataset: str, settings: dict[str, Any]
) -> GeneratorConfig:
    """A preset's configuration with what the options say of fine-tuning.

    begun: that of the training that is to go on, whose settings of fine-tuning need not be said again.
    """
    from ddkit.generator.pipeline import has_model
    from ddkit.generator.presets import MINIMAX_PRESET, preset

    base = begun.minimax if begun else None
    given = {name: settings[name] for name in _SETTINGS if settings[name] is not None}
    if settings["class_map"] is not None:
        given["class_map"] = _read_class_map(settings["class_map"])
    if base is None:
        base, own = config.minimax or preset(MINIMAX_PRESET).config(32).minimax, RUNS_FOLDER / dataset
        if has_model(own):
            base = dataclasses.replace(base, init=str(own))
    return dataclasses.replace(config, minimax=dataclasses.replace(base, **given))


def begin(
    surface: Surface, config: GeneratorConfig, data: TrainingData, settings: dict[str, Any], *, new: bool
) -> tuple[Start, GeneratorConfig]:
    """Read what fine-tuning starts from, say what of it is trained, and complete the configuration by it.

    new: no training goes on, whose length and mirroring would be known.
    """
    from ddkit.generator.pipeline import has_model
    from ddkit.generator.pretrained import start_from
    from ddkit.generator.run_folder import recorded_config

    minimax = config.minimax
    names = data.images.class_names
    try:
        start = start_from(minimax.init, names, full=minimax.full, chosen=dict(minimax.class_map))
    except MissingModel as error:
        if settings["init"] is not None:
            raise
        raise MissingModel(
            f"There is no generator of '{data.name}' to start from, and {error.message}",
            f"Train one: ddkit train --dataset {data.name}. {error.remedy}",
        ) from error
    surface.say(_described(start))
    optimiser = config.denoiser_optimiser
    if settings["steps"] is None and (new or settings["epochs"] is not None):
        steps = max(1, minimax.epochs * len(data.images) // optimiser.batch_size)
        optimiser = dataclasses.replace(optimiser, steps=steps)
    own = Path(minimax.init).expanduser()
    if new and settings["flips"] is None and has_model(own) and (before := recorded_config(own)):
        config = dataclasses.replace(config, flips=before.flips)
    objective = dataclasses.replace(config.objective, prediction=start.generator.prediction)
    return start, dataclasses.replace(config, objective=objective, denoiser_optimiser=optimiser)


def _described(start: Start) -> str:
    counts, unmatched = start.parameters, start.classes.unmatched
    known = len(start.classes.names) - len(unmatched)
    text = (
        f"Starting from {escape(start.source)}: {counts.trainable / 1e6:,.2f} M of {counts.total / 1e6:,.2f} M parameters "
        f"are trained ({100 * counts.fraction:.3g} %), {known} of {len(start.classes.names)} classes known by name"
    )
    if not unmatched:
        return f"{text}."
    more = " ..." if len(unmatched) > _MOST_NAMED else ""
    return f"{text}; the mean of all stands for {escape(', '.join(unmatched[:_MOST_NAMED]))}{more}."


def _read_class_map(path: Path) -> tuple[tuple[str, str | int | None], ...]:
    value = read_json(path)
    if not isinstance(value, dict) or not all(isinstance(label, (str, int, type(None))) for label in value.values()):
        raise BadFile(f"{path} is no map of classes.", 'Write it as {"bear": "brown bear", "cloud": null, "ox": 345}.')
    return tuple(sorted(value.items(), key=lambda pair: pair[0]))
