"""The history of a team's sets: what was evaluated and packed, and what was the best so far."""

import pytest

from ddkit.history import Packed
from ddkit.reporting.history import build_history
from ddkit.runtime.files import sha256_of_files


def day(number, hour=10):
    return f"2026-07-{number:02}T{hour:02}:00:00+00:00"


@pytest.fixture
def results(result):
    return [
        result("baseline", "cifar100", 0.15, 0.16, epochs_setting=50, kind="random-real", date=day(1)),
        result("second", "cifar100", 0.40, 0.42, epochs_setting=50, date=day(3)),
        result("first", "cifar100", 0.20, 0.22, epochs_setting=50, date=day(2)),
        result("worse", "cifar100", 0.25, 0.27, epochs_setting=50, date=day(4)),
        result("best", "cifar100", 0.33, 0.34, 0.35, date=day(5)),
        result("best", "tinyimagenet", 0.13, 0.14, 0.15, date=day(6)),
    ]


def test_steps_are_in_order_of_time_without_baselines(results, result):
    history = build_history(results, [])
    assert [step.name for step in history.steps] == ["first", "second", "worse", "best", "best"]
    assert [step.is_best for step in history.steps] == [True, True, False, True, True]
    assert history.steps[0].settings == "E = 50" and history.steps[3].settings == "official"
    assert history.steps[0].half_width > 0.05
    between = result("between", "cifar100", 0.3, 0.3, epochs_setting=50, date=day(7))
    assert not build_history([*results, between], []).steps[-1].is_best


def test_a_set_and_a_generator_are_not_the_best_of_one_another(results, result):
    generator = result("track2", "cifar100", 0.30, 0.31, 0.32, track=2, official=True, date=day(8))
    history = build_history([*results, generator], [])
    assert history.steps[-1].is_best and history.steps[-1].settings == "track 2, official"
    assert [chart.title for chart in history.charts] == ["CIFAR-100, E = 50"]


def test_baselines_are_rows_under_the_leaderboards_names_and_never_the_best(results):
    history = build_history(results, [])
    (baseline,) = history.baselines
    assert (baseline.name, baseline.kind, baseline.accuracy) == ("random real images", "random-real", pytest.approx(0.155))
    assert baseline.settings == "E = 50" and not baseline.is_best
    assert [row.name for row in history.rows] == ["random real images", "first", "second", "worse", "best", "best"]
    assert [row["kind"] for row in history.as_data()] == ["random-real"] + ["submission"] * 5
    assert build_history(results, [], [2]).rows == ()


def test_zip_has_the_mean_of_its_sets_official_results_first(results):
    quick = results[4].__class__(**{**vars(results[4]), "epochs_setting": 50, "official": False, "date": day(7)})
    files = {"cifar100.pt": results[4].sha256, "tinyimagenet.pt": results[5].sha256}
    packed = Packed("final", "submission.zip", "c" * 64, 1, files, day(8), "recipe.toml")
    step = build_history([*results, quick], [packed]).steps[-1]
    assert (step.event, step.name, step.recipe) == ("packed", "final", "recipe.toml")
    assert step.accuracy == pytest.approx((0.34 + 0.14) / 2) and step.settings == "official"
    # Deviations of 0.01 and three rounds for both: 4 degrees of freedom.
    assert step.half_width == pytest.approx(2.7764 * 0.01 * (2 / 3) ** 0.5 / 2, rel=1e-4)
    assert step.datasets == "CIFAR-100 and TinyImageNet"
    unknown = Packed("other", "o.zip", "d" * 64, 1, files | {"cifar100.pt": "0" * 64}, day(9))
    assert build_history(results, [unknown]).steps[-1].accuracy is None


def test_zip_without_official_results_has_those_of_the_latest_settings_and_of_the_most_rounds(result):
    evaluated = [
        result("mine", "glyphs", 0.2, 0.3, epochs_setting=20, date=day(1), sha256="ab"),
        result("mine", "glyphs", 0.5, 0.6, epochs_setting=50, date=day(2), sha256="ab"),
        result("mine", "glyphs", 0.4, epochs_setting=50, date=day(3), sha256="ab"),  # a quick look
    ]
    packed = Packed("final", "submission.zip", "c" * 64, 1, {"glyphs.pt": "ab"}, day(4))
    step = build_history(evaluated, [packed]).steps[-1]
    assert (step.settings, step.rounds, step.accuracy) == ("E = 50", (2,), pytest.approx(0.55))


def test_bundle_has_the_accuracy_of_its_generators(result):
    files = {f"models/{name}/entry.json": name.encode().hex() for name in ("cifar100", "glyphs")} | {"generate.py": "ab"}
    packed = Packed("track2", "track2.zip", "c" * 64, 2, files, day(8))
    whole = sha256_of_files(files)
    facts = {"track": 2, "sha256": whole, "epochs_setting": 9, "date": day(9)}
    ours = [result("track2", name, 0.3, **facts) for name in ("glyphs", "cifar100")]
    step = next(step for step in build_history(ours, [packed]).steps if step.event == "packed")
    assert (step.accuracy, step.settings, step.datasets) == (pytest.approx(0.3), "track 2, E = 9", "CIFAR-100 and glyphs")
    assert build_history(ours[:1], [packed]).steps[0].accuracy is None


def test_chart_is_of_one_dataset_and_settings_with_the_best_so_far(results):
    (chart,) = build_history(results, []).charts
    assert chart.title == "CIFAR-100, E = 50"
    assert [mark.step.name for mark in chart.marks] == ["first", "second", "worse"]
    assert (chart.marks[0].x, chart.marks[1].x, chart.marks[2].x) == (0, 50, 100)
    assert chart.marks[0].y < chart.marks[2].y < chart.marks[1].y == chart.marks[2].best_y
    assert [tick.label for tick in chart.x_ticks][0].startswith("07-02")


def test_unknown_date_is_listed_first_and_not_charted(results, result):
    history = build_history([*results, result("old", "cifar100", 0.1, 0.2, epochs_setting=50, date="")], [])
    assert history.steps[0].name == "old" and history.steps[0].when == "unknown"
    assert len(history.charts[0].marks) == 3


@pytest.mark.parametrize("date", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_date_outside_of_the_calendar_is_unknown(result, date):
    sets = [result(name, "cifar100", 0.2, epochs_setting=50, date=when) for name, when in (("odd", date), ("usual", day(1)))]
    history = build_history(sets, [])
    assert [(step.name, step.when == "unknown") for step in history.steps] == [("odd", True), ("usual", False)]
    assert history.charts == ()


def test_chart_from_the_first_year_on_has_its_ticks(result):
    early = result("early", "cifar100", 0.2, epochs_setting=50, date="0001-01-02T00:00:00+00:00")
    (chart,) = build_history([early, result("usual", "cifar100", 0.3, epochs_setting=50, date=day(1))], []).charts
    assert [mark.x for mark in chart.marks] == [0, 100] and len(chart.x_ticks) == 4


def test_tracks_are_told_apart(results, result):
    ours = [*results, result("track two", "cifar100", 0.2, track=2)]
    assert [step.name for step in build_history(ours, [], [2]).steps] == ["track two"]
