"""The trainings of generators, from their logs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddkit.errors import BadFileError
from ddkit.generator.training.run_folder import METRICS_FILE
from ddkit.reporting.charts import LineChart, line_chart
from ddkit.runtime.jsonl import read_lines

log = logging.getLogger(__name__)

_MINIMAX_CRITERIA = ("representativeness", "diversity")
_SCORES = {
    "frechet": "Frechet distance",
    "frechet_bfloat16": "Frechet distance (bfloat16)",
    "frechet_inception": "Frechet distance (Inception)",
}


@dataclass(frozen=True)
class RunView:
    """The training of a generator, from the log in its run folder."""

    name: str
    steps: int
    charts: tuple[LineChart, ...]


def training_runs(folder: Path) -> tuple[RunView, ...]:
    """The trainings in the sub-folders of `folder`; empty if there is no such folder. Unreadable lines are skipped."""
    if not folder.is_dir():
        return ()
    logs = sorted(folder.glob(f"*/{METRICS_FILE}"))
    return tuple(view for path in logs if (view := _run_view(path)) is not None)


def _run_view(path: Path) -> RunView | None:
    try:
        lines = read_lines(path)
    except BadFileError as error:
        log.warning("The training log cannot be read: %s", error)
        return None
    records = [record for _, record in lines if isinstance(record, dict) and _is_number(record.get("step"))]
    charts = (
        *(line_chart(f"{stage.capitalize()}: loss".lstrip(": "), "step", {"loss": _series(of_stage, "loss")})
          for stage, of_stage in _by(records, "stage").items()),
        line_chart("Minimax criteria", "step", {name: _series(records, name) for name in _MINIMAX_CRITERIA}),
        *(line_chart(f"{_SCORES.get(name, name)} of samples", "step", {name: _series(scores, "value")}, from_zero=True)
          for name, scores in _by([r for r in records if "value" in r], "name").items()),
    )  # fmt: skip
    shown = tuple(chart for chart in charts if chart is not None)
    # The steps of the last stage, which is that of the model that makes images.
    return RunView(path.parent.name, int(records[-1]["step"]), shown) if shown else None


def _by(records: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    """Records by the text they hold under a key, in the order in which the texts first appear."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(str(record.get(key, "")), []).append(record)
    return groups


def _series(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """The numbers under a key over the steps, in order of the steps.

    A resumed training repeats the steps after its checkpoint; the later record counts.
    """
    values = {record["step"]: record[key] for record in records if _is_number(record.get(key))}
    return sorted(values.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
