"""Where marks and ticks go."""

import pytest

from ddkit.reporting.charts import interval_charts, line_chart, sampled_curve
from ddkit.reporting.leaderboard import build


def test_a_line_fills_its_plot_from_first_to_last():
    chart = line_chart("Loss", "step", {"loss": [(0, 4.0), (50, 3.0), (100, 2.0)]})
    (line,) = chart.lines
    assert line.points.split() == ["0.00,0.00", "50.00,50.00", "100.00,100.00"]
    assert (line.first, line.last, line.best) == (4.0, 2.0, 2.0)
    assert [tick.label for tick in chart.x_ticks] == ["0", "50", "100"]


def test_an_axis_from_zero_begins_there():
    chart = line_chart("Distance", "step", {"frechet": [(0, 40.0), (10, 20.0)]}, from_zero=True)
    assert chart.y_ticks[0].label == "0" and chart.lines[0].points.split()[1] == "100.00,50.00"


def test_points_that_are_not_finite_are_left_out():
    nan, inf = float("nan"), float("inf")
    chart = line_chart("Loss", "step", {"loss": [(0, nan), (1, 2.0), (2, inf), (3, 1.0)], "empty": [(0, nan)]})
    assert [line.name for line in chart.lines] == ["loss"] and len(chart.lines[0].points.split()) == 2
    assert line_chart("Loss", "step", {"loss": [(0, nan)]}) is None


@pytest.mark.parametrize("value", [0.0, 0.5, 1e-9, 1e9, -3.0])
def test_a_constant_can_be_drawn(value):
    chart = line_chart("Loss", "step", {"loss": [(5, value)]})
    x, y = map(float, chart.lines[0].points.split(","))
    assert 0 <= x <= 100 and 0 <= y <= 100 and chart.y_ticks


def test_long_curves_are_sampled_ends_included():
    assert sampled_curve(range(1001), 5) == (0, 250, 500, 750, 1000)
    assert sampled_curve([1.0, float("inf"), 2.0], 5) == (1.0, 2.0)


def test_marks_lie_between_the_ends_of_their_intervals_on_one_axis(result):
    (_, group) = build([
        result("mine", "cifar100", 0.10, 0.12, 0.11, epochs_setting=50),
        result("once", "cifar100", 0.30, epochs_setting=50),
    ])  # fmt: skip
    (chart,) = interval_charts(group)
    once, mine = chart.marks
    assert 0 <= mine.low < mine.position < mine.high < once.position <= 100
    assert (once.low, once.high) == (None, None)
    assert chart.ticks and all(0 <= tick.position <= 100 and tick.label.endswith("%") for tick in chart.ticks)


def test_a_group_of_both_datasets_has_a_chart_of_the_mean_first(result):
    (group,) = build([result("mine", "cifar100", 0.5, 0.5, 0.5), result("mine", "tinyimagenet", 0.2, 0.2, 0.2)])
    charts = interval_charts(group)
    assert [chart.dataset for chart in charts] == [None, "cifar100", "tinyimagenet"]
    assert [mark.value for mark in charts[0].marks] == pytest.approx([0.35, 0.2946])


def test_published_numbers_alone_have_no_chart(result):
    (group,) = build([result("mine", "cifar100", 0.5, 0.5, 0.5)])
    assert [chart.dataset for chart in interval_charts(group)] == ["cifar100"]
