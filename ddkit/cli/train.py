"""`ddkit train`: train a class-conditional generator on a dataset."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from ddkit.cli._minimax import begin, configure_minimax, minimax_options, refuse_minimax_settings, wants_minimax
from ddkit.cli._options import RUNS_FOLDER, Duration, device_option, example, recorded_seed_option, surface_options
from ddkit.cli._surface import Surface, span_text
from ddkit.errors import MissingModel, UsageError

if TYPE_CHECKING:
    from ddkit.generator.estimate import Estimate
    from ddkit.generator.presets import GeneratorConfig
    from ddkit.generator.pretrained import Start
    from ddkit.generator.tracking import Features
    from ddkit.generator.training import Tracking, TrainingData, TrainingRequest

_DEFAULT_PRESET = "tiny"
_TUNING_PRESET = "minimax-paper"


@dataclasses.dataclass(frozen=True)
class _Watch:
    """How a model is scored while it trains. every_steps: 0 for never."""

    every_steps: int
    features: str


@click.command(epilog=example("ddkit train --dataset cifar100 --preset tiny --time 30m"))
@click.option("--dataset", required=True, help="A dataset of `ddkit data list`.")
@click.option("--preset", "preset_name",
              help=f"Sizes and settings: demo, tiny, small, base, dit or {_TUNING_PRESET}.  [default: {_DEFAULT_PRESET}]")
@minimax_options
@click.option("--steps", type=click.IntRange(1), help="Of denoiser training, in all; the autoencoder's come first.")
@click.option("--time", "seconds", type=Duration(), help="Of training in all, such as 20m; takes the place of --steps.")
@click.option("--batch-size", type=click.IntRange(1), help="Images a step, over all processes.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="The denoiser's learning rate.")
@click.option("--ema-decay", type=click.FloatRange(0, 1, max_open=True), help="Of the averaged weights, at every step.")
@click.option("--accumulation", type=click.IntRange(1), help="Parts a step is computed in, where memory is short.")
@click.option("--prediction", type=click.Choice(["flow", "v", "epsilon"]), help="What the denoiser predicts.")
@click.option("--architecture", type=click.Choice(["uvit", "unet", "dit"]), help="Of the denoiser.")
@click.option("--flips/--no-flips", default=None, help="Show images mirrored as well; wrong for letters and digits.")
@click.option("--precision", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the computation.")
@click.option("--compile/--no-compile", "compile_network", default=None, help="Compile the networks first.")
@click.option("--autoencoder", metavar="HUB_ID_OR_FOLDER", help="A pretrained one to use, such as stabilityai/sd-vae-ft-mse.")
@click.option("--resume", is_flag=True, help="Insist on going on: an error where there is nothing to go on from.")
@click.option("--fresh", is_flag=True, help="Start over: removes the training that is in the folder.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="The run's folder.  [default: runs/<dataset>]")
@click.option("--track-every", type=click.IntRange(0), metavar="STEPS",
              help="Score the model so often by its Frechet distance, and keep the best; 0 for never.")
@click.option("--features", type=click.Choice(["convnet", "inception"]),
              help="Of the Frechet distance: of a ConvNet trained on the real images, or of Inception.  [default: convnet]")
@click.option("--save-every", type=Duration(), default="5m", show_default=True, help="How much work a kill may cost.")
@click.option("--tensorboard", is_flag=True, help="Write records for TensorBoard too.")
@click.option("--dry-run", is_flag=True, help="Only say what it would take: parameters, memory, speed.")
@device_option
@recorded_seed_option
@surface_options
def train(
    surface: Surface,
    dataset: str,
    preset_name: str | None,
    seconds: float | None,
    resume: bool,
    fresh: bool,
    out: Path | None,
    save_every: float,
    track_every: int | None,
    features: str | None,
    device: str,
    tensorboard: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Train a generator: an autoencoder, then a denoiser of its latents; or fine-tune one that is there.

    Run it again to go on where it stopped, or, with more --steps or --time, to train on.
    """
    from ddkit.generator.presets import preset
    from ddkit.generator.run_folder import recorded_config
    from ddkit.generator.training import TrainingRequest

    if resume and fresh:
        raise UsageError("--resume and --fresh contradict each other.")
    if settings["epochs"] is not None and (settings["steps"] is not None or seconds is not None):
        raise UsageError("--epochs says how long to train, as --steps and --time do: give one of them.")
    folder = out or RUNS_FOLDER / (f"{dataset}-minimax" if wants_minimax(preset_name, settings) else dataset)
    begun = None if fresh else recorded_config(folder)
    tuning = wants_minimax(preset_name, settings, begun)
    _check_folder(folder, resume)
    data = _open(surface, dataset)
    recorded_name = _preset_of(folder, fresh)
    preset_name = preset_name or recorded_name or (_TUNING_PRESET if tuning else _DEFAULT_PRESET)
    # What goes on has the settings it has, unless an option says otherwise.
    going_on = begun is not None and preset_name == recorded_name
    config = _configure(begun if going_on else preset(preset_name).config(data.image_size), settings)
    start = None
    if tuning:
        config = configure_minimax(config, begun, dataset, settings)
        start, config = begin(surface, config, data, settings, new=begun is None)
    else:
        refuse_minimax_settings(settings)
    if dry_run:
        _show_costs(surface, config, data, device, start)
        return
    request = TrainingRequest(config, preset_name, seconds, device, save_every, tensorboard)
    if track_every is None:
        track_every = preset(preset_name).track_every
    if features and not track_every:
        raise UsageError("--features are what --track-every looks with, and nothing is tracked.", "Give --track-every STEPS.")
    _train(surface, data, request, folder, fresh, _Watch(track_every, features or "convnet"), start)


def _check_folder(folder: Path, resume: bool) -> None:
    from ddkit.generator.run_folder import has_training

    if resume and not has_training(folder):
        raise MissingModel(f"There is no training in {folder} to go on from.", "Leave --resume away to begin one.")


def _open(surface: Surface, dataset: str) -> TrainingData:
    from ddkit.data.prepare import open_dataset
    from ddkit.data.store import store_hash
    from ddkit.generator.training import TrainingData

    images = open_dataset(dataset, "train", progress=surface.listen)
    return TrainingData(dataset, images, store_hash(dataset, "train"))


def _preset_of(folder: Path, fresh: bool) -> str | None:
    """The preset of the training that is to go on, so that it need not be said again."""
    from ddkit.generator.run_folder import recorded_preset

    return None if fresh else recorded_preset(folder)


def _configure(config: GeneratorConfig, settings: dict[str, Any]) -> GeneratorConfig:
    """A configuration with what the options say otherwise."""

    def given(**names: str) -> dict[str, Any]:
        return {field: settings[option] for field, option in names.items() if settings[option] is not None}

    optimiser = given(steps="steps", batch_size="batch_size", learning_rate="lr", accumulation="accumulation")
    return dataclasses.replace(
        config,
        denoiser=dataclasses.replace(config.denoiser, **given(architecture="architecture")),
        objective=dataclasses.replace(config.objective, **given(prediction="prediction")),
        denoiser_optimiser=dataclasses.replace(config.denoiser_optimiser, **optimiser),
        **given(
            precision="precision", compile="compile_network", pretrained_autoencoder="autoencoder", seed="seed",
            ema_decay="ema_decay", flips="flips",
        ),
    )


def _train(
    surface: Surface,
    data: TrainingData,
    request: TrainingRequest,
    folder: Path,
    fresh: bool,
    watch: _Watch,
    start: Start | None,
) -> None:
    from ddkit.device import resolve_device
    from ddkit.generator.estimate import check_memory
    from ddkit.generator.run_folder import CHART_FILE, has_training
    from ddkit.generator.training import train as train_generator

    classes, device = len(data.images.class_names), resolve_device(request.device)
    check_memory(request.config, data.image_size, classes, device, start=start)
    tracking = _tracking(surface, data, request.device, watch)
    verb = "Going on with" if has_training(folder) and not fresh else "Fine-tuning" if start else "Training"
    surface.say(
        f"{verb} a generator on {escape(data.name)}, preset {request.preset}, {_length(request)}, in {escape(str(folder))}."
    )
    model = train_generator(
        data, request, folder, start=start, tracking=tracking, fresh=fresh, progress=surface.listen
    )
    next_command = f"ddkit generate --ipc 10 --dataset {data.name}" + _model_option(folder, data.name)
    surface.done([folder, folder / CHART_FILE], next_command)
    surface.result(
        {"folder": str(folder), "steps": model.facts.steps, "images_seen": model.facts.images_seen}
        | {"metrics": dict(model.facts.metrics)}
    )


def _tracking(surface: Surface, data: TrainingData, device: str, watch: _Watch) -> Tracking | None:
    from ddkit.data.store import dataset_spec
    from ddkit.device import resolve_device
    from ddkit.generator.tracking import track_frechet
    from ddkit.metrics.features import reference_features

    if not watch.every_steps or len(data.images) < 2:
        return None
    chosen = resolve_device(device)
    if watch.features == "inception":
        from ddkit.metrics.inception import InceptionFeatures

        inception = InceptionFeatures(chosen)  # at once: that its weights are missing is to be known before hours of work
        return track_frechet(
            data.images, lambda: inception, every_steps=watch.every_steps, name="frechet_inception", device=chosen
        )

    def features() -> Features:
        return reference_features(data.images, dataset_spec(data.name), device=chosen, progress=surface.listen)

    return track_frechet(data.images, features, every_steps=watch.every_steps, device=chosen)


def _length(request: TrainingRequest) -> str:
    if request.seconds is not None:
        return span_text(request.seconds)
    config = request.config
    before = "" if config.minimax or config.pretrained_autoencoder else f"{config.autoencoder_optimiser.steps:,} + "
    return f"{before}{config.denoiser_optimiser.steps:,} steps"


def _model_option(folder: Path, dataset: str) -> str:
    return "" if folder == RUNS_FOLDER / dataset else f" --model {folder}"


def _show_costs(
    surface: Surface, config: GeneratorConfig, data: TrainingData, device: str, start: Start | None
) -> None:
    from ddkit.device import resolve_device
    from ddkit.generator.estimate import estimate
    from ddkit.generator.presets import to_json

    surface.say("Trying each stage for a few seconds; nothing is kept.")
    costs = estimate(config, data.image_size, len(data.images.class_names), resolve_device(device), start=start)
    surface.result(dataclasses.asdict(costs) | {"config": to_json(config)}, _cost_table(costs))


def _cost_table(costs: Estimate) -> Table:
    table = Table("stage", "parameters", "memory", "images/s", "steps", "batch", "in all")
    for stage in costs.stages:
        table.add_row(
            stage.stage,
            f"{stage.parameters / 1e6:.2f} M",
            f"{stage.memory / 2**20:,.0f} MiB",
            f"{stage.images_per_second:,.0f}",
            f"{stage.steps:,}",
            f"{stage.batch_size:,}",
            span_text(stage.seconds),
        )
    table.caption = f"{costs.free_memory / 2**30:.1f} GiB of memory are free; not compiled, so at worst"
    return table
