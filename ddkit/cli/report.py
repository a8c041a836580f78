"""`ddkit report`: the leaderboard in the terminal, as JSON, and as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ddkit.cli._options import (
    FILE,
    FOLDER,
    PATH,
    RUNS_FOLDER,
    SUBMISSION_FOLDER,
    TRACK,
    compute_options,
    example,
)
from ddkit.cli._output import Output
from ddkit.cli._rankings import rankings_table
from ddkit.cli._views import comparison_view, history_view, leaderboard_view
from ddkit.errors import counted
from ddkit.results import RESULTS_FILE, Result

if TYPE_CHECKING:
    from ddkit.reporting.quality import SetQuality

_MOST_ROWS = 12  # of each kind in a table, without --all
_MOST_GROUPS = 6
_MOST_PROBLEMS = 3


@click.command(
    short_help="Show the leaderboard, in the terminal and as HTML.",
    epilog=example(
        "ddkit report --html report.html\nddkit report --quality submission/cifar100.pt\n"
        "ddkit report --compare submission/cifar100.pt baseline --html report.html"
    ),
)
@click.option("--results", type=FILE, default=RESULTS_FILE, help="Read results from this file.")
@click.option("--track", type=TRACK, help="Show only this track.  [default: those with results, else the first]")
@click.option("--html", type=FILE, help="Write the HTML page to this file as well.")
@click.option("--all", "show_all", is_flag=True, help="Show all rows, page by page on a terminal.")
@click.option(
    "--history",
    "show_history",
    is_flag=True,
    help="Show what was evaluated and packed, real images included, in the order of time.",
)
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    help="Show two evaluated sets side by side, class by class. Each is a recorded name, a .pt file, or the first six or more "
    "digits of its SHA-256.",
)
@click.option(
    "--quality",
    is_flag=False,
    flag_value=str(SUBMISSION_FOLDER),
    metavar="[PATH]",
    type=PATH,
    help="Measure the images of the sets at PATH as well: Frechet distance, density, coverage, diversity and copies. "
    f"Without PATH, it measures the sets in {SUBMISSION_FOLDER}.",
)
@click.option(
    "--runs", type=FOLDER, default=RUNS_FOLDER, help="Show the training logs of the generators in this folder on the page."
)
@compute_options
def report(output: Output, results: Path, track: str | None, html: Path | None, show_all: bool, show_history: bool,
           compare: tuple[str, str] | None, quality: Path | None, runs: Path, device: str, seed: int) -> None:  # fmt: skip
    """Show the leaderboard: your results next to the published entries and random real images.

    Only official results are ranked. The others follow, in groups of the same settings.
    """
    from ddkit.reporting.report import report as build_report

    board = build_report(
        results,
        tracks=[int(track)] if track else None,
        html=html,
        runs_folder=runs,
        quality=quality,
        compare=compare,
        seed=seed,
        device=device,
        on_event=output.note,
        progress=output.progress,
    )
    if not board.results:
        published = "" if show_history else " These are the published entries."
        output.note(f"No results in {results} yet.{published}")
    for problem in board.problems[:_MOST_PROBLEMS]:
        output.note(problem, label="not used:")
    if len(board.problems) > _MOST_PROBLEMS:
        more = counted(len(board.problems) - _MOST_PROBLEMS, "more line", "more lines")
        output.note(f"{more}; --json lists them all", label="not used:")
    shown = [history_view(board.history, output.out)] if show_history else []
    shown += [comparison_view(one, show_all=show_all) for one in board.comparisons]
    if not shown:
        most_rows, most_groups = (None, None) if show_all else (_MOST_ROWS, _MOST_GROUPS)
        shown.append(leaderboard_view(board.groups, output.out, most_rows=most_rows, most_groups=most_groups))
        shown += [rankings_table(board.rankings)] if board.rankings else []
    shown += map(_quality_table, board.quality)
    output.result(board.as_data(), Group(*shown), paged=show_all)
    output.finish(board.written, _next(board.results, html))


def _quality_table(one: SetQuality) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left", title_style="bold",
                  title=Text(f"\nQuality of {one.title} ({one.images:,} images, features in {one.precision})"))  # fmt: skip
    table.add_column("metric")
    table.add_column("this set", justify="right")
    table.add_column("real images", justify="right")
    table.add_column("meaning", style="dim")
    for metric, ours, real, meaning in one.rows:
        numbers = ["–" if value is None else f"{value:.4g}" for value in (ours, real)]
        table.add_row(metric, *numbers, meaning)
    return table


def _next(results: Sequence[Result], html: Path | None) -> str:
    if not any(result.kind == "submission" for result in results):
        return "ddkit evaluate"
    sets = [result for result in results if result.kind == "submission" and result.track == 1]
    if sets and not any(result.kind == "random-real" for result in results):
        name, ipc = sets[-1].dataset, sets[-1].images_per_class[0]
        return f"ddkit generate --from-real random --dataset {name} --ipc {ipc} --out baseline/{name}.pt"
    return "" if html else "ddkit report --html report.html"
