"""`ddkit enter`: the whole way to an entry within a time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddkit.challenge import CHALLENGE_DATASETS, TRACKS
from ddkit.cli._options import COUNT, FILE, FOLDER, TRACK, Duration, device_option, example, given_options, output_options
from ddkit.cli._output import Output, span_text
from ddkit.cli._stages import StageView, stage_table
from ddkit.cli._views import leaderboard_view
from ddkit.entering.recipe import Recipe, read_recipe
from ddkit.errors import DDKitError, UsageError
from ddkit.runtime.files import cache_folder

if TYPE_CHECKING:
    from ddkit.entering.entry import Plan

_MOST_ROWS = 12


@click.command(
    short_help="Make a whole entry within a given time.",
    epilog=example("ddkit enter --time 8h\nddkit enter --recipe ddkit-entry/recipe.toml --folder again"),
)
@click.option("--time", "seconds", type=Duration(), help="Finish within this time, such as 8h, evaluations included.")
@click.option(
    "--track",
    type=TRACK,
    help=f"Make ten images per class (1), or a generator (2).  [default: {min(TRACKS)}]",
)
@click.option(
    "--datasets",
    metavar="NAME,...",
    help=f"Enter with these datasets.  [default: {','.join(spec.name for spec in CHALLENGE_DATASETS)}]",
)
@click.option(
    "--recipe",
    "recipe_file",
    type=FILE,
    help="Make the entry that this recipe.toml describes again; it states all numbers of steps, so --time is not needed.",
)
@click.option("--dry-run", is_flag=True, help="Measure this machine briefly and print the plan; write nothing.")
@click.option(
    "--folder",
    type=FOLDER,
    default=Path("ddkit-entry"),
    help="Write everything to this folder.",
)
@click.option(
    "--rounds",
    type=COUNT,
    help="Train this many networks in each evaluation.  [default: the official number, or fewer if the time is short]",
)
@click.option(
    "--epochs-setting",
    type=click.IntRange(0),
    metavar="E",
    help="Train for E + 1 epochs in each evaluation.  [default: the official number, or fewer if the time is short]",
)
@click.option(
    "--time-budget",
    type=Duration(),
    help=f"Let a track 2 generator run this long for each round.  [default: the official {TRACKS[2].time_budget_seconds:g} s]",
)
@device_option
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Use this random seed; 0 if not given.")
@output_options
def enter(
    output: Output,
    seconds: float | None,
    datasets: str | None,
    recipe_file: Path | None,
    dry_run: bool,
    folder: Path,
    device: str,
    **options: Any,
) -> None:
    """Go the whole way to an entry: prepare data, make sets, refine, evaluate, check, pack and report.

    The plan is made first, from short measurements of this machine. On track 1 random real images are refined; on
    track 2 generators are trained. The datasets get equal parts of the time that the other stages leave. Run the same
    command again to continue after an interruption, or with more --time to refine or train further. The folder's recipe.toml
    describes the entry so that it can be made again.
    """
    from ddkit.entering.plan import draft

    if recipe_file is not None:
        if given := given_options(("seconds", "datasets", *options)):
            raise UsageError(f"The recipe decides what {', '.join(given)} would.", "Change the recipe instead.")
        recipe = read_recipe(recipe_file)
    elif seconds is None:
        raise UsageError("--time is missing.", "Say how long everything may take, such as --time 8h, or name a --recipe.")
    else:
        asked = {name: value for name, value in options.items() if value is not None}
        names = [spec.name for spec in CHALLENGE_DATASETS] if datasets is None else datasets.split(",")
        recipe = draft([name.strip() for name in names], track=int(asked.pop("track", 1)), **asked, device=device)
    make_entry(output, recipe, folder, seconds, device, dry_run=dry_run)


def make_entry(
    output: Output, recipe: Recipe, folder: Path, seconds: float | None, device: str, *, dry_run: bool = False, then: str = ""
) -> None:
    """Plan an entry, carry it out and show it. then: the next command to type."""
    from ddkit.entering import entry as entering

    if dry_run:
        output.note("Measuring this machine briefly; nothing is kept.")
        _show_plan(output, entering.plan_entry(recipe, folder, seconds=seconds, device=device, progress=output.progress))
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Inside the folder, so that results name their files as the other commands do there.
    with _inside(folder), StageView(output) as view:
        entry = entering.enter(
            recipe, Path(), seconds=seconds, device=device,
            progress=view.progress, watch=view.watch, on_event=output.note,
        )  # fmt: skip
    sheets = [Path("submission", f"{name}.png") for name in entry.recipe.datasets]
    written = [folder / path for path in (*sheets, *entry.files) if (folder / path).exists()]
    if entry.unfinished:
        output.note(
            f"The time was up before {', '.join(entry.unfinished)}. Run the same command with a longer --time to finish.",
            label="warning",
        )
    output.note(f"Everything together took {span_text(entry.seconds)}.")
    output.result(
        {
            "seconds": entry.seconds,
            "files": written,
            "stages": [dataclasses.asdict(state) for state in entry.stages],
            "unfinished": entry.unfinished,
            "recipe": entry.recipe.to_json(),
        }
        | entry.leaderboard.as_data(),
        leaderboard_view(entry.leaderboard.groups, output.out, most_rows=_MOST_ROWS),
    )
    evaluate = f"cd {shlex.quote(str(folder))} && ddkit evaluate" + " --track 2" * (recipe.track == 2)
    output.finish(written, then or (evaluate if entry.lacks_official and not entry.unfinished else ""))


def _show_plan(output: Output, plan: Plan) -> None:
    states = plan.states()
    total = sum(state.expected for state in states if state.status != "done")
    for note in plan.notes:
        output.note(note)
    data = {
        "seconds": plan.seconds, "expected": total, "notes": plan.notes,
        "stages": [dataclasses.asdict(state) for state in states], "recipe": plan.recipe.to_json(),
    }  # fmt: skip
    output.result(data, stage_table(states, output))
    limit = "" if plan.seconds is None else f" of {span_text(plan.seconds)}"
    output.note(f"What is to come takes about {span_text(total)}{limit}.")


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Make `folder` the current folder."""
    if "DDKIT_CACHE" in os.environ:  # a relative one names a folder next to where the command was typed
        os.environ["DDKIT_CACHE"] = str(cache_folder().absolute())
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    except DDKitError as error:  # whose paths and commands are those of someone who is in the folder
        raise type(error)(f"In {folder}: {error.message}", error.remedy) from error
    finally:
        os.chdir(before)
