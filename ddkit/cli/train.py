"""`ddkit train`: train a class-conditional generator on a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from ddkit.cli._minimax import described, minimax_options
from ddkit.cli._options import RUNS_FOLDER, Duration, device_option, example, output_options, recorded_seed_option
from ddkit.cli._output import Output, span_text
from ddkit.errors import MissingModelError, UsageError
from ddkit.runtime.environment import is_main, processes

if TYPE_CHECKING:
    from ddkit.generator.training.estimate import Estimate
    from ddkit.generator.training.options import Plan
    from ddkit.generator.training.train import Tracking, TrainingData, TrainingRequest


@click.command(epilog=example("ddkit train --dataset cifar100 --preset tiny --time 30m"))
@click.option("--dataset", required=True, help="A dataset of `ddkit data list`.")
@click.option("--preset", help="Sizes and settings: demo, tiny, small, base, dit or minimax-paper.  [default: tiny]")
@minimax_options
@click.option("--steps", type=click.IntRange(1), help="Of denoiser training, in all; the autoencoder's come first.")
@click.option("--time", "seconds", type=Duration(), help="Of training in all, such as 20m; takes the place of --steps.")
@click.option("--batch-size", type=click.IntRange(1), help="Images a step, over all processes.")
@click.option("--lr", "learning_rate", type=click.FloatRange(0, min_open=True), help="The denoiser's learning rate.")
@click.option(
    "--ema-width",
    type=click.FloatRange(0, 0.28, min_open=True, max_open=True),
    help="Of the averaged weights' profile, as a share of the training so far.",
)
@click.option(
    "--ema-decay",
    type=click.FloatRange(0, 1, max_open=True),
    help="Of the averaged weights at every step, in place of that profile.",
)
@click.option("--accumulation", type=click.IntRange(1), help="Parts a step is computed in, where memory is short.")
@click.option("--prediction", type=click.Choice(["flow", "v", "epsilon"]), help="What the denoiser predicts.")
@click.option(
    "--label-dropout",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of images shown without their class, which guidance needs.",
)
@click.option(
    "--min-snr", type=click.FloatRange(0), help="Gamma of the min-SNR weights, which v and epsilon have; 0 for equal weights."
)
@click.option("--architecture", type=click.Choice(["uvit", "unet", "dit"]), help="Of the denoiser.")
@click.option("--flips/--no-flips", default=None, help="Show images mirrored as well; wrong for letters and digits.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the computation; bfloat16 is faster on GPUs and on processors with instructions for it.",
)
@click.option("--compile/--no-compile", default=None, help="Compile the networks first.")
@click.option(
    "--autoencoder",
    "pretrained_autoencoder",
    metavar="HUB_ID_OR_FOLDER",
    help="A pretrained one to use, such as stabilityai/sd-vae-ft-mse.",
)
@click.option("--resume", is_flag=True, help="Insist on going on: an error where there is nothing to go on from.")
@click.option("--fresh", is_flag=True, help="Start over: removes the training that is in the folder.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="The run's folder.  [default: runs/<dataset>]")
@click.option(
    "--track-every",
    type=click.IntRange(0),
    metavar="STEPS",
    help="Score the model so often by its Frechet distance, and keep the best; 0 for never.",
)
@click.option(
    "--features",
    type=click.Choice(["convnet", "inception"]),
    help="Of the Frechet distance: of a ConvNet trained on the real images, or of Inception.  [default: convnet]",
)
@click.option("--save-every", type=Duration(), default="5m", show_default=True, help="How much work a kill may cost.")
@click.option("--tensorboard", is_flag=True, help="Write records for TensorBoard too.")
@click.option("--dry-run", is_flag=True, help="Only say what it would take: parameters, memory, speed.")
@device_option
@recorded_seed_option
@output_options
def train(
    output: Output,
    dataset: str,
    seconds: float | None,
    resume: bool,
    fresh: bool,
    out: Path | None,
    save_every: float,
    device: str,
    tensorboard: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Train a generator: an autoencoder, then a denoiser of its latents; or fine-tune one that is there.

    Run it again to go on where it stopped, or, with more --steps or --time, to train on. Several GPUs share the batches:
    accelerate launch -m ddkit train.
    """
    from ddkit.generator.training.options import TrainingOptions, plan_training
    from ddkit.generator.training.run_folder import has_training
    from ddkit.generator.training.train import TrainingRequest

    wishes = TrainingOptions(**settings)
    output.quiet = output.quiet or not is_main()
    if wishes.steps is not None and seconds is not None:
        raise UsageError("--steps and --time contradict each other.")
    if resume and fresh:
        raise UsageError("--resume and --fresh contradict each other.")
    if wishes.epochs is not None and (wishes.steps is not None or seconds is not None):
        raise UsageError("--epochs says how long to train, as --steps and --time do: give one of them.")
    own = RUNS_FOLDER / dataset
    folder = out or (RUNS_FOLDER / f"{dataset}-minimax" if wishes.tunes() else own)
    if resume and not has_training(folder):
        raise MissingModelError(f"There is no training in {folder} to go on from.", "Leave --resume away to begin one.")
    data = _open(output, dataset)
    plan = plan_training(data, folder, wishes, own=own, fresh=fresh)
    if plan.start is not None:
        output.say(described(plan.start))
    if dry_run:
        _show_costs(output, plan, data, device, seconds)
        return
    tracking = _tracking(output, data, device, plan)
    request = TrainingRequest(plan.config, plan.preset, seconds, device, save_every, tensorboard)
    _train(output, data, request, folder, fresh, tracking, plan)


def _open(output: Output, dataset: str) -> TrainingData:
    from ddkit.data.prepare import open_dataset
    from ddkit.data.store import store_hash
    from ddkit.generator.training.train import TrainingData

    images = open_dataset(dataset, "train", progress=output.listen)
    return TrainingData(dataset, images, store_hash(dataset, "train"))


def _tracking(output: Output, data: TrainingData, device: str, plan: Plan) -> Tracking | None:
    from ddkit.generator.training.tracking import track_frechet_in
    from ddkit.runtime.device import own_device, resolve_device

    if not plan.track_every or len(data.images) < 2:
        return None
    return track_frechet_in(
        plan.features,
        data,
        every_steps=plan.track_every,
        device=own_device(resolve_device(device)),
        progress=output.listen,
    )


def _train(
    output: Output,
    data: TrainingData,
    request: TrainingRequest,
    folder: Path,
    fresh: bool,
    tracking: Tracking | None,
    plan: Plan,
) -> None:
    from ddkit.generator.training.estimate import check_memory
    from ddkit.generator.training.run_folder import CHART_FILE, has_training
    from ddkit.generator.training.train import train as train_generator
    from ddkit.runtime.device import resolve_device

    classes, device = len(data.images.class_names), resolve_device(request.device)
    check_memory(plan.config, data.image_size, classes, device, processes=processes(), start=plan.start)
    verb = "Going on with" if has_training(folder) and not fresh else "Fine-tuning" if plan.start else "Training"
    output.say(
        f"{verb} a generator on {escape(data.name)}, preset {plan.preset}, {_length(request)}, in {escape(str(folder))}."
    )
    model = train_generator(data, request, folder, start=plan.start, tracking=tracking, fresh=fresh, progress=output.listen)
    if not is_main():
        return
    next_command = f"ddkit generate --ipc 10 --dataset {data.name}" + _model_option(folder, data.name)
    output.done([folder, folder / CHART_FILE], next_command)
    output.result(
        {"folder": str(folder), "steps": model.facts.steps, "images_seen": model.facts.images_seen}
        | {"metrics": dict(model.facts.metrics)}
        | _start_facts(plan)
    )


def _start_facts(plan: Plan) -> dict[str, Any]:
    """Of what fine-tuning starts from: how much of it is trained, and which classes it does not know."""
    if plan.start is None:
        return {}
    parameters, classes = plan.start.parameters, plan.start.classes
    return {"start": {"source": plan.start.source, "trainable_parameters": parameters.trainable,
                      "parameters": parameters.total, "unmatched_classes": list(classes.unmatched)}}  # fmt: skip


def _length(request: TrainingRequest) -> str:
    if request.seconds is not None:
        return span_text(request.seconds)
    config = request.config
    before = "" if config.minimax or config.pretrained_autoencoder else f"{config.autoencoder_optimizer.steps:,} + "
    return f"{before}{config.denoiser_optimizer.steps:,} steps"


def _model_option(folder: Path, dataset: str) -> str:
    return "" if folder == RUNS_FOLDER / dataset else f" --model {folder}"


def _show_costs(output: Output, plan: Plan, data: TrainingData, device: str, seconds: float | None) -> None:
    from ddkit.generator.presets import to_json
    from ddkit.generator.training.estimate import estimate, shortage
    from ddkit.runtime.device import resolve_device

    if not is_main():
        return
    output.say("Trying each stage for a few seconds; nothing is kept.")
    of = (plan.config, data.image_size, len(data.images.class_names), resolve_device(device))
    costs = estimate(*of, processes=processes(), start=plan.start)
    if not costs.fits:
        output.say(f"[yellow]{escape(str(shortage(costs, *of, processes=processes())))}[/]")
    steps = [stage.steps for stage in costs.stages] if seconds is None else costs.steps_within(seconds)
    facts = {"fits": costs.fits, "steps": steps, "config": to_json(plan.config)} | _start_facts(plan)
    output.result(dataclasses.asdict(costs) | facts, _cost_table(costs, steps))


def _cost_table(costs: Estimate, steps: Sequence[int | None]) -> Table:
    table = Table("stage", "parameters", "memory", "images/s", "steps", "batch", "in all")
    for stage, count in zip(costs.stages, steps, strict=True):
        unknown = stage.images_per_second is None
        table.add_row(
            stage.stage,
            f"{stage.parameters / 1e6:.2f} M",
            f"{stage.memory / 2**20:,.0f} MiB",
            "does not fit" if unknown else f"{stage.images_per_second:,.0f}",
            "–" if count is None else f"{count:,}",
            f"{stage.batch_size:,}",
            "–" if unknown else span_text(count * stage.seconds_a_step),
        )
    table.caption = f"{costs.free_memory / 2**30:.1f} GiB of memory are free; not compiled, so at worst"
    return table
