"""`ddkit refine`: optimize a distilled set's pixels for the challenge's network."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddkit.cli._options import (
    COUNT,
    FILE,
    FOLDER,
    PATH,
    RUNS_FOLDER,
    Duration,
    example,
    ignore_option,
    resumable_options,
    save_every_option,
)
from ddkit.cli._output import Output, plain_table
from ddkit.distill.settings import OBJECTIVES, PRESETS, RefineLimits, RefineSettings
from ddkit.errors import UsageError, counted
from ddkit.network.plan import PRECISIONS
from ddkit.runtime.progress import span_text

if TYPE_CHECKING:
    from ddkit.distill.estimate import RefineEstimate

_DEFAULTS = RefineSettings()


@click.command(
    short_help="Optimize the pixels of a distilled set.", epilog=example("ddkit refine submission/cifar100.pt --time 30m")
)
@click.argument("path", type=PATH)
@click.option(
    "--dataset", metavar="NAME", help="Name the set's dataset.  [default: from the JSON next to it, or its file name]"
)
@click.option("--steps", type=COUNT, help=f"Refine until this many steps are done in all.  [default: {RefineLimits().steps}]")
@click.option(
    "--time",
    "seconds",
    type=Duration(),
    help="Refine until this much time is spent in all, such as 30m, not counting validation.",
)
@click.option(
    "--preset",
    type=click.Choice(tuple(PRESETS)),
    help="Choose settings: the best measured for track 1, or distribution matching alone. Other options change single "
    f"settings.  [default: those recorded in --run, else {next(iter(PRESETS))}]",
)
@click.option(
    "--objective",
    type=click.Choice(tuple(OBJECTIVES)),
    help="Match mean features (dm), regress real images on the set's features (frepo), or match training trajectories "
    f"(mtt, experimental).  [default: {_DEFAULTS.objective} after {_DEFAULTS.dm_steps} steps of distribution matching]",
)
@click.option(
    "--pool",
    type=click.IntRange(0),
    help="Train this many networks on the set while frepo refines it; 0 uses random networks only.  "
    f"[default: {_DEFAULTS.pool.size}]",
)
@click.option(
    "--batch-real", type=COUNT, help=f"Compare with this many real images per class.  [default: {_DEFAULTS.batch_real}]"
)
@click.option(
    "--lr",
    "learning_rate",
    type=click.FloatRange(0, min_open=True),
    help=f"Set the learning rate of the pixels.  [default: {_DEFAULTS.learning_rate:g}]",
)
@click.option(
    "--precision",
    type=click.Choice(("auto", *PRECISIONS)),
    help=f"Compute in this precision; auto takes the faster one on a CPU, else float32.  [default: {_DEFAULTS.precision}]",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change any other setting, such as dm_steps=0, krr_lambda=0.1, val_every=500 or pool.max_age=400; repeatable. "
    "A wrong name lists them all.",
)
@click.option("--out", type=FILE, help="Write the refined set here.  [default: PATH itself]")
@click.option(
    "--run", type=FOLDER, help="Keep the state and the original set in this folder.  [default: runs/<dataset>-refine]"
)
@click.option("--fresh", is_flag=True, help="Start over from the original set.")
@click.option(
    "--dry-run", is_flag=True, help="Only print the steps, time and memory that it needs in all, and the accuracy to expect."
)
@ignore_option("Refine in spite of findings with this code by ddkit check; repeatable.")
@save_every_option("2m")
@resumable_options
def refine(
    output: Output,
    path: Path,
    dataset: str | None,
    steps: int | None,
    seconds: float | None,
    preset: str | None,
    assignments: tuple[str, ...],
    out: Path | None,
    run: Path | None,
    fresh: bool,
    dry_run: bool,
    ignore_codes: tuple[str, ...],
    save_every_seconds: float,
    device: str,
    **options: Any,
) -> None:
    """Optimize the pixels of the set PATH so that the challenge's network learns more from it.

    The first steps match the mean features of each class with those of its real images. The later steps fit a ridge
    regression to the set's features and reduce its error on real images: first with random networks, then with a pool of
    networks that train on the set. The latest version whose accuracy on held-out training images is within one point of
    the best is written. The test images are never used. Run the same command again to resume, or with more --steps or
    --time to refine further.
    """
    from ddkit.distill import refine as refining
    from ddkit.distill.estimate import estimate_refinement, expected_accuracy
    from ddkit.distill.state import original_set
    from ddkit.sets.distilled import dataset_of, read_set

    if steps is not None and seconds is not None:
        raise UsageError("--steps and --time exclude each other.", "Give one of them.")
    dataset = dataset_of(path, dataset)
    folder = run or RUNS_FOLDER / f"{dataset}-refine"
    limits = RefineLimits(seconds=seconds) if steps is None else RefineLimits(steps)
    settings = _settings(preset, options, assignments, None if fresh else refining.recorded_settings(folder))
    start = original_set(path, folder)
    ipc = read_set(start, dataset).ipc
    if dry_run:
        estimate = estimate_refinement(start, dataset, settings, limits, device=device, progress=output.progress)
        _show_estimate(output, estimate)
        return
    length = span_text(limits.seconds) if limits.seconds is not None else counted(limits.steps, "step", "steps")
    output.note(f"Refining {path} for {length}. {folder} keeps the original set.")
    if limits.seconds is None:  # otherwise the number of steps is not known
        expected = expected_accuracy(dataset, ipc, settings, limits.steps, start=start)
        if expected is not None:
            output.note(f"Expected accuracy: {_expectation(expected)}.")
    refined = refining.refine(
        path, dataset, settings, limits, folder, out=out, fresh=fresh, ignore_codes=ignore_codes, device=device,
        save_every_seconds=save_every_seconds, progress=output.progress,
    )  # fmt: skip
    if refined.steps == refined.earlier_steps:
        output.note("These steps were done before. More --steps or --time refine further.")
    output.note(f"Accuracy on held-out training images: {refined.gain}.")
    if refined.diverged:
        output.note(f"{refined.diverged:,} networks of the pool diverged and were replaced.")
    files = refined.files
    written = (files.tensor, files.provenance, files.sheet, refined.before.tensor, refined.before.sheet)
    output.finish([file for file in written if file.exists()], "ddkit evaluate", files.tensor)
    output.result(dataclasses.asdict(refined))


def _show_estimate(output: Output, estimate: RefineEstimate) -> None:
    kinds = {"dm": "dm", "random networks": "frepo, random networks", "pool": "frepo, pool", "mtt": "mtt"}
    rows = [(f"a step of {kinds[kind]}", f"{seconds:.2f} s") for kind, seconds in estimate.speed.per_step.items()]
    if estimate.speed.experts:
        rows.append(("experts, trained once", span_text(estimate.speed.experts)))
    rows += [
        ("steps in all", f"{estimate.steps:,} in {span_text(estimate.seconds)}"),
        ("validation", span_text(estimate.validation_seconds)),
        ("memory", f"about {estimate.memory / 2**30:.1f} GiB, {estimate.free_memory / 2**30:.1f} GiB are free"),
        ("accuracy", _expectation(estimate.accuracy)),
    ]
    table = plain_table("what", "measured or expected")
    for row in rows:
        table.add_row(*row)
    output.result(dataclasses.asdict(estimate), table)


def _expectation(accuracy: float | None) -> str:
    if accuracy is None:
        return "unknown: no comparable refinement has been recorded"
    return f"about {accuracy:.1%} in an official evaluation, as recorded refinements suggest"


def _settings(
    preset: str | None, options: dict[str, Any], assignments: tuple[str, ...], recorded: RefineSettings | None
) -> RefineSettings:
    """The settings of a preset, or else those recorded, with the changes that the options ask for."""
    settings = recorded if recorded and preset is None else PRESETS[preset or "track1"]
    changes = {name: value for name, value in options.items() if value is not None}
    if (pool := changes.pop("pool", None)) is not None:
        changes["pool.size"] = pool
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment} assigns no value.", "Write --set NAME=VALUE.")
        try:
            value = json.loads(text)  # a number, true or false
        except ValueError:
            value = text.strip()
        changes[name.strip().replace("-", "_")] = value
    return settings.with_changes(changes)
