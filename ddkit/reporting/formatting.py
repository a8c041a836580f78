"""How numbers are written, the same in the terminal, on the page and in Markdown."""

from __future__ import annotations

from ddkit.reporting.rows import Estimate, Row

LEGEND = (
    "Accuracy in % ± standard deviation over the rounds; 95\u00a0%: half the interval of the mean; differences in points, "
    "with 95\u00a0% intervals."
)


def percent(value: float | None) -> str:
    """A fraction in percent with two decimals; a dash for None."""
    return "–" if value is None else f"{100 * value:.2f}"


def points(estimate: Estimate | None) -> str:
    """A difference in points with its interval, `+1.23 ± 0.40`; without one where the rounds leave none; a dash for None."""
    if estimate is None:
        return "–"
    interval = "" if estimate.half_width is None else f" ± {100 * estimate.half_width:.2f}"
    return f"{100 * estimate.value:+.2f}{interval}"


def deviation(row: Row, name: str) -> str:
    """The standard deviation over the rounds, behind an accuracy."""
    std = row.results[name].std if name in row.results else None
    return "" if std is None else f" ±{100 * std:.2f}"


def half_interval(row: Row) -> str:
    """`± 0.50`, of the mean of a row's accuracies; empty without one."""
    half_width = row.spread.half_width if row.spread else None
    return "" if half_width is None else f"± {100 * half_width:.2f}"


def rounds(row: Row) -> str:
    """Of each dataset where they differ: `3`, `3+1`."""
    return "+".join(str(n) for n in dict.fromkeys(row.rounds))
