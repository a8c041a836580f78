"""Reports of the progress of long computations, independent of what shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


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
