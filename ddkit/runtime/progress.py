"""Reports of the progress of long computations, independent of what shows them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_SECONDS_BETWEEN_UPDATES = 1.0  # where a bar is text, each update stays in the notebook's file


@dataclass(frozen=True)
class Progress:
    """One report of a running task.

    task: its name; a new one starts a new bar. done, total: in `unit`s; total is None if it is not known.
    figures: numbers to show next to the bar, by name ("loss", "accuracy").
    """

    task: str
    done: float
    total: float | None
    unit: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


Listener = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """A listener that does nothing."""


def span_text(seconds: float) -> str:
    """A length of time for people: `0.4 s`, `75 s`, `12 min`, `2.5 h`."""
    if seconds < 0.95:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def time_option(seconds: float) -> str:
    """A length of time, rounded up, as --time takes it."""
    if seconds < 60:
        return f"{-(-seconds // 1):.0f}s"
    return f"{-(-seconds // 60):.0f}m" if seconds < 7200 else f"{-(-seconds // 360) / 10:g}h"


def default_listener() -> Listener:
    """A listener that shows tqdm's bars in a Jupyter notebook, and one that does nothing elsewhere."""
    # A notebook's process has loaded IPython itself.
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return progress_bars() if hasattr(shell, "kernel") else ignore


def progress_bars() -> Listener:
    """A listener that shows a bar for each task: as a widget in notebooks with ipywidgets, else as text on stderr."""
    from tqdm.auto import tqdm

    bars: dict[str, Any] = {}

    def show(progress: Progress) -> None:
        bar = bars.get(progress.task)
        if bar is None or progress.done < bar.n:  # a new task, or the same one from the start
            if bar is not None:
                bar.close()
            unit = f" {progress.unit}" if progress.unit else "it"
            bar = tqdm(total=progress.total, desc=progress.task, unit=unit, mininterval=_SECONDS_BETWEEN_UPDATES)
            bars[progress.task] = bar
        elif progress.done == bar.n:
            return
        bar.total = progress.total
        bar.set_postfix({name: f"{value:.4g}" for name, value in progress.figures.items()}, refresh=False)
        bar.update(progress.done - bar.n)
        if progress.total is not None and progress.done >= progress.total:
            bar.close()

    return show
