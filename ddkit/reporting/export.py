"""The leaderboard for other programs: plain values, comma-separated values, Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from ddkit.reporting.formatting import deviation, half_interval, percent, points, rounds
from ddkit.reporting.rows import Estimate, Group, Row, dataset_title


def as_data(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """The leaderboard as plain values for JSON; accuracies and differences are fractions."""
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
        "interval": _estimate_data(row.spread),
        "to_first": _estimate_data(row.to_first),
        "to_random": _estimate_data(row.to_random),
        "rounds": {name: r.rounds for name, r in row.results.items()},
        "std": {name: r.std for name, r in row.results.items()},
        "sha256": {name: r.sha256 for name, r in row.results.items()},
        "date": row.date,
        "source": row.source,
        "deviations": list(row.deviations),
        "remarks": list(row.remarks),
    }


def _estimate_data(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else {"value": estimate.value, "half_width": estimate.half_width}


def as_csv(groups: Iterable[Group]) -> str:
    """One line an entry and group, with a header; fractions, empty where there is no number."""
    groups = list(groups)
    datasets = list(dict.fromkeys(name for group in groups for name in group.datasets))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["track", "group", "rank", "entry", "kind", "official", *datasets, "mean", "half_width_95",
                     "to_first", "to_first_half_width_95", "to_random", "to_random_half_width_95",
                     "rounds", "date", "source", "deviations"])  # fmt: skip
    for group in groups:
        for row in group.rows:
            writer.writerow(_csv_row(group, row, datasets))
    return out.getvalue()


def _csv_row(group: Group, row: Row, datasets: Sequence[str]) -> list[object]:
    def pair(estimate: Estimate | None) -> list[object]:
        return ["", ""] if estimate is None else [_number(estimate.value), _number(estimate.half_width)]

    return [
        group.track, _no_formula(group.title), row.rank or "", _no_formula(row.name), row.kind, str(row.official).lower(),
        *(_number(row.accuracy.get(name)) for name in datasets), _number(row.score),
        _number(row.spread.half_width if row.spread else None), *pair(row.to_first), *pair(row.to_random),
        rounds(row), _no_formula(row.date), _no_formula(row.source), _no_formula("; ".join(row.deviations)),
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _no_formula(text: str) -> str:
    """A name that a spreadsheet would take for a formula, made text again."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def as_markdown(groups: Iterable[Group]) -> str:
    """A Markdown table for each group, percent and points as in the terminal."""
    parts = []
    for group in groups:
        datasets = [_markdown_text(dataset_title(name)) for name in group.datasets]
        titles = ["#", "entry", *datasets, "mean", "to first", "to random real", "rounds", "date", "official"]
        heading = f"### Track {group.track}: {_markdown_text(group.title)}"
        lines = [heading, "", _markdown_line(titles), _markdown_line(["---"] * len(titles))]
        lines += [_markdown_line(_markdown_cells(group, row)) for row in group.rows]
        parts.append("\n".join([*lines, "", *(f"{_markdown_text(remark)}\n" for remark in group.remarks)]))
    return "\n".join(parts)


def _markdown_cells(group: Group, row: Row) -> list[str]:
    return [
        "" if row.rank is None else str(row.rank),
        f"**{_markdown_text(row.name)}**" if row.is_local else _markdown_text(row.name),
        *(f"{percent(row.accuracy.get(name))}{deviation(row, name)}" for name in group.datasets),
        f"{percent(row.score)} {half_interval(row) if row.score is not None else ''}".strip(),
        points(row.to_first),
        points(row.to_random),
        rounds(row),
        _markdown_text(row.date),
        _markdown_text(group.verdict(row)),
    ]


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_text(text: str) -> str:
    """Text that Markdown and the HTML within it leave as it is."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    for character in "\\`*_[]|":
        text = text.replace(character, f"\\{character}")
    return text
