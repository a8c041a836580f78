"""`ddkit evaluate`: score distilled sets and generators as the challenge does."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group
from rich.table import Table

from ddkit.challenge import TRACKS
from ddkit.cli._options import (
    BUNDLE_FILE,
    COUNT,
    FILE,
    FOLDER,
    PATH,
    RUNS_FOLDER,
    SUBMISSION_FOLDER,
    TRACK,
    Duration,
    compute_options,
    example,
    ignore_option,
    save_every_option,
)
from ddkit.cli._output import Output, plain_table
from ddkit.cli._rankings import rankings_table
from ddkit.errors import counted
from ddkit.network.plan import PRECISIONS
from ddkit.reporting.formatting import interval_text
from ddkit.results import RESULTS_FILE, Result
from ddkit.runtime.progress import span_text

if TYPE_CHECKING:
    from ddkit.evaluation.estimate import EvaluationEstimate
    from ddkit.evaluation.job import JobOutcome
    from ddkit.statistics import Comparison

_MOST_ROUNDS_SHOWN = 5


@click.command(
    short_help="Train networks on distilled sets and test them.",
    epilog=example("ddkit evaluate submission/cifar100.pt --rounds 5 --epochs-setting 50"),
)
@click.argument("sets", nargs=-1, type=PATH)
@click.option(
    "--dataset", metavar="NAME", help="Name the sets' dataset.  [default: from the JSON next to a set, or its file name]"
)
@click.option(
    "--name",
    help="Record the results under this name.  [default: the name of the set's folder, or of the "
    "file or folder itself if others published it]",
)
@click.option(
    "--track", type=TRACK, default="1", help="Evaluate .pt files (1), or a generator, given as a bundle's zip or folder (2)."
)
@click.option("--rounds", type=COUNT, help=f"Train this many fresh networks.  [default: the official {TRACKS[1].rounds}]")
@click.option(
    "--epochs-setting",
    type=click.IntRange(0),
    metavar="E",
    help="Train for E + 1 epochs.  "
    f"[default: the official {TRACKS[1].epochs_setting} on track 1, {TRACKS[2].epochs_setting} on track 2]",
)
@click.option(
    "--network",
    default="convnet",
    help="Train the official convnet, or another: resnet18, resnet_ap10, resnet18_ap, alexnet, vgg11.",
)
@click.option("--no-augment", is_flag=True, help="Train without augmentation, which is not official.")
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="float32", help="Compute in this precision; bfloat16 is not official."
)
@click.option(
    "--zca",
    is_flag=True,
    help="Undo ZCA whitening as trajectory matching does it: kornia's ZCAWhitening with epsilon 0.1, fitted on the prepared "
    "training images in [0, 1]. Takes minutes for 64-pixel images, once.",
)
@click.option(
    "--normalization",
    default="auto",
    metavar="NAME",
    help="Convert values that were normalized in this way: auto (recognized from the values), challenge, unit ([0, 1]), "
    "signed ([-1, 1]), bytes, cifar10, cifar100, imagenet, or means and deviations such as 0.5,0.5,0.5/0.2,0.2,0.2.",
)
@click.option("--argmax", is_flag=True, help="Reduce soft labels to their largest class; otherwise they are refused.")
@click.option("--reference", type=PATH, help="Test on the challenge's <dataset>_test.pt.  [default: the prepared test images]")
@click.option(
    "--time-budget",
    type=Duration(),
    help=f"Let a track 2 generator run this long for each round.  [default: the official {TRACKS[2].time_budget_seconds:g} s]",
)
@click.option(
    "--ranking",
    is_flag=True,
    help="Compute DD-Ranking's scores as well. This also evaluates the set without augmentation, random real images, and "
    "all real images.",
)
@click.option(
    "--full-epochs-setting",
    type=click.IntRange(0),
    metavar="E",
    help="Train for E + 1 epochs on all real images, with --ranking.  [default: the sets' own E, reduced if it is large]",
)
@click.option("--state", type=FOLDER, default=RUNS_FOLDER / "evaluations", help="Save interrupted evaluations in this folder.")
@ignore_option("Evaluate in spite of findings with this code; repeatable.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only measure a few batches, print the time and memory needed, and say whether the result would be official.",
)
@save_every_option("30s")
@click.option("--results", type=FILE, default=RESULTS_FILE, help="Read results from this file, and add new ones to it.")
@compute_options
def evaluate(
    output: Output,
    sets: tuple[Path, ...],
    state: Path,
    save_every_seconds: float,
    track: str,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train fresh networks on distilled SETS and test them on real images, which gives the challenge's score.

    Without SETS, this evaluates every set in submission/, or only that of --dataset; on track 2 it evaluates track2.zip.
    Several sets of one dataset are compared, and the output says if their difference exceeds the noise. An interrupted
    evaluation continues when the command is run again.

    A set that others have published may be a .pt file of images and labels in almost any arrangement, or a folder of
    <class>/<image>, with any number of images per class. ddkit says what it holds and how its values are normalized,
    converts them, and never calls the result official.

    Several GPUs share the rounds of track 1: accelerate launch -m ddkit evaluate.
    """
    from ddkit.evaluation import job

    of_job = ("dataset", "name", "reference", "ranking", "full_epochs_setting", "ignore_codes", "results")
    given = {name: options.pop(name) for name in of_job}
    given["conversion"] = job.Conversion(**{name: options.pop(name) for name in ("zca", "argmax", "normalization")})
    evaluation = job.EvaluationSettings(track=int(track), augment=not options.pop("no_augment"), **options)
    settings = job.JobSettings(evaluation, **given, state=job.StateFolder(state, save_every_seconds))
    if dry_run:
        events: dict[str, Any] = {"progress": output.progress, "on_event": output.note}
        estimates = job.estimate_files(sets, settings, folder=SUBMISSION_FOLDER, **events)
        shown = Group(_estimates_table(estimates), *_not_official(estimates))
        output.result([{**asdict(each), "official": each.official} for each in estimates], shown)
        return
    with contextlib.ExitStack() as opened:
        files: Sequence[Path | job.GeneratorFiles] = sets
        if track == "2":
            from ddkit.packing.bundle import open_generators  # imports diffusers, which takes seconds

            files = opened.enter_context(open_generators(sets or (BUNDLE_FILE,), settings.dataset))
        outcome = job.evaluate_files(files, settings, folder=SUBMISSION_FOLDER, progress=output.progress, on_event=output.note)
    shown = _shown(outcome)
    output.result(_as_data(outcome), Group(shown, rankings_table(outcome.rankings)) if outcome.rankings else shown)
    entered = track == "1" and any(Path(result.source).parent == SUBMISSION_FOLDER for result in outcome.results)
    output.finish([settings.results], "ddkit check" if entered else "ddkit report")


def _as_data(outcome: JobOutcome) -> dict[str, Any]:
    """Plain values for JSON."""

    def values(record: Result | Comparison) -> dict[str, Any]:
        derived = ("mean", "std", "interval", "exceeds_noise")
        return {**asdict(record), **{name: getattr(record, name) for name in derived if hasattr(record, name)}}

    return {
        "results": [values(result) for result in outcome.results],
        "comparisons": [
            {"dataset": first.dataset, "first": first.source, "second": second.source, **values(comparison)}
            for first, second, comparison in outcome.comparisons
        ],
        "scores": outcome.scores,
        "rankings": [ranking.as_data() for ranking in outcome.rankings],
    }


def _shown(outcome: JobOutcome) -> Group:
    lines = _not_official(outcome.results)
    lines += [_generated(result) for result in outcome.results if result.generated]
    lines += [_verdict(*comparison) for comparison in outcome.comparisons]
    for name, score in outcome.scores.items():
        lines.append(f"The challenge's score of {name}, the mean of both datasets: {_number(score)} %")
    return Group(_table(outcome.results), *lines)


def _estimates_table(estimates: Sequence[EvaluationEstimate]) -> Table:
    table = plain_table("set", "dataset", "images", "rounds", "an epoch", "still to come", "GiB of memory", "official")
    for each in estimates:
        done = f", {each.finished_rounds} done" if each.finished_rounds else ""
        table.add_row(
            each.source,
            each.dataset,
            f"{each.images:,}",
            f"{each.rounds} of {counted(each.epochs, 'epoch', 'epochs')}{done}",
            f"{each.seconds_per_epoch:.3g} s",
            span_text(each.seconds),
            f"{each.memory / 2**30:.1f} of {each.free_memory / 2**30:.1f} free",
            "yes" if each.official else "no",
        )
    return table


def _table(results: Sequence[Result]) -> Table:
    table = plain_table("set", "dataset", "accuracy, %", "95 % interval", "rounds, %", "official")
    for column in table.columns[2:4]:
        column.no_wrap = True
    for result in results:
        accuracy = _number(result.mean) + (f" ± {100 * result.std:.2f}" if result.std is not None else "")
        interval = " to ".join(map(_number, result.interval)) if result.interval else interval_text(None, [result.rounds])
        rounds = " ".join(map(_number, result.accuracies[:_MOST_ROUNDS_SHOWN]))
        rounds += " ..." * (result.rounds > _MOST_ROUNDS_SHOWN)
        table.add_row(result.source, result.dataset, accuracy, interval, rounds, "yes" if result.official else "no")
    return table


def _not_official(results: Sequence[Result | EvaluationEstimate]) -> list[str]:
    """Why results are not official, once for all that have the same reasons."""
    by_reasons: dict[str, list[str]] = {}
    for result in results:
        by_reasons.setdefault("; ".join(result.deviations), []).append(result.source)
    lines = []
    for reasons, sources in by_reasons.items():
        which = f" ({', '.join(dict.fromkeys(sources))})" if len(by_reasons) > 1 else ""
        lines += [f"Not official{which}: {reasons}."] if reasons else []
    return lines


def _generated(result: Result) -> str:
    """The number of images that a track 2 generator made, and its speed."""
    counts = ", ".join(f"{count:,}" for count in result.generated)
    seconds = ", ".join(f"{seconds:.1f}" for seconds in result.generation_seconds)
    speed = sum(result.generated) / sum(result.generation_seconds)
    least, most = result.images_per_class
    return (
        f"{result.source} on {result.dataset} made {counts} images in {seconds} s: "
        f"{speed:,.1f} images/s, {least:,} to {most:,} per class."
    )


def _verdict(first: Result, second: Result, comparison: Comparison) -> str:
    better, worse = (first, second) if comparison.difference >= 0 else (second, first)
    points, rounds = abs(100 * comparison.difference), f"{first.rounds} {'paired ' * comparison.paired}rounds"
    if comparison.half_width is None:
        found = f"is better than {worse.source} by {points:.2f} points"
        if points < 0.005:
            found = f"is as good as {worse.source}"
        return (
            f"{better.source} {found} in each of {rounds}: the difference does not vary, so no "
            "interval can be given. More --rounds may show that it does."
        )
    half = 100 * comparison.half_width
    numbers = f"{points:.2f} ± {half:.2f} points (95 %, {rounds}, p = {comparison.p_value:.2g})"
    if comparison.exceeds_noise:
        return f"{better.source} is better than {worse.source} by {numbers}."
    return (
        f"{better.source} and {worse.source} differ by {numbers}, which does not exceed the noise. "
        "More --rounds would detect smaller differences."
    )


def _number(fraction: float) -> str:
    return f"{100 * fraction:.2f}"
