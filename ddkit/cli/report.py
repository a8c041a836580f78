"""`ddkit report`: the leaderboard in the terminal, as JSON, and as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from ddkit.cli._options import (
    RUNS_FOLDER,
    SUBMISSION_FOLDER,
    device_option,
    example,
    output_options,
    results_option,
    seed_option,
)
from ddkit.cli._output import Output
from ddkit.cli._rankings import rankings_table
from ddkit.results import Result

if TYPE_CHECKING:
    from ddkit.reporting.quality import SetQuality

_MOST_ROWS = 12  # of each kind in a table, without --all
_MOST_GROUPS = 6
_MOST_PROBLEMS = 3


@click.command(
    short_help="Show the leaderboard, in the terminal and as HTML.",
    epilog=example("ddkit report --html report.html\nddkit report --quality submission/cifar100.pt"),
)
@results_option
@click.option(
    "--track", type=click.Choice(["1", "2"]), help="Show only this track; if not given, track 1 and those with results."
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the HTML page to this file as well.")
@click.option("--all", "show_all", is_flag=True, help="Show all rows, page by page on a terminal.")
@click.option(
    "--quality",
    is_flag=False,
    flag_value=str(SUBMISSION_FOLDER),
    metavar="[PATH]",
    type=click.Path(path_type=Path),
    help="Measure the images of the sets at PATH as well: Frechet distance, density, coverage, diversity and copies. "
    f"Without PATH, it measures the sets in {SUBMISSION_FOLDER}.",
)
@click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    default=RUNS_FOLDER,
    show_default=True,
    help="Show the training logs of the generators in this folder on the page.",
)
@device_option
@seed_option
@output_options
def report(output: Output, results: Path, track: str | None, html: Path | None, show_all: bool, quality: Path | None,
           runs: Path, device: str, seed: int) -> None:  # fmt: skip
    """Show the leaderboard: your results next to the published entries and random real images.

    Only official results are ranked. The others follow, in groups of the same settings.
    """
    from ddkit.reporting.console import LeaderboardView
    from ddkit.reporting.report import report as build_report

    measured = _measure(output, quality, device, seed, runs / "quality") if quality else []
    if html is not None:
        output.note(f"Checking the sets that {escape(str(html))} shows. This takes seconds for each.")
    board = build_report(
        results,
        tracks=[int(track)] if track else None,
        html=html,
        runs_folder=runs,
        quality=measured,
        progress=output.progress,
    )
    if not board.results:
        output.note(f"No results in {escape(str(results))} yet. These are the published entries.")
    for problem in board.problems[:_MOST_PROBLEMS]:
        output.note(f"[yellow]not used:[/yellow] {escape(problem)}")
    if len(board.problems) > _MOST_PROBLEMS:
        output.note(f"[yellow]not used:[/yellow] {len(board.problems) - _MOST_PROBLEMS} more lines; --json lists them all")
    if output.as_json:
        output.result(board.as_data() | {"quality": [one.as_data() for one in measured]})
    else:
        if show_all:
            output.page(LeaderboardView(board.groups))
        else:
            output.result(None, LeaderboardView(board.groups, most_rows=_MOST_ROWS, most_groups=_MOST_GROUPS))
        for table in [*([rankings_table(board.rankings)] if board.rankings else []), *map(_quality_table, measured)]:
            output.out.print(table)
    outputs = [*([html] if html else []), *(path for one in measured for path in _sheets(one, runs / "quality"))]
    output.finish(outputs, _next(board.results, html))


def _measure(output: Output, path: Path, device: str, seed: int, folder: Path) -> list[SetQuality]:
    from ddkit.reporting.quality import has_feature_network, quality_of, sets_at
    from ddkit.runtime.device import resolve_device
    from ddkit.sets.contact_sheet import save_png
    from ddkit.sets.distilled import dataset_of

    measured = []
    for file in sets_at(path):
        first = (
            "" if has_feature_network(dataset_of(file)) else " First a small network is trained on these, which takes minutes."
        )
        output.note(f"Comparing the images of {escape(str(file))} with real images.{first}")
        one = quality_of(file, seed=seed, device=resolve_device(device), progress=output.progress)
        for picture, target in zip((one.neighbors, one.real), _sheets(one, folder), strict=True):
            save_png(picture, target)
        measured.append(one)
    return measured


def _sheets(one: SetQuality, folder: Path) -> tuple[Path, Path]:
    return folder / f"{one.name}-neighbors.png", folder / f"{one.name}-real.png"


def _quality_table(one: SetQuality) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left", title_style="bold",
                  title=Text(f"\nQuality of {one.title} ({one.images:,} images)"))  # fmt: skip
    table.add_column("metric")
    table.add_column("this set", justify="right")
    table.add_column("real images", justify="right")
    table.add_column("meaning", style="dim")
    for metric, ours, real, meaning in one.rows:
        numbers = ["–" if value is None else f"{value:.4g}" for value in (ours, real)]
        table.add_row(metric, *numbers, meaning)
    return table


def _next(results: Sequence[Result], html: Path | None) -> str:
    ours = [result for result in results if result.kind == "submission"]
    if not ours:
        return "ddkit evaluate"
    if not any(result.kind == "random-real" for result in results):
        name, ipc = ours[-1].dataset, ours[-1].images_per_class[0]
        return f"ddkit generate --from-real random --dataset {name} --ipc {ipc} --out baseline/{name}.pt"
    return "" if html else "ddkit report --html report.html"
