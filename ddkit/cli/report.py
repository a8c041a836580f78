"""`ddkit report`: where we stand beside the published entries, in the terminal and as one HTML page."""

from __future__ import annotations

import dataclasses
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
from ddkit.errors import MissingDataError, UsageError
from ddkit.results import RESULTS_FILE

if TYPE_CHECKING:
    from ddkit.reporting.quality import SetQuality
    from ddkit.reporting.rows import Group

_MOST_ROWS = 12  # of our own entries in a table, unless --all
_MOST_GROUPS = 6
_MOST_PROBLEMS = 3


@click.command(epilog=example("ddkit report --html report.html\nddkit report --quality submission/cifar100.pt"))
@results_option
@click.option("--track", type=click.Choice(["1", "2"]), help="Only this track.  [default: those with results, and 1]")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the page to this file as well.")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values; fractions, not percent.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown tables.")
@click.option("--all", "show_all", is_flag=True, help="All entries, a page at a time on a terminal.")
@click.option(
    "--quality",
    is_flag=False,
    flag_value=str(SUBMISSION_FOLDER),
    metavar="[PATH]",
    type=click.Path(path_type=Path),
    help="Measure the pictures of the sets at PATH as well: Frechet "
    f"distance, density, coverage, diversity, copies.  [PATH: {SUBMISSION_FOLDER}]",
)
@click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    default=RUNS_FOLDER,
    show_default=True,
    help="Folder of trained generators, whose training logs the page shows.",
)
@device_option
@seed_option
@output_options
def report(output: Output, results: Path, track: str | None, html: Path | None, as_csv: bool, as_markdown: bool,
           show_all: bool, quality: Path | None, runs: Path, device: str, seed: int) -> None:  # fmt: skip
    """Show the leaderboard: your results beside the published entries and random real images.

    Only official results are ranked; the others stand below, grouped by the settings they were obtained under.
    """
    from ddkit import results as records
    from ddkit.metrics import ddranking
    from ddkit.reporting.export import as_data
    from ddkit.reporting.leaderboard import build

    if as_csv + as_markdown + output.as_json > 1:
        raise UsageError("--json, --csv and --markdown exclude each other.")
    if html is not None and html.exists() and results.exists() and html.samefile(results):
        raise UsageError(f"The page would replace {results}, the record of all evaluations.", "Name another file with --html.")
    reading = records.read(results)
    if not results.is_file() and results != RESULTS_FILE:
        raise MissingDataError(f"There is no file of results {results}.", "Make one: ddkit evaluate --results PATH")
    if not reading.results:
        output.say(f"No results in {escape(str(results))} yet; these are the published entries.")
    _tell_problems(output, reading.problems)
    tracks = [int(track)] if track else None
    groups = build(reading.results, tracks)
    measured = _measure(output, quality, device, seed, runs / "quality") if quality else []
    if html is not None:
        _write_page(output, reading, tracks, runs, measured, html)
    rankings = [ranking for ranking in ddranking.from_results(reading.results) if ranking.lrs is not None]
    data = (
        {
            "leaderboard": as_data(groups),
            "rankings": [ranking.as_data() for ranking in rankings],
            "problems": list(reading.problems),
            "quality": [dataclasses.asdict(one.view) for one in measured],
        }
        if output.as_json
        else None
    )
    _show(output, groups, data, as_csv=as_csv, as_markdown=as_markdown, show_all=show_all)
    if not (as_csv or as_markdown or output.as_json):
        for table in [*([rankings_table(rankings)] if rankings else []), *map(_quality_table, measured)]:
            output.out.print(table)
    outputs = [*([html] if html else []), *(path for one in measured for path in _sheets(one, runs / "quality"))]
    output.done(outputs, _next(reading.results, html))


def _show(output: Output, groups: Sequence[Group], data: Any, *, as_csv: bool, as_markdown: bool,
          show_all: bool) -> None:  # fmt: skip
    from ddkit.reporting import export
    from ddkit.reporting.console import LeaderboardView

    if as_csv:
        click.echo(export.as_csv(groups), nl=False)
    elif as_markdown:
        click.echo(export.as_markdown(groups), nl=False)
    elif show_all and not output.as_json:
        output.page(LeaderboardView(groups))
    else:
        output.result(data, LeaderboardView(groups, most_rows=_MOST_ROWS, most_groups=_MOST_GROUPS))


def _tell_problems(output: Output, problems: Sequence[str]) -> None:
    for problem in problems[:_MOST_PROBLEMS]:
        output.say(f"[yellow]not used:[/yellow] {escape(problem)}")
    if len(problems) > _MOST_PROBLEMS:
        output.say(f"[yellow]not used:[/yellow] {len(problems) - _MOST_PROBLEMS} more lines; --json lists them all")


def _write_page(output: Output, reading: Any, tracks: list[int] | None, runs: Path,
                measured: Sequence[SetQuality], html: Path) -> None:  # fmt: skip
    from ddkit.reporting.html import write_html
    from ddkit.reporting.page import gather

    output.say(f"Gathering what {escape(str(html))} shows; the sets that are still there are checked, seconds each.")
    page = gather(
        reading.results,
        problems=reading.problems,
        tracks=tracks,
        runs_folder=runs,
        quality=[one.view for one in measured],
        progress=output.listen,
    )
    write_html(page, html)


def _measure(output: Output, path: Path, device: str, seed: int, folder: Path) -> list[SetQuality]:
    from ddkit.reporting.quality import dataset_at, is_prepared, quality_of, sets_at
    from ddkit.runtime.device import resolve_device
    from ddkit.sets.contact_sheet import save_png

    measured = []
    for file in sets_at(path):
        dataset = dataset_at(file)
        first = "" if is_prepared(dataset) else " A small network is trained on these first: minutes, once for a dataset."
        output.say(f"Measuring the pictures of {escape(str(file))} against the real ones.{first}")
        one = quality_of(file, dataset, seed=seed, device=resolve_device(device), progress=output.listen)
        for picture, target in zip((one.neighbors, one.beside), _sheets(one, folder), strict=True):
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
                  title=Text(f"\nQuality of {one.view.name} ({one.view.images:,} images)"))  # fmt: skip
    table.add_column("metric")
    table.add_column("this set", justify="right")
    table.add_column("real images", justify="right")
    table.add_column("reading", style="dim")
    for line in one.view.lines:
        numbers = ["–" if value is None else f"{value:.4g}" for value in (line.ours, line.real)]
        table.add_row(line.metric, *numbers, line.reading)
    return table


def _next(results: Sequence[Any], html: Path | None) -> str:
    ours = [result for result in results if result.kind == "submission"]
    if not ours:
        return "ddkit evaluate"
    if not any(result.kind == "random-real" for result in results):
        name, ipc = ours[-1].dataset, ours[-1].images_per_class[0]
        return f"ddkit generate --from-real random --dataset {name} --ipc {ipc} --out baseline/{name}.pt"
    return "" if html else "ddkit report --html report.html"
