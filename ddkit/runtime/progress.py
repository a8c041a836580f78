"""How long computations tell where they are, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """One report of a running task.

    task: what is running, in a few words; a new text starts a new bar.
    done, total: in `unit`s; total is None where it cannot be known.
    figures: numbers worth showing beside the bar, by name ("loss", "accuracy").
    """

    task: str
    done: float
    total: float | None
    unit: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


Listener = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """The listener of whoever does not want to know."""
