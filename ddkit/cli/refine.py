"""`ddkit refine`: optimize a distilled set's pixels for the challenge's network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from ddkit.cli._options import (
    RUNS_FOLDER,
    Duration,
    FindingCode,
    device_option,
    example,
    output_options,
    recorded_seed_option,
)
from ddkit.cli._output import Output, span_text
from ddkit.errors import UsageError

if TYPE_CHECKING:
    from ddkit.distill.refine import RefineSettings


@click.command(epilog=example("ddkit refine submission/cifar100.pt --time 30m"))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--dataset", help="Of the set; as the JSON beside it says otherwise, or the file's name.")
@click.option("--steps", type=click.IntRange(1), help="In all.  [default: 1000]")
@click.option(
    "--time",
    "seconds",
    type=Duration(),
    help="In all, such as 30m; takes the place of --steps. Judging and training other networks come on top.",
)
@click.option(
    "--preset",
    type=click.Choice(("track1", "means")),
    help="Settings that measured best for track 1; or distribution matching alone. Options change single ones. "
    "[default: those of the refinement that goes on, else track1]",
)
@click.option(
    "--objective",
    type=click.Choice(("means", "regression", "trajectories")),
    help="Match the classes' mean features, let a regression on the set's features tell real images, or let "
    "networks that learn from the set follow ones that learn from real images.  [default: regression]",
)
@click.option("--means-first", type=click.IntRange(0), help="Steps by means before another objective.  [default: 100]")
@click.option("--ridge", type=click.FloatRange(0, min_open=True), help="Strength of that regression.  [default: 0.2]")
@click.option(
    "--experts",
    type=click.IntRange(1),
    help="Networks trained on real images, once for a dataset and a seed, for trajectories and --trained-share.  [default: 3]",
)
@click.option("--student-steps", type=click.IntRange(1), help="Steps on the set that follow an expert's.  [default: 20]")
@click.option(
    "--real-per-class", type=click.IntRange(1), help="Real images of each class that a step compares with.  [default: 32]"
)
@click.option("--lr", "learning_rate", type=click.FloatRange(0, min_open=True), help="Of the pixels.  [default: 6]")
@click.option(
    "--spectrum",
    type=click.FloatRange(0, 1),
    help="Power of the real pictures' spectrum that the pixels' gradients are weighed by; 0 for none.  [default: 0.25]",
)
@click.option(
    "--average",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share that a step keeps of the images' moving average, which is what is written; 0 for none.  [default: 0.99]",
)
@click.option(
    "--trained-share",
    type=click.FloatRange(0, 1),
    help="Share of steps, but those by trajectories, that look through experts, not fresh networks.  [default: 0]",
)
@click.option(
    "--attention",
    type=click.FloatRange(0),
    help="Weight of matching attention maps beside means, 100 as published; several times slower on a CPU.  [default: 0]",
)
@click.option(
    "--recognition",
    type=click.FloatRange(0),
    help="Weight of being recognized by the experts of --trained-share.  [default: 0]",
)
@click.option(
    "--displayable", is_flag=True, default=None, help="Keep pixels within [0, 255]; the challenge does not ask for it."
)
@click.option(
    "--check-every", type=click.IntRange(1), help="Steps between judgements by held-out training images.  [default: 250]"
)
@click.option("--check-epochs", type=click.IntRange(0), help="Epochs setting of a judgement's training.  [default: 100]")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The refined set's file; PATH itself, whose former set is kept in --run.",
)
@click.option(
    "--run",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where state and former set are kept.  [default: runs/<dataset>-refine]",
)
@click.option("--fresh", is_flag=True, help="Start over, from the set as it was.")
@click.option(
    "--ignore",
    "ignored",
    multiple=True,
    type=FindingCode(),
    metavar="CODE",
    help="Refine in spite of findings of this code by ddkit check; repeatable.",
)
@click.option(
    "--save-every", type=Duration(), default="2m", show_default=True, help="How much work a kill may cost; of a judgement, all."
)
@device_option
@recorded_seed_option
@output_options
def refine(
    output: Output,
    path: Path,
    dataset: str | None,
    steps: int | None,
    seconds: float | None,
    out: Path | None,
    run: Path | None,
    fresh: bool,
    save_every: float,
    ignored: tuple[str, ...],
    device: str,
    preset: str | None,
    **options: Any,
) -> None:
    """Optimize the pixels of the set PATH so that the challenge's network learns more from it.

    Its images are moved until networks see in them, on average, what they see in the real images of their class, and
    then until a regression on what they see in the set tells real images best.
    The best set by a held-out part of the training images is written; the test images are never looked at. Run it
    again to go on where it stopped or, with more --steps or --time, to refine on.
    """
    from ddkit.distill.refine import Limits, recorded_settings
    from ddkit.distill.refine import refine as refine_set
    from ddkit.sets.distilled import dataset_of

    if steps is not None and seconds is not None:
        raise UsageError("--steps and --time contradict each other.")
    dataset = dataset_of(path, dataset)
    folder = run or RUNS_FOLDER / f"{dataset}-refine"
    limits = Limits(seconds=seconds) if steps is None else Limits(steps, seconds)
    settings = _settings(preset, options, None if fresh else recorded_settings(folder))
    length = span_text(limits.seconds) if limits.seconds is not None else f"{limits.steps:,} steps"
    output.say(f"Refining {escape(str(path))} for {length}; the set as it was is kept in {escape(str(folder))}.")
    refined = refine_set(
        path, dataset, settings, limits, folder,
        out=out, fresh=fresh, ignore_codes=ignored, device=device, save_every_seconds=save_every, progress=output.listen,
    )  # fmt: skip
    output.say(
        f"By held-out training images {refined.accuracy_before:.2%} before, {refined.accuracy:.2%} at step "
        f"{refined.best_step:,} of {refined.steps:,}."
    )
    files = refined.files
    written = (files.tensor, files.provenance, files.sheet, refined.before.tensor, refined.before.sheet)
    output.done([file for file in written if file.exists()], f"ddkit evaluate {files.tensor}")
    output.result(dataclasses.asdict(refined))


# What each of these options is of.
_OF_OBJECTIVE = {"ridge": "regression", "student_steps": "trajectories"}
# What is of the steps by means that come before an objective, and of no use where there are none.
_OF_STEPS_BEFORE = {
    "regression": ("attention",),
    "trajectories": ("real_per_class", "trained_share", "attention", "recognition"),
}


def _settings(preset: str | None, options: dict[str, Any], recorded: RefineSettings | None) -> RefineSettings:
    """A preset's settings, or else those of the refinement that goes on, with what the options say otherwise."""
    from ddkit.distill.refine import PRESETS

    base = recorded if recorded and preset is None else PRESETS[preset or "track1"]
    given = {name: value for name, value in options.items() if value is not None}
    objective = given.get("objective", base.objective)
    for name, needed in _OF_OBJECTIVE.items():
        if name in given and objective != needed:
            raise UsageError(f"--{name.replace('_', '-')} is of the objective {needed}, and this one is {objective}.")
    without_means = objective != "means" and given.get("means_first", base.means_first) == 0
    if without_means and (unused := [name for name in _OF_STEPS_BEFORE[objective] if name in given]):
        raise UsageError(f"--{unused[0].replace('_', '-')} is of the means, and none come before the {objective}.")
    if "experts" in given and objective != "trajectories" and given.get("trained_share", base.trained_share) == 0:
        raise UsageError("--experts are of trajectories and of --trained-share, and there are neither.")
    if "means_first" in given and objective == "means":
        raise UsageError("--means-first: there is nothing after the means, as the objective is means.")
    if (count := given.pop("experts", None)) is not None:
        given["experts"] = dataclasses.replace(base.experts, count=count)
    if (steps := given.pop("student_steps", None)) is not None:
        given["student"] = dataclasses.replace(base.student, steps=steps)
    return dataclasses.replace(base, **given)
