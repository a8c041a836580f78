"""The formats of numbers in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence

from ddkit.reporting.rows import Estimate, Row


def percent(value: float | None) -> str:
    """A fraction in percent with two decimals, or a dash."""
    return "–" if value is None else f"{100 * value:.2f}"


def points(estimate: Estimate | None) -> str:
    """A difference in percentage points with its interval if there is one, `+1.23 ± 0.40`, or a dash."""
    if estimate is None:
        return "–"
    interval = "" if estimate.half_width is None else f" ± {100 * estimate.half_width:.2f}"
    return f"{100 * estimate.value:+.2f}{interval}"


def deviation(row: Row, name: str) -> str:
    """The standard deviation over the rounds, ` ±0.40`, to follow an accuracy; empty for a single round."""
    std = row.results[name].std if name in row.results else None
    return "" if std is None else f" ±{100 * std:.2f}"


def half_interval(row: Row) -> str:
    """The interval of the mean of a row's accuracies, `± 0.50` or `n/a (1 round)`; empty for published entries."""
    return "" if row.spread is None else interval_text(row.spread.half_width, row.rounds)


def interval_text(half_width: float | None, rounds: Sequence[int]) -> str:
    """`± 0.50` for half a width of 0.005; without one why: `n/a (1 round)` or `n/a (equal rounds)`."""
    if half_width is None:
        return f"n/a ({'1 round' if 1 in rounds else 'equal rounds'})"
    return f"± {100 * half_width:.2f}"


def rounds(row: Row) -> str:
    """The number of rounds, of each dataset if they differ: `3`, `3+1`."""
    return "+".join(str(n) for n in dict.fromkeys(row.rounds))
