"""The picture of a training: its losses and scores over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddkit.runtime.files import atomic_write

_POINTS = 400  # of a curve; more cannot be seen


def draw_chart(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG with the loss of each stage, and the scores where there are any. Raises BadFileError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A panel for each stage, then one for each score.
    by_panel: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["stage"] == "score"):
        by_panel.setdefault((record["stage"], record.get("name", "")), []).append(record)
    panels = max(1, len(by_panel))
    figure = Figure(figsize=(4 * panels, 3), layout="constrained")
    for axes, ((stage, _), shown) in zip(figure.subplots(1, panels, squeeze=False)[0], by_panel.items(), strict=False):
        _draw(axes, stage, shown)
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def _draw(axes: Any, name: str, records: Sequence[dict[str, Any]]) -> None:
    scores = name == "score"
    steps = [record["step"] for record in records]
    values = [record["value" if scores else "loss"] for record in records]
    axes.set_xlabel("steps")
    if scores:
        best = min(range(len(values)), key=values.__getitem__)
        axes.plot(steps, values, marker="o", markersize=3)
        axes.annotate(f"{values[best]:.4g}", (steps[best], values[best]))
        axes.set_title(records[-1]["name"])
        return
    width = max(1, len(values) // _POINTS)
    means = [sum(values[i : i + width]) / width for i in range(0, len(values) - width + 1, width)]
    axes.plot(steps[width - 1 :: width][: len(means)], means, linewidth=1)
    axes.set_yscale("log")
    axes.set_title(f"{name}: loss")
