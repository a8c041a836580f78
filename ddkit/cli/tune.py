"""`ddkit tune`: search the sampling settings that make the best of track 2's time budget."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddkit.challenge import CHALLENGE_DATASETS, CIFAR100
from ddkit.cli._options import (
    BUNDLE_FILE,
    COUNT,
    FOLDER,
    RUNS_FOLDER,
    SAMPLER,
    SAMPLING_PRECISION,
    TRIALS_FOLDER,
    Duration,
    compute_options,
    example,
)
from ddkit.cli._output import Output, plain_table
from ddkit.generator.config import BUNDLE_KEEP, BundleSettings, default_mode_guidance

if TYPE_CHECKING:
    from ddkit.packing.tune import Trial


class _ImagesPerClass(click.ParamType):
    """A number of images per class, or "all" for as many as the time allows."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if str(value).strip().lower() == "all":
            return "all"
        if not str(value).strip().isdecimal() or int(value) < 1:
            self.fail(f"'{value}' is not a number of images; write 50, or all.", param, ctx)
        return int(value)


@click.command(
    short_help="Search for the best sampling settings for track 2.",
    epilog=example("ddkit tune tinyimagenet --steps 4 --steps 8 --images 100 --images all --pack"),
)
@click.argument("dataset", default=CIFAR100.name)
@click.option(
    "--model",
    type=FOLDER,
    metavar="FOLDER_OR_HUB_ID",
    help="Tune the model in this folder, or with this id on the Hugging Face hub, such as user/name.  "
    "[default: runs/<dataset>]",
)
@click.option("--steps", type=COUNT, multiple=True, default=(5, 10), help="Try this many sampling steps; repeatable.")
@click.option(
    "--guidance", type=click.FloatRange(0), multiple=True, default=(1.0, 2.0), help="Try this scale of guidance; repeatable."
)
@click.option(
    "--mode-guidance",
    type=click.FloatRange(0),
    multiple=True,
    metavar="SCALE",
    help="Try this scale of mode guidance; 0 turns it off; repeatable.  "
    f"[default: {default_mode_guidance('flow'):g} for models of flow matching, else {default_mode_guidance('epsilon'):g}]",
)
@click.option(
    "--images",
    type=_ImagesPerClass(),
    multiple=True,
    default=("all",),
    metavar="N|all",
    help="Try stopping at this many images per class; repeatable.",
)
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, min_open=True),
    multiple=True,
    default=(1.0, BUNDLE_KEEP),
    metavar="SHARE",
    help="Try keeping this share of the images: those that show their class most clearly to the classifier that labels them; "
    "repeatable.",
)
@click.option("--sampler", type=SAMPLER, default="dpm++", help="Choose the sampler.")
@click.option(
    "--precision",
    type=SAMPLING_PRECISION,
    default="auto",
    help="Sample in this precision; auto is bfloat16 on GPUs and processors with instructions for it, else float32.",
)
@click.option("--time-budget", type=Duration(), default="60s", help="Let the generator run this long for each trial.")
@click.option(
    "--epochs-setting",
    type=click.IntRange(0),
    default=20,
    metavar="E",
    help="Train for E + 1 epochs on the last candidates, and for fewer on the earlier ones; the official E is 100.",
)
@click.option("--rounds", type=COUNT, default=2, help="Evaluate the last candidates in this many rounds.")
@click.option("--out", type=FOLDER, default=TRIALS_FOLDER, help="Write the trials and the chart to this folder.")
@click.option("--pack", "packs", is_flag=True, help=f"Pack {BUNDLE_FILE} with the best settings at the end, and test it.")
@compute_options
def tune(
    output: Output,
    dataset: str,
    model: Path | None,
    steps: tuple[int, ...],
    guidance: tuple[float, ...],
    mode_guidance: tuple[float, ...],
    images: tuple[int | str, ...],
    keep: tuple[float, ...],
    sampler: str,
    precision: str,
    out: Path,
    packs: bool,
    **evaluation: Any,
) -> None:
    """Search for the best sampling steps, guidance, mode guidance, images per class and share to keep of a track 2 bundle.

    DATASET is cifar100 if not given. The search is by successive halving: every candidate generates for the same time
    budget, and networks are trained on what it made and tested on held-out training images. The test images are never
    used. The better half is tried again with twice the epochs, until two are left. The accuracies tell the settings apart;
    they are not official. A trial that was made is not repeated: run the same command again to continue.
    """
    from ddkit.cli import _bundle
    from ddkit.data.store import dataset_spec
    from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder
    from ddkit.generator.model_facts import find_model, read_facts
    from ddkit.packing import tune as tuning
    from ddkit.packing.bundle import BundleModel
    from ddkit.packing.proof import ProofSettings

    counts = tuple(None if count == "all" else int(count) for count in images)
    dataset_spec(dataset)  # refuses an unknown name before a model is downloaded
    folder = find_model(model) if model else RUNS_FOLDER / dataset
    mode_guidance = mode_guidance or (default_mode_guidance(read_facts(folder, dataset=dataset).prediction),)
    search = tuning.Search(steps, guidance, counts, keep, mode_guidance, EvaluationSettings(track=2, **evaluation))
    settings = BundleSettings()
    settings = replace(settings, sampling=replace(settings.sampling, sampler=sampler, precision=precision))
    bundled = BundleModel(dataset, folder, settings)
    records, chart = out / f"{dataset}.jsonl", out / f"{dataset}.png"
    state = StateFolder(RUNS_FOLDER / "evaluations")
    trials = tuning.tune(bundled, search, out, state=state, progress=output.progress, on_event=output.note)
    _report(output, trials, tuning.best_of(trials), tuning.evidence(trials))
    if packs:
        packed = _bundle.pack_models(output, _bundle.tuned_models(output, bundled, out), BUNDLE_FILE, ProofSettings())
        output.finish([records, chart, packed.path], "ddkit evaluate --track 2", packed.path)
    else:
        output.finish([records, chart], _next_command(dataset, model, out))


def _next_command(dataset: str, model: Path | None, out: Path) -> str:
    """Packing, once everything that belongs into the bundle is tuned."""
    names = [spec.name for spec in CHALLENGE_DATASETS]
    if out != TRIALS_FOLDER:
        return ""  # packing looks for trials in that folder only
    if model is not None or dataset not in names:
        return f"ddkit pack --track 2 --tuned --model {shlex.quote(f'{dataset}={model or RUNS_FOLDER / dataset}')}"
    missing = [name for name in names if not (out / f"{name}.jsonl").is_file()]
    return f"ddkit tune {missing[0]}" if missing else "ddkit pack --track 2 --tuned"


def _report(output: Output, trials: Sequence[Trial], best: Trial, evidence: str) -> None:
    headings = ("steps", "guidance", "mode guidance", "images a class", "kept", "accuracy %", "images", "images/s")
    table = plain_table(*headings, right=headings)
    for trial in sorted(trials, key=lambda trial: -trial.mean):
        spread = f" ± {100 * trial.std:.2f}" if trial.std is not None else ""
        made = sum(trial.images) / len(trial.images)
        row = (trial.steps, f"{trial.guidance:g}", f"{trial.mode_guidance:g}", trial.images_per_class or "all",
               f"{100 * trial.keep:g} %", f"{100 * trial.mean:.2f}{spread}",
               f"{made:,.0f}", f"{sum(trial.images) / sum(trial.seconds):,.1f}")  # fmt: skip
        table.add_row(*map(str, row), style="bold" if trial is best else None)
    output.result({"best": _as_data(best), "trials": [_as_data(trial) for trial in trials]}, table)
    output.note(f"Best: {best.candidate}. {evidence}")


def _as_data(trial: Trial) -> dict[str, Any]:
    return {**asdict(trial), "mean": trial.mean, "std": trial.std}
