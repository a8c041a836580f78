"""Confidence intervals and comparisons of accuracies, by Student's t (Welch 1947 for unequal variances)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ddkit.errors import UsageError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """The difference between two evaluations, in fractions of the test set.

    differences: the first's accuracy minus the second's, round by round; empty if the rounds are not paired.
    difference: of the means. interval: its 95 % confidence interval.
    p_value: probability of a difference at least as large if there is none in truth.
    Both are None where the rounds do not vary: a few that agree to the last image do not tell how much others would differ.
    """

    difference: float
    interval: tuple[float, float] | None
    p_value: float | None
    paired: bool
    differences: tuple[float, ...]

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2

    @property
    def exceeds_noise(self) -> bool | None:
        """True if zero lies outside the interval: the sets differ, with 95 % confidence. None without an interval."""
        return None if self.p_value is None else self.p_value < 1 - CONFIDENCE


def mean(values: Iterable[float]) -> float:
    """The mean of one value or more."""
    known = tuple(values)
    return sum(known) / len(known)


def sample_std(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1); None for fewer than two values, exactly 0 for equal ones."""
    if len(values) < 2:
        return None
    if max(values) - min(values) < 1e-12:  # equal, apart from rounding
        return 0.0
    center = mean(values)
    return math.sqrt(sum((value - center) ** 2 for value in values) / (len(values) - 1))


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean; None for fewer than two values, and for equal ones."""
    half = half_width([values])
    return None if half is None else (mean(values) - half, mean(values) + half)


def half_width(groups: Sequence[Sequence[float]], weight: float = 1.0) -> float | None:
    """Half the 95 % confidence interval of `weight` times the sum, or any signed sum, of the groups' means.

    None if a group has a single value, or if all groups consist of equal ones: rounds that agree to the last image say
    as little about the spread as a single round does.
    """
    found = _standard_error(groups, weight)
    if found is None:
        return None
    from scipy.special import stdtrit  # imported late, in a third of the time that scipy.stats takes

    error, freedom = found
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error


def compare(first: Sequence[float], second: Sequence[float], *, paired: bool) -> Comparison:
    """Compare the accuracies of at least two rounds each.

    paired: round i of both started from the same weights and drew the same shuffles and augmentations. Then a paired
    t-test applies, which detects smaller differences; otherwise it is Welch's test.
    Raises UsageError for fewer than two rounds, and for paired ones of different numbers.
    """
    if min(len(first), len(second)) < 2:
        raise UsageError("A single round says nothing about the noise.", "Compare with --rounds 2 or more.")
    if paired and len(first) != len(second):
        raise UsageError(f"{len(first)} rounds cannot be paired with {len(second)}.")
    difference = mean(first) - mean(second)
    differences = tuple(a - b for a, b in zip(first, second, strict=True)) if paired else ()
    groups = [differences] if paired else [first, second]
    found, half = _standard_error(groups), half_width(groups)
    if found is None or half is None:
        return Comparison(difference, None, None, paired, differences)
    from scipy.special import stdtr

    error, freedom = found
    p_value = 2 * float(stdtr(freedom, -abs(difference) / error))
    return Comparison(difference, (difference - half, difference + half), p_value, paired, differences)


def _standard_error(groups: Sequence[Sequence[float]], weight: float = 1.0) -> tuple[float, float] | None:
    """The standard error of the weighted sum of means, and its degrees of freedom by Welch and Satterthwaite.

    None where `half_width` is.
    """
    deviations = [sample_std(group) for group in groups]
    known = [deviation for deviation in deviations if deviation is not None]
    if len(known) < len(groups) or not any(known):
        return None
    variances = [(weight * deviation) ** 2 / len(group) for deviation, group in zip(known, groups, strict=True)]
    total = sum(variances)
    freedom = total**2 / sum(v**2 / (len(group) - 1) for v, group in zip(variances, groups, strict=True))
    return math.sqrt(total), freedom
