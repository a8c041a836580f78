"""The records of a training, one JSON object a line, and their chart: losses and scores over the steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddkit.errors import UsageError
from ddkit.generator.training.run_folder import METRICS_FILE, TENSORBOARD
from ddkit.runtime.files import atomic_write
from ddkit.runtime.jsonl import append_line, read_lines

_POINTS = 400  # of a curve; more cannot be seen


@dataclass(frozen=True)
class Score:
    """The score of the model after `step` steps of the denoiser."""

    step: int
    name: str
    value: float
    stage: str = "score"


class MetricsLog:
    """Records as JSON lines, and for TensorBoard if asked for."""

    def __init__(self, folder: Path, *, tensorboard: bool) -> None:
        self._path = folder / METRICS_FILE
        self._writer = require_tensorboard()(folder / TENSORBOARD) if tensorboard else None

    def records(self) -> list[dict[str, Any]]:
        return read_records(self._path)

    def write(self, record: Any) -> None:
        """Append one dataclass. Raises BadFileError when the file cannot be written."""
        values = dataclasses.asdict(record)
        values |= values.pop("figures", {})
        append_line(self._path, values, sync=False)  # a record is not worth waiting for the disk
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{values['stage']}/{name}", value, values["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def require_tensorboard() -> Any:
    """TensorBoard's writer class. Raises UsageError when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("TensorBoard is not installed.", "Install it: pip install 'ddkit[tensorboard]'") from error
    return SummaryWriter


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics log by step, the last one of each stage, step and score; none when there is no log yet.

    Lines that are not records, such as a torn one, are left out. Raises BadFileError when the file cannot be read.
    """
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for _, record in read_lines(path):
        if isinstance(record, dict) and {"stage", "step"} <= record.keys():
            found[record["stage"], record["step"], record.get("name", "")] = record
    return sorted(found.values(), key=lambda record: record["step"])


def draw_chart(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG with the loss of each stage and each score, unless no stage has two losses and there is no score.

    Raises BadFileError when it cannot be written.
    """
    stages = [record["stage"] for record in records]
    if "score" not in stages and len(set(stages)) == len(stages):
        return
    from matplotlib.figure import Figure

    # A panel for each stage, then one for each score.
    by_panel: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["stage"] == "score"):
        by_panel.setdefault((record["stage"], record.get("name", "")), []).append(record)
    panels = len(by_panel)
    figure = Figure(figsize=(4 * panels, 3))
    # As shares of the figure: matplotlib would take as long to find them as to draw.
    figure.subplots_adjust(left=0.18 / panels, right=1 - 0.06 / panels, bottom=0.17, top=0.9, wspace=0.3)
    for axes, ((stage, _), shown) in zip(figure.subplots(1, panels, squeeze=False)[0], by_panel.items(), strict=False):
        steps = [record["step"] for record in shown]
        axes.set_xlabel("steps")
        if stage == "score":
            values = [record["value"] for record in shown]
            best = min(range(len(values)), key=values.__getitem__)
            axes.plot(steps, values, marker="o", markersize=3)
            axes.annotate(f"{values[best]:.4g}", (steps[best], values[best]))
            axes.set_title(shown[-1]["name"])
        else:
            losses = [record["loss"] for record in shown]
            width = max(1, len(losses) // _POINTS)
            means = [sum(losses[i : i + width]) / width for i in range(0, len(losses) - width + 1, width)]
            axes.plot(steps[width - 1 :: width][: len(means)], means, linewidth=1)
            axes.set_yscale("log")
            axes.set_title(f"{stage}: loss")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
