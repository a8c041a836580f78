"""`ddkit train`: train a class-conditional generator on a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddkit.cli._options import COUNT, FOLDER, RUNS_FOLDER, Duration, example, resumable_options, save_every_option
from ddkit.cli._output import Output, plain_table
from ddkit.errors import BadFileError
from ddkit.generator.config import ARCHITECTURES, METHODS, PRECISIONS, PREDICTIONS, MinimaxConfig
from ddkit.generator.presets import DEFAULT_PRESET, PRESETS
from ddkit.generator.training.run_folder import CHART_FILE, has_training
from ddkit.runtime.environment import is_main
from ddkit.runtime.files import read_json
from ddkit.runtime.progress import span_text

_FEATURES = ("convnet", "inception")  # the default first
_MOST_NAMED = 5  # classes

if TYPE_CHECKING:
    from ddkit.generator.pretrained import Start
    from ddkit.generator.training.estimate import Estimate
    from ddkit.generator.training.train import TrainingRequest


def _read_class_map(
    context: click.Context, option: click.Parameter, path: Path | None
) -> tuple[tuple[str, str | int | None], ...] | None:
    if path is None:
        return None
    value = read_json(path)
    if not isinstance(value, dict) or not all(type(label) in (str, int, type(None)) for label in value.values()):
        raise BadFileError(f"{path} is not a map of classes.", 'Write it as {"bear": "brown bear", "cloud": null, "ox": 345}.')
    return tuple(sorted(value.items(), key=lambda pair: pair[0]))


@click.command(short_help="Train a generator.", epilog=example("ddkit train --dataset cifar100 --preset tiny --time 30m"))
@click.option("--dataset", required=True, metavar="NAME", help="Train on this dataset, which `ddkit data list` shows.")
@click.option(
    "--preset",
    "preset_name",
    type=click.Choice(tuple(PRESETS)),
    help=f"Choose sizes and settings.  [default: {DEFAULT_PRESET}, or what fits into the GPU's memory]",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    help="Train a new generator (diffusion), or fine-tune one by the minimax criteria (minimax).  "
    "[default: train a new one, unless --init or the preset says otherwise]",
)
@click.option(
    "--init", metavar="FOLDER_OR_HUB_ID", help="Minimax: start from this generator.  [default: runs/<dataset>, if it holds one]"
)
@click.option("--full", is_flag=True, default=None, help="Minimax: train all parameters, not only those of DiffFit.")
@click.option(
    "--lambda-r",
    type=click.FloatRange(0),
    help=f"Minimax: set the weight of representativeness.  [default: {MinimaxConfig.lambda_r}]",
)
@click.option(
    "--lambda-d", type=click.FloatRange(0), help=f"Minimax: set the weight of diversity.  [default: {MinimaxConfig.lambda_d}]"
)
@click.option(
    "--memory-size",
    type=COUNT,
    help=f"Minimax: compare with this many latents of each class.  [default: {MinimaxConfig.memory_size}]",
)
@click.option(
    "--epochs",
    type=COUNT,
    help=f"Minimax: train for this many passes over the training set, instead of --steps.  [default: {MinimaxConfig.epochs}]",
)
@click.option(
    "--class-map",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    callback=_read_class_map,
    help="Minimax: read the label of --init for each class from this JSON file; null takes the mean of all labels.",
)
@click.option(
    "--steps", type=COUNT, help="Train the denoiser for this many steps in all, after the autoencoder.  [default: the preset's]"
)
@click.option("--time", "seconds", type=Duration(), help="Train for this much time in all, such as 20m, instead of --steps.")
@click.option(
    "--batch-size", type=COUNT, help="Train on this many images in each step, over all processes.  [default: the preset's]"
)
@click.option(
    "--lr",
    "learning_rate",
    type=click.FloatRange(0, min_open=True),
    help="Set the learning rate of the denoiser.  [default: the preset's]",
)
@click.option(
    "--ema-width",
    type=click.FloatRange(0, 0.28, min_open=True, max_open=True),
    help="Set the relative width of the weights' moving average (sigma_rel of EDM2).  [default: the preset's]",
)
@click.option(
    "--ema-decay",
    type=click.FloatRange(0, 1, max_open=True),
    help="Set a constant decay of the weights' moving average, instead of --ema-width.",
)
@click.option(
    "--accumulation", type=COUNT, help="Compute each step in this many parts, to save memory.  [default: the preset's]"
)
@click.option(
    "--prediction", type=click.Choice(PREDICTIONS), help="Choose what the denoiser learns to predict.  [default: the preset's]"
)
@click.option(
    "--label-dropout",
    type=click.FloatRange(0, 1, max_open=True),
    help="Hide the class of this fraction of the images; guidance needs it.  [default: the preset's]",
)
@click.option(
    "--min-snr",
    type=click.FloatRange(0),
    help="Set gamma of min-SNR weighting, for the predictions v and epsilon; 0 weights all noise levels equally.  "
    "[default: the preset's]",
)
@click.option(
    "--architecture", type=click.Choice(ARCHITECTURES), help="Choose the denoiser's architecture.  [default: the preset's]"
)
@click.option(
    "--flips/--no-flips",
    default=None,
    help="Train on mirrored images as well, which is wrong for letters and digits.  [default: the preset's]",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Compute in this precision. bfloat16 is faster on GPUs and processors with instructions for it.  "
    "[default: the preset's, or the faster one]",
)
@click.option(
    "--compile/--no-compile", default=None, help="Compile the networks if the training is long enough.  [default: the preset's]"
)
@click.option(
    "--autoencoder", metavar="FOLDER_OR_HUB_ID", help="Use a pretrained autoencoder, such as stabilityai/sd-vae-ft-mse."
)
@click.option("--resume", is_flag=True, help="Fail if there is no training to continue.")
@click.option("--fresh", is_flag=True, help="Remove the training in the folder, and start over.")
@click.option(
    "--out",
    "folder",
    type=FOLDER,
    help="Write the training to this folder.  [default: runs/<dataset>, or runs/<dataset>-minimax]",
)
@click.option(
    "--track-every",
    type=click.IntRange(0),
    metavar="STEPS",
    help="Measure the model's Frechet distance every so many steps, and keep the best model; 0 turns it off.  "
    "[default: the preset's]",
)
@click.option(
    "--features",
    type=click.Choice(_FEATURES),
    help=f"Compute the Frechet distance in a ConvNet trained on the real images, or in Inception.  [default: {_FEATURES[0]}]",
)
@save_every_option("5m")
@click.option("--tensorboard", is_flag=True, help="Also write records for TensorBoard.")
@click.option("--dry-run", is_flag=True, help="Only show what the training would cost: parameters, memory, speed.")
@resumable_options
def train(output: Output, dataset: str, dry_run: bool, **options: Any) -> None:
    """Train a generator, or continue its training.

    An autoencoder is trained first, then a denoiser of its latents. Run the command again to continue after an
    interruption, or to train for longer with more --steps or --time. Several GPUs share the batches with
    accelerate launch -m ddkit train.
    """
    from ddkit.generator.training import plan as training

    data = training.TrainingData.open(dataset, progress=output.progress)
    settings = {name: options.pop(name) for name in training.SETTINGS}
    request = training.plan_training(data, settings, runs=RUNS_FOLDER, **options)
    for choice in request.choices:
        output.note(choice)
    if request.start is not None:
        output.note(_described(request.start))
    if dry_run:
        if is_main():
            output.note("Measuring each stage for a few seconds; nothing is kept.")
            _show_costs(output, request, *training.measure_costs(data, request))
        return
    training.require_memory(data, request)
    training.require_time(data, request)
    verb = "Fine-tuning" if request.start else "Training"
    if has_training(request.folder) and not request.fresh:
        verb = "Continuing to train"
    folder = request.folder
    config = request.config
    before = "" if config.minimax or config.pretrained_autoencoder else f"{config.autoencoder_optimizer.steps:,} + "
    length = f"{before}{config.denoiser_optimizer.steps:,} steps" if request.seconds is None else span_text(request.seconds)
    output.note(f"{verb} a generator on {dataset}, preset {request.preset}, {length}, in {folder}.")
    model = training.train(data, request, progress=output.progress)
    model_option = () if folder == RUNS_FOLDER / dataset else ("--model", folder)
    output.finish([folder, folder / CHART_FILE], f"ddkit generate --ipc 10 --dataset {dataset}", *model_option)
    output.result(
        {"folder": str(folder), "steps": model.facts.steps, "images_seen": model.facts.images_seen}
        | {"metrics": dict(model.facts.metrics)}
        | _start_facts(request)
    )


def _described(start: Start) -> str:
    """The start of a fine-tuning: how much of it is trained, and which classes it knows."""
    counts, unmatched = start.parameters, start.classes.unmatched
    known = len(start.classes.names) - len(unmatched)
    text = (
        f"Starting from {start.source}: {counts.trainable / 1e6:,.2f} M of {counts.total / 1e6:,.2f} M parameters "
        f"are trained ({100 * counts.fraction:.3g} %), {known} of {len(start.classes.names)} classes are known by name"
    )
    if not unmatched:
        return f"{text}."
    more = " ..." if len(unmatched) > _MOST_NAMED else ""
    return f"{text}; the mean of all labels stands for {', '.join(unmatched[:_MOST_NAMED])}{more}."


def _start_facts(request: TrainingRequest) -> dict[str, Any]:
    """The start of a fine-tuning: how much of it is trained, and which classes it does not know."""
    if request.start is None:
        return {}
    parameters, classes = request.start.parameters, request.start.classes
    return {"start": {"source": request.start.source, "trainable_parameters": parameters.trainable,
                      "parameters": parameters.total, "unmatched_classes": list(classes.unmatched)}}  # fmt: skip


def _show_costs(output: Output, request: TrainingRequest, costs: Estimate, shortage: Exception | None) -> None:
    if shortage is not None:
        output.note(str(shortage), label="warning")
    if request.seconds is None:
        steps: Sequence[int | None] = [stage.steps for stage in costs.stages]
    else:
        steps = costs.steps_within(request.seconds)
    facts = {"fits": costs.fits, "steps": steps, "config": dataclasses.asdict(request.config), "choices": request.choices}
    numbers = ("parameters", "memory", "images/s", "steps", "batch", "time")
    table = plain_table("stage", *numbers, right=numbers)
    for stage, count in zip(costs.stages, steps, strict=True):
        speed, seconds = stage.images_per_second, stage.seconds_for(count)
        table.add_row(
            stage.stage,
            f"{stage.parameters / 1e6:.2f} M",
            f"{stage.memory / 2**20:,.0f} MiB",
            "does not fit" if speed is None else f"{speed:,.0f}",
            "n/a" if count is None else f"{count:,}",
            f"{stage.batch_size:,}",
            "n/a" if seconds is None else span_text(seconds),
        )
    table.caption = f"{costs.free_memory / 2**30:.1f} GiB of memory are free. Compiled training is faster than shown."
    output.result(dataclasses.asdict(costs) | facts | _start_facts(request), table)
