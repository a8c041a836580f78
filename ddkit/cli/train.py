"""`ddkit train`: train a class-conditional generator on a dataset."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
from rich.markup import escape

from ddkit.cli._options import RUNS_FOLDER, Duration, device_option, example, seed_option, surface_options
from ddkit.cli._surface import Surface


@click.command(epilog=example("ddkit train --dataset cifar100 --preset tiny --time 30m"))
@click.option("--dataset", required=True, help="A dataset of `ddkit data list`.")
@click.option("--preset", "preset_name", help="A set of sizes: demo, tiny, small or base.")
@click.option("--steps", type=click.IntRange(1), help="Of denoiser training, in all.")
@click.option("--time", "seconds", type=Duration(), help="Of training in all, such as 20m; takes the place of --steps.")
@click.option("--batch-size", type=click.IntRange(1), help="Images a step, over all processes.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="The denoiser's learning rate.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="The run's folder; runs/<dataset>.")
@device_option
@seed_option
@surface_options
def train(
    surface: Surface,
    dataset: str,
    preset_name: str | None,
    steps: int | None,
    seconds: float | None,
    batch_size: int | None,
    lr: float | None,
    out: Path | None,
    device: str,
    seed: int,
) -> None:
    """Train a generator: an autoencoder, then a denoiser of its latents. Run it again to go on."""
    from ddkit.data.prepare import open_dataset
    from ddkit.data.store import store_hash
    from ddkit.generator.presets import preset
    from ddkit.generator.training import TrainingData, TrainingRequest, train as train_generator
    from ddkit.protocol.device import resolve_device

    images = open_dataset(dataset, "train", progress=surface.listen)
    data = TrainingData(dataset, images, store_hash(dataset, "train"))
    config = dataclasses.replace(preset(preset_name or "tiny").config(data.image_size), seed=seed)
    changes = {"steps": steps, "batch_size": batch_size, "learning_rate": lr}
    optimiser = dataclasses.replace(
        config.denoiser_optimiser, **{name: value for name, value in changes.items() if value is not None}
    )
    config = dataclasses.replace(config, denoiser_optimiser=optimiser)
    folder = out or RUNS_FOLDER / dataset
    request = TrainingRequest(config, preset_name or "tiny", seconds, resolve_device(device))
    surface.say(f"Training a generator on {escape(dataset)} in {escape(str(folder))}.")
    model = train_generator(data, request, folder, progress=surface.listen)
    surface.done([folder], f"ddkit generate --ipc 10 --dataset {dataset}")
    surface.result({"folder": str(folder), "steps": model.facts.steps})
