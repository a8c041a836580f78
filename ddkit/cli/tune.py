"""`ddkit tune`: which sampling settings make the best of track 2's time budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from ddkit.challenge import CHALLENGE_DATASETS, CIFAR100
from ddkit.cli._entry import TRIALS_FOLDER
from ddkit.cli._options import RUNS_FOLDER, Duration, device_option, example, output_options, seed_option
from ddkit.cli._output import Output, span_text
from ddkit.generator.config import SAMPLERS

if TYPE_CHECKING:
    from ddkit.packing.tune import Trial


@click.command(epilog=example("ddkit tune tinyimagenet --steps 4 --steps 8 --guidance 1.5 --time-budget 5m"))
@click.argument("dataset", default=CIFAR100.name)
@click.option("--track", type=click.Choice(["2"]), default="2", show_default=True, help="The one with a time budget.")
@click.option("--model", type=click.Path(file_okay=False, path_type=Path), help="A model folder; runs/<dataset>.")
@click.option("--steps", type=click.IntRange(1), multiple=True, help="Sampling steps to try; repeatable.  [default: 4, 8, 16]")
@click.option("--guidance", type=click.FloatRange(0), multiple=True, help="Guidance to try; repeatable.  [default: 1, 2]")
@click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    default="dpm++",
    show_default=True,
    help="How noise is removed.",
)
@click.option(
    "--time-budget", type=Duration(), default="60s", show_default=True, help="Of each run of the generator, the same for all."
)
@click.option(
    "--epochs-setting",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    metavar="E",
    help="E + 1 epochs of training on what was made; the protocol says 100.",
)
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True, help="Of each trial.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=TRIALS_FOLDER,
    show_default=True,
    help="The folder of the trials and the chart.",
)
@device_option
@seed_option
@output_options
def tune(
    output: Output,
    dataset: str,
    track: str,
    model: Path | None,
    steps: tuple[int, ...],
    guidance: tuple[float, ...],
    sampler: str,
    out: Path,
    **evaluation: Any,
) -> None:
    """Try a grid of sampling steps x guidance, each for the same time budget, and train on what each makes.

    Fewer steps make more images, and worse ones. The accuracies are of fewer epochs than the protocol's, and tell the
    settings from each other; they are not official. Trials that were made are not made again.
    """
    from ddkit.data.prepare import open_dataset
    from ddkit.data.store import dataset_spec
    from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder
    from ddkit.evaluation.reference import as_test_set
    from ddkit.generator.model_folder import read_facts
    from ddkit.generator.sampling import SamplingSettings
    from ddkit.packing.bundle import EntryModel, EntrySettings
    from ddkit.packing.tune import Grid, draw_chart, explore

    settings = EvaluationSettings(track=int(track), **evaluation)
    grid = Grid(steps or Grid.steps, guidance or Grid.guidance, settings)
    entry = EntryModel(dataset, model or RUNS_FOLDER / dataset, EntrySettings(SamplingSettings(sampler, precision="float32")))
    records, chart = out / f"{dataset}.jsonl", out / f"{dataset}.png"
    longest = len(grid.points) * settings.number_of_rounds * settings.budget
    spec = dataset_spec(dataset)
    read_facts(entry.folder)  # a model that is missing is said before anything is downloaded
    output.say(f"Trying {len(grid.points)} settings of {escape(str(entry.folder))}: generating takes {span_text(longest)} "
                f"at most, training of {settings.training.epochs} epochs comes on top.")  # fmt: skip
    test_set = as_test_set(open_dataset(dataset, "test", progress=output.listen), spec)
    state = StateFolder(RUNS_FOLDER / "evaluations")
    trials = explore(entry, test_set, grid, records, state=state, progress=output.listen)
    draw_chart(trials, chart)
    _report(output, trials)
    output.done([records, chart], _next_command(dataset, model, out))


def _next_command(dataset: str, model: Path | None, out: Path) -> str:
    """Packing, once all that belongs into the bundle is tuned."""
    names = [spec.name for spec in CHALLENGE_DATASETS]
    if out != TRIALS_FOLDER:
        return ""  # packing looks for trials in that one only
    if model is not None or dataset not in names:
        return f"ddkit pack --track 2 --tuned --model {dataset}={model or RUNS_FOLDER / dataset}"
    missing = [name for name in names if not (out / f"{name}.jsonl").is_file()]
    return f"ddkit tune {missing[0]}" if missing else "ddkit pack --track 2 --tuned"


def _report(output: Output, trials: Sequence[Trial]) -> None:
    from ddkit.packing.tune import best_of

    best = best_of(trials)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("steps", "guidance", "accuracy %", "images", "images/s"):
        table.add_column(heading, justify="right")
    for trial in sorted(trials, key=lambda trial: -trial.mean):
        spread = f" ± {100 * trial.std:.2f}" if trial.std is not None else ""
        made = sum(trial.images) / len(trial.images)
        row = (trial.steps, f"{trial.guidance:g}", f"{100 * trial.mean:.2f}{spread}", f"{made:,.0f}",
               f"{sum(trial.images) / sum(trial.seconds):,.1f}")  # fmt: skip
        table.add_row(*map(str, row), style="bold" if trial is best else None)
    output.result({"best": _as_data(best), "trials": [_as_data(trial) for trial in trials]}, table)
    output.say(f"Best: {best.steps} steps, guidance {best.guidance:g}. {_evidence(trials)}")


def _as_data(trial: Trial) -> dict[str, Any]:
    return {**asdict(trial), "mean": trial.mean, "std": trial.std}


def _evidence(trials: Sequence[Trial]) -> str:
    """How sure that is, in a sentence."""
    from ddkit.packing.tune import lead

    comparison = lead(trials)
    if comparison is None:
        return "One round of one setting tells nothing of the noise." if len(trials) > 1 else "Nothing else was tried."
    points, half = 100 * comparison.difference, 50 * (comparison.interval[1] - comparison.interval[0])
    verdict = "more than the noise" if comparison.exceeds_noise else "no more than the noise; more --rounds would tell"
    settings = f"E = {trials[0].epochs_setting}, not official"
    return f"It leads the next by {points:.2f} ± {half:.2f} points (95 %), {verdict}. {settings}."
