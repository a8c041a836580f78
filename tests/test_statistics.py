import pytest
from scipy import stats

from ddkit.errors import UsageError
from ddkit.statistics import compare, half_width, mean_interval, sample_std

FIRST, SECOND = (0.30, 0.34, 0.31, 0.36), (0.29, 0.33, 0.295, 0.352)


def test_paired_rounds_show_a_difference_that_unpaired_ones_hide():
    paired, unpaired = (compare(FIRST, SECOND, paired=paired) for paired in (True, False))
    assert paired.difference == unpaired.difference == pytest.approx(0.01075)
    assert paired.exceeds_noise and not unpaired.exceeds_noise
    assert paired.differences == pytest.approx((0.01, 0.01, 0.015, 0.008))
    assert unpaired.differences == ()


def test_intervals_are_those_of_student_and_of_welch():
    paired = compare(FIRST, SECOND, paired=True)
    half = stats.t.ppf(0.975, 3) * stats.tstd(paired.differences) / 2
    assert paired.interval == pytest.approx((paired.difference - half, paired.difference + half))
    unpaired = compare(FIRST, SECOND[:3], paired=False)
    assert unpaired.p_value == pytest.approx(stats.ttest_ind(FIRST, SECOND[:3], equal_var=False).pvalue)


def test_equal_accuracies_are_no_difference_and_constant_ones_prove_nothing():
    assert not compare((0.1, 0.2), (0.1, 0.2), paired=True).exceeds_noise
    for accuracies in (((0.25, 0.5), (0.125, 0.375)), ((0.25, 0.25), (0.125, 0.125))):
        constant = compare(*accuracies, paired=True)
        assert constant.difference == 0.125
        assert constant.exceeds_noise is constant.interval is constant.half_width is constant.p_value is None


@pytest.mark.parametrize("paired", [True, False])
def test_rounds_that_do_not_vary_in_either_group_give_a_difference_without_an_interval(paired):
    found = compare((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), paired=paired)
    assert found.difference == 1 and found.interval is found.exceeds_noise is None
    assert compare((0.2, 0.2, 0.2), (0.1, 0.12, 0.11), paired=paired).exceeds_noise


@pytest.mark.parametrize("first, second, paired", [((0.1,), (0.2,), True), ((0.1, 0.2), (0.1, 0.2, 0.3), True)])
def test_rounds_that_cannot_be_compared_raise_usage_error(first, second, paired):
    with pytest.raises(UsageError):
        compare(first, second, paired=paired)


def test_spread_of_one_round_is_none_and_of_equal_rounds_is_zero():
    assert sample_std((0.3,)) is None and mean_interval((0.3,)) is None
    assert sample_std((0.3, 0.3, 0.3)) == 0.0 and mean_interval((0.3, 0.3, 0.3)) is None


def test_half_width_of_a_difference_is_that_of_welch():
    welch = stats.ttest_ind(FIRST, SECOND[:3], equal_var=False).confidence_interval(0.95)
    assert half_width([FIRST, SECOND[:3]]) == pytest.approx((welch.high - welch.low) / 2)
    low, high = mean_interval(FIRST)
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 3) * stats.tstd(FIRST) / 2)
