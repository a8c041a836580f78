"""The report: the leaderboard of a results file, DD-Ranking's scores, and the HTML page."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddkit import challenge
from ddkit.errors import MissingDataError
from ddkit.history import PackedRecords, packed_file
from ddkit.metrics import ddranking
from ddkit.reporting.compare import SetsCompared, compare_sets, comparison_sheet
from ddkit.reporting.formatting import percent, points
from ddkit.reporting.history import History, build_history
from ddkit.reporting.leaderboard import build
from ddkit.reporting.rows import Group, Row, dataset_title
from ddkit.results import RESULTS_FILE, Result, read
from ddkit.runtime.files import require_ending
from ddkit.runtime.html import html_table
from ddkit.runtime.progress import Listener, ignore

if TYPE_CHECKING:
    from ddkit.reporting.quality import SetQuality

_LEGEND = "Accuracy in % ± half its 95 % interval; differences in points, with 95 % intervals."


@dataclass(frozen=True)
class Leaderboard:
    """The leaderboard of a results file.

    results: oldest first. groups: of comparable rows, those of the official protocol first in each track.
    rankings: DD-Ranking's scores of the sets for which all needed evaluations are there.
    problems: a line on each line of the file that cannot be used.
    quality: the measured sets. written: the page and the sheets of images.
    history: of the user's own sets and of real images. comparisons: of the two sets that were asked for, by dataset.
    """

    results: tuple[Result, ...]
    groups: tuple[Group, ...]
    rankings: tuple[ddranking.Ranking, ...]
    problems: tuple[str, ...]
    quality: tuple[SetQuality, ...]
    written: tuple[Path, ...]
    history: History
    comparisons: tuple[SetsCompared, ...]

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        parts = []
        for group in self.groups:
            names = [*map(dataset_title, group.datasets), *(["mean"] if len(group.datasets) > 1 else [])]
            rows = []
            for row in group.rows:
                values = [row.value_and_interval(name) for name in (*group.datasets, None)][: len(names)]
                numbers = [
                    "–" if value is None else percent(value[0]) + ("" if value[1] is None else f" ± {100 * value[1]:.2f}")
                    for value in values
                ]
                rank = "" if row.rank is None else row.rank
                rows.append((rank, row.name, *numbers, points(row.to_random), group.verdict(row)))
            headings = ("#", "entry", *names, "to random real", "official")
            parts.append(f"<p>Track {group.track}: {escape(group.title)}</p>{html_table(rows, headings)}")
        return "".join(parts) + f"<p>{escape(_LEGEND)}</p>"

    def as_data(self) -> dict[str, Any]:
        """Plain values for JSON; accuracies and differences are fractions."""
        return {
            "leaderboard": as_data(self.groups),
            "rankings": [ranking.as_data() for ranking in self.rankings],
            "problems": list(self.problems),
            "quality": [one.as_data() for one in self.quality],
            "history": self.history.as_data(),
            "comparisons": [one.as_data() for one in self.comparisons],
            "written": list(map(str, self.written)),
        }


def report(
    results: str | os.PathLike[str] = RESULTS_FILE,
    *,
    tracks: Iterable[int] | None = None,
    html: str | os.PathLike[str] | None = None,
    runs_folder: str | os.PathLike[str] = "runs",
    quality: str | os.PathLike[str] | None = None,
    compare: tuple[str, str] | None = None,
    seed: int = 0,
    device: str = "auto",
    on_event: Callable[[str], object] = lambda text: None,
    progress: Listener = ignore,
) -> Leaderboard:
    """Read a results file and rank the sets in it next to the published entries and random real images.

    results: the file that evaluations are recorded in; the default one may be missing. tracks: whose results are ranked,
    compared and shown; None means those with results, or track 1 without any. html: also write the page to this file.
    runs_folder: the folder of generators' run folders, whose logs are shown on the page. quality: also measure the images of
    this set, or of the sets in this folder, as `ddkit.reporting.quality.quality_of` does with the seed and the device, and
    write two sheets of images of each into `runs_folder`/quality. compare: two sets, as
    `ddkit.reporting.compare.compare_sets` takes them, to be compared; their images are written next to each other into
    `runs_folder`/compare. on_event: called with a sentence before a part that takes long.
    Raises MissingDataError for a missing file, BadFileError if the system refuses a file, UsageError if the page does
    not end in .html, and what `quality_of` raises.
    """
    path, tracks = Path(results), None if tracks is None else tuple(tracks)
    for number in tracks or ():
        challenge.track(number)  # or refused
    if html is not None:
        require_ending(Path(html), ".html", ".htm")
    if not path.is_file() and path != RESULTS_FILE:
        raise MissingDataError(f"There is no results file {path}.", "Make one: ddkit evaluate --results PATH")
    reading = read(path)
    shown = tuple(result for result in reading.results if tracks is None or result.track in tracks)
    measured: list[SetQuality] = []
    written: list[Path] = []
    if quality is not None:
        from ddkit.reporting.quality import measure_sets

        measured = measure_sets(Path(quality), seed=seed, device=device, on_event=on_event, progress=progress)
        written = [file for one in measured for file in one.save_sheets(Path(runs_folder, "quality"))]
    packed = PackedRecords(packed_file(path), writes=False)
    history = build_history(shown, packed.records, tracks)
    comparisons = compare_sets(*compare, reading.results, tracks) if compare else ()
    written += _save_sheets(comparisons, Path(runs_folder, "compare"))
    problems = (*reading.problems, *packed.problems)
    if html is not None:
        from ddkit.reporting.html import write_html
        from ddkit.reporting.page import gather

        on_event(f"Checking the sets that {html} shows. This takes seconds for each.")
        page = gather(
            shown,
            problems=problems,
            tracks=tracks,
            runs_folder=Path(runs_folder),
            quality=measured,
            history=history,
            comparisons=comparisons,
            progress=progress,
        )
        write_html(page, html)
        written.insert(0, Path(html))
    rankings = tuple(ranking for ranking in ddranking.from_results(shown) if ranking.lrs is not None)
    groups = build(shown, tracks)
    return Leaderboard(
        reading.results, groups, rankings, problems, tuple(measured), tuple(written), history, tuple(comparisons)
    )


def _save_sheets(comparisons: Iterable[SetsCompared], folder: Path) -> list[Path]:
    """Write the images of each comparison next to each other, where they are still there."""
    written = []
    for one in comparisons:
        if (sheet := comparison_sheet(one)) is not None:
            from ddkit.sets.contact_sheet import save_png  # imported late: PyTorch takes seconds

            path = folder / f"{one.first.dataset}-{one.first.sha256[:6]}-{one.second.sha256[:6]}.png"
            save_png(sheet, path)
            written.append(path)
    return written


def as_data(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Each group with its rows; accuracies and differences are fractions."""
    return [
        {
            "track": group.track,
            "official": group.official,
            "title": group.title,
            "datasets": list(group.datasets),
            "remarks": list(group.remarks),
            "rows": [_row_data(row) for row in group.rows],
        }
        for group in groups
    ]


def _row_data(row: Row) -> dict[str, Any]:
    return {
        "rank": row.rank,
        "name": row.name,
        "kind": row.kind,
        "official": row.official,
        "accuracy": dict(row.accuracy),
        "score": row.score,
        "interval": row.spread and vars(row.spread),
        "to_first": row.to_first and vars(row.to_first),
        "to_random": row.to_random and vars(row.to_random),
        "rounds": {name: r.rounds for name, r in row.results.items()},
        "std": {name: r.std for name, r in row.results.items()},
        "sha256": {name: r.sha256 for name, r in row.results.items()},
        "date": row.date,
        "source": row.source,
        "deviations": list(row.deviations),
        "remarks": list(row.remarks),
    }
