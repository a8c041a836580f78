"""What the terminal shows of results: at any width, with and without color, whatever entries are called."""

import io

import pytest
from rich.console import Console

from ddkit.cli._views import comparison_view, history_view, leaderboard_view, sparkline
from ddkit.reporting.compare import compare_sets
from ddkit.reporting.history import build_history
from ddkit.reporting.leaderboard import build
from ddkit.reporting.rows import shortened


def printed(groups, width, *, encoding="utf-8", most_rows=None, most_groups=None, **options):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="replace")
    console = Console(file=stream, width=width, highlight=False, **options)
    console.print(leaderboard_view(groups, console, most_rows=most_rows, most_groups=most_groups))
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.fixture
def groups(result):
    return build([
        result("mine", "cifar100", 0.31, 0.32, 0.33),
        result("mine", "tinyimagenet", 0.12, 0.13, 0.14),
        result("random", "cifar100", 0.17, 0.171, 0.169, kind="random-real"),
        result("random", "tinyimagenet", 0.07, 0.071, 0.069, kind="random-real"),
        result("quick [red]look[/red] <b>", "cifar100", 0.15, epochs_setting=50),
    ])  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160, 250])
def test_at_any_width_no_line_is_longer_and_no_number_is_lost(groups, width):
    shown = printed(groups, width)
    assert max(map(len, shown.splitlines())) <= width
    # Accuracy, mean, and both differences, whole.
    for number in ("32.00", "13.00", "22.50", "40.61", "-6.96", "+10.50"):
        assert number in shown, number
    assert "arXiv" in shown and "2410.13311" in shown


@pytest.mark.parametrize("width", [40, 100, 160])
def test_markup_in_names_is_text(groups, width):
    shown = " ".join(printed(groups, width).split())
    assert "quick [red]look[/red] <b>" in shown


def test_our_own_rows_are_highlighted_and_color_can_be_switched_off(groups, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    colored = printed(groups, 160, force_terminal=True, color_system="standard")
    (mine,) = (line for line in colored.splitlines() if "mine" in line)
    assert "\x1b[1;36m" in mine and "32m +10.50" in mine and "31m-6.96" in mine
    monkeypatch.setenv("NO_COLOR", "1")
    plain = printed(groups, 160, force_terminal=True, color_system="standard")
    assert "36m" not in plain and "32m" not in plain and "mine" in plain


def test_another_encoding_than_unicode_gets_plain_bars(groups):
    assert "█" in printed(groups, 160)
    shown = printed(groups, 160, encoding="latin-1").split("Not official")[0]
    assert "█" not in shown and "#" in shown


def test_long_tables_are_shortened_to_the_best_and_say_so(result):
    (_, group) = build([result(f"run-{i}", "cifar100", i / 100, epochs_setting=50) for i in range(30)])
    short, left_out = shortened(group, 5)
    assert [row.name for row in short.rows] == ["run-29", "run-28", "run-27", "run-26", "run-25"] and left_out == 25
    shown = printed([group], 120, most_rows=5)
    assert "25 more entries: ddkit report --all" in shown and "run-24" not in shown


def test_groups_of_a_track_beyond_the_first_are_counted(result):
    groups = build([
        *(result("mine", f"set-{i}", 0.1, epochs_setting=50) for i in range(9)),
        result("generator", "cifar100", 0.3, track=2, epochs_setting=50),
    ])  # fmt: skip
    shown = printed(groups, 120, most_groups=4)
    assert shown.count("more group") == 1 and "6 more groups with other settings" in shown.partition("Track 2")[0]
    assert "generator" in shown


@pytest.mark.parametrize("values, bars", [
    ([], ""), ([1.0], "▁"), ([2, 2, 2], "▁▁▁"), ([0, 7], "▁█"), ([3, 2, 1, 0], "█▆▃▁"), ([1, float("nan"), 0], "█▁"),
])  # fmt: skip
def test_sparklines(values, bars):
    assert sparkline(values) == bars


def test_a_sparkline_samples_long_curves_ends_included():
    bars = sparkline([0.0, *[1.0] * 500, 2.0])
    assert len(bars) == 10 and bars[0] == "▁" and bars[-1] == "█"


def test_comparison_shows_the_classes_at_both_ends_or_all(result):
    many = [result(name, "cifar100", 0.3 + k, 0.31 + k, 0.32 + k) for k, name in ((0.0, "low"), (0.1, "high"))]
    console = Console(file=io.StringIO(), width=100)
    (found,) = compare_sets("high", "low", many)
    console.print(comparison_view(found))
    assert "84 more: --all" in console.file.getvalue() and "+10.00" in console.file.getvalue()
    console.print(comparison_view(found, show_all=True))
    assert console.file.getvalue().count("worm") == 2


def test_comparison_of_rounds_that_do_not_vary_has_no_color(result):
    none, all_ = result("none", "cifar100", 0.0, 0.0, 0.0), result("all", "cifar100", 1.0, 1.0, 1.0)
    (found,) = compare_sets("all", "none", [none, all_])
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    console.print(comparison_view(found))
    (line,) = [line for line in console.file.getvalue().splitlines() if "+100.00" in line]
    assert "\x1b[32m" not in line and "±" not in line


@pytest.mark.parametrize(("rounds", "said"), [(1, False), (2, True)])
def test_comparison_speaks_of_intervals_only_where_there_are_some(result, rounds, said):
    values = {"high": (0.4, 0.42), "low": (0.2, 0.23)}
    (found,) = compare_sets("high", "low", [result(name, "cifar100", *each[:rounds]) for name, each in values.items()])
    console = Console(file=io.StringIO(), width=100)
    console.print(comparison_view(found))
    text = console.file.getvalue()
    assert ("with 95 % intervals (paired rounds)" in text, "A single round gives no interval" in text) == (said, not said)


@pytest.fixture
def results(result):
    return [
        result(name, "cifar100", mean - 0.01, mean + 0.01, epochs_setting=50, date=f"2026-07-0{day}T10:00:00+00:00", **more)
        for day, (name, mean, more) in enumerate([
            ("baseline", 0.155, {"kind": "random-real"}), ("first", 0.21, {}), ("second", 0.31, {}), ("worse", 0.26, {}),
        ], start=1)
    ]  # fmt: skip


def test_history_says_which_steps_were_the_best_so_far(results):
    console = Console(file=io.StringIO(), width=120)
    console.print(history_view(build_history(results, []), console))
    shown = console.file.getvalue().splitlines()
    rows = {name: next(line.split() for line in shown if name in line) for name in ("second", "worse")}
    assert "best" in rows["second"] and "best" not in rows["worse"]


def test_history_of_baselines_alone_shows_them(results):
    console = Console(file=io.StringIO(), width=160)
    console.print(history_view(build_history(results[:1], []), console))
    assert "random real images" in console.file.getvalue() and "15.50" in console.file.getvalue()


def test_history_of_nothing_says_so():
    console = Console(file=io.StringIO(), width=100)
    console.print(history_view(build_history([], []), console))
    assert "Nothing was evaluated" in console.file.getvalue()


@pytest.mark.parametrize(("width", "names"), [(40, ()), (60, ("first", "second", "worse")), (120, ("second", "worse"))])
def test_history_is_as_wide_as_the_console_and_shows_every_name(results, width, names):
    console = Console(file=io.StringIO(), width=width)
    console.print(history_view(build_history(results, []), console))
    table = console.file.getvalue()
    assert all(name in table for name in names) and max(map(len, table.splitlines())) <= width
