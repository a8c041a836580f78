"""Whether two sets differ by more than the noise of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ddkit.errors import UsageError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """The difference between two evaluations, in fractions of the test set.

    differences: of the first's accuracy minus the second's, round by round; empty where rounds are not paired.
    difference: of the means. interval: its 95 % confidence interval.
    p_value: of a difference at least as large where there is none in truth.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    paired: bool
    differences: tuple[float, ...]

    @property
    def exceeds_noise(self) -> bool:
        """Whether the interval leaves out zero: the sets differ, with 95 % confidence."""
        return self.p_value < 1 - CONFIDENCE


def compare(first: Sequence[float], second: Sequence[float], *, paired: bool) -> Comparison:
    """Compare accuracies of at least two rounds each.

    paired: round i of both started from the same weights and drew the same shuffles and augmentations, so that a
    paired t-test applies, which sees smaller differences; otherwise Welch's test, for unequal variances.
    Raises UsageError for fewer than two rounds, or for a different number of paired ones.
    """
    if min(len(first), len(second)) < 2:
        raise UsageError("One round says nothing about the noise.", "Compare with --rounds 2 or more.")
    if paired and len(first) != len(second):
        raise UsageError(f"{len(first)} rounds cannot be paired with {len(second)}.")
    difference = sum(first) / len(first) - sum(second) / len(second)
    differences = tuple(a - b for a, b in zip(first, second, strict=True)) if paired else ()
    spreads = (differences,) if paired else (first, second)
    if all(max(spread) - min(spread) < 1e-12 for spread in spreads):
        # A few rounds that agree to the last image do not tell how much others would differ.
        interval = (0.0, 0.0) if abs(difference) < 1e-12 else (-1.0, 1.0)
        return Comparison(difference, interval, 1.0, paired, differences)
    from scipy.stats import ttest_ind, ttest_rel

    test = ttest_rel(first, second) if paired else ttest_ind(first, second, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    return Comparison(difference, (float(low), float(high)), float(test.pvalue), paired, differences)
