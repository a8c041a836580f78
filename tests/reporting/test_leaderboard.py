"""Ranks, groups within which numbers can be compared, and the differences to first place and to random images."""

import dataclasses
import math

import pytest

from ddkit.reporting.formatting import half_interval
from ddkit.reporting.leaderboard import build


def named(group):
    return [(row.rank, row.name) for row in group.rows]


def test_without_results_the_published_entries_stand_alone():
    (group,) = build([])
    assert named(group) == [(1, "M-DATM")]
    (row,) = group.rows
    assert row.score == pytest.approx((0.4061 + 0.1831) / 2) and "arXiv 2410.13311" in group.verdict(row)
    assert row.to_first is row.to_random is row.spread is None


def test_both_datasets_make_one_score_and_a_rank(result):
    (group,) = build([
        result("mine", "cifar100", 0.50, 0.52, 0.51),
        result("mine", "tinyimagenet", 0.25, 0.26, 0.24),
        result("other", "cifar100", 0.30, 0.31, 0.29),
        result("other", "tinyimagenet", 0.10, 0.11, 0.12),
    ])  # fmt: skip
    assert named(group) == [(1, "mine"), (2, "M-DATM"), (3, "other")]
    assert group.rows[0].score == pytest.approx((0.51 + 0.25) / 2)
    assert group.rows[0].to_first.value == pytest.approx(0.38 - 0.2946)
    assert group.rows[0].to_first.is_clear
    assert group.rows[2].to_first.value < 0 and group.rows[2].to_first.is_clear


def test_one_dataset_alone_has_no_rank_and_says_so(result):
    (group,) = build([result("mine", "cifar100", 0.50, 0.52, 0.51)])
    assert named(group) == [(1, "M-DATM"), (None, "mine")]
    mine = group.rows[1]
    assert mine.score is None and mine.remarks == ("no rank without TinyImageNet",)
    assert mine.to_first.value == pytest.approx(0.51 - 0.4061)


def test_the_interval_of_a_mean_by_hand(result):
    # Two rounds: t(0.975, 1) = 12.706; s = 0.02 / sqrt(2); half = t s / sqrt(2).
    (group,) = build([result("mine", "cifar100", 0.50, 0.52, epochs_setting=50)])[1:]
    (row,) = group.rows
    assert row.spread.half_width == pytest.approx(12.7062 * 0.01, rel=1e-4)


def test_the_difference_to_random_real_images_has_welchs_interval(result):
    group = build([
        result("mine", "cifar100", 0.20, 0.22, 0.21, epochs_setting=50),
        result("random", "cifar100", 0.13, 0.15, 0.14, epochs_setting=50, kind="random-real"),
    ])[1]  # fmt: skip
    mine, random = group.rows
    assert (mine.name, random.name) == ("mine", "random real images")
    assert mine.to_random.value == pytest.approx(0.07)
    # Equal spreads and rounds: n1 + n2 - 2 = 4 degrees of freedom, t = 2.7764, standard error 0.01 sqrt(2 / 3).
    assert mine.to_random.half_width == pytest.approx(2.7764 * 0.01 * math.sqrt(2 / 3), rel=1e-4)
    assert random.to_random is None


def test_the_intervals_of_a_score_over_both_datasets_by_hand(result):
    results = [
        result("mine", "cifar100", 0.50, 0.52, 0.51),
        result("mine", "tinyimagenet", 0.25, 0.26, 0.24),
        result("random", "cifar100", 0.13, 0.15, 0.14, kind="random-real"),
        result("random", "tinyimagenet", 0.05, 0.07, 0.06, kind="random-real"),
    ]
    mine, *_, random = build(results)[0].rows
    # Deviations of 0.01 and three rounds throughout: two means have 4 degrees of freedom, t = 2.7764; four 8, t = 2.3060.
    assert mine.spread.half_width == pytest.approx(2.7764 * 0.01 * math.sqrt(2 / 3) / 2, rel=1e-4)
    assert mine.to_random.value == pytest.approx((0.37 + 0.19) / 2)
    assert mine.to_random.half_width == pytest.approx(2.3060 * 0.01 * math.sqrt(4 / 3) / 2, rel=1e-4)
    assert build(results[:3])[0].rows[0].to_random is None  # random real images of one dataset only
    assert random.to_random is random.to_first is random.rank is None


@pytest.mark.parametrize("other", [
    {"epochs_setting": 60}, {"network": "resnet18"}, {"augment": False}, {"precision": "bfloat16"}, {"ipc": 50},
    {"track": 2}, {"test_images": 2000},
])  # fmt: skip
def test_what_was_obtained_otherwise_is_not_compared(result, other):
    fields = {"epochs_setting": 50} | other
    groups = build([
        result("mine", "cifar100", 0.20, 0.22, 0.21, epochs_setting=50),
        result("random", "cifar100", 0.13, 0.15, 0.14, kind="random-real", **fields),
    ])  # fmt: skip
    (group,) = (g for g in groups if any(row.name == "mine" for row in g.rows))
    assert [row.name for row in group.rows] == ["mine"] and group.rows[0].to_random is None
    assert "No random real images were evaluated under these settings." in group.remarks


def test_results_on_other_test_images_are_not_compared_and_replace_nothing(result):
    mine = result("mine", "glyphs", 0.50, 0.52, test_sha256="ab" * 32)
    random = result("random", "glyphs", 0.13, 0.15, kind="random-real", test_sha256="ab" * 32)
    elsewhere = dataclasses.replace(mine, accuracies=(0.1, 0.1), test_sha256="cd" * 32)
    other, first = build([mine, random, elsewhere])[1:]
    assert [row.value for row in first.rows] == pytest.approx([0.51, 0.14]) and first.rows[0].to_random is not None
    assert [row.value for row in other.rows] == pytest.approx([0.1]) and other.rows[0].to_random is None
    assert first.title.endswith("test images ababab") and other.title.endswith("test images cdcdcd")


def test_test_images_of_the_challenge_are_one_set_and_others_are_named(result):
    known = [result(name, "cifar100", 0.2, epochs_setting=50, test_sha256=sha) for name, sha in (("a", ""), ("b", "ab"))]
    strange = result("c", "cifar100", 0.2, epochs_setting=50, test_sha256="cd",
                     deviations=("test images or labels that are not the challenge's",))  # fmt: skip
    *_, other, same = build([*known, strange])
    assert sorted(row.name for row in same.rows) == ["a", "b"] and "test images" not in same.title
    assert [row.name for row in other.rows] == ["c"] and other.title.endswith("other test images")


def test_deviations_that_a_whole_group_shares_are_shown_once(result):
    group = build([
        result("a", "cifar100", 0.2, epochs_setting=50, deviations=("E = 50 instead of 1000",)),
        result("b", "cifar100", 0.1, epochs_setting=50, deviations=("E = 50 instead of 1000", "1 round instead of 3")),
    ])[1]  # fmt: skip
    assert group.remarks[0] == "Not comparable with the published entries: E = 50 instead of 1000."
    assert [group.verdict(row) for row in group.rows] == ["not official", "1 round instead of 3"]


def test_evaluated_again_after_a_change_both_stand_there(result):
    old = result("mine", "cifar100", 0.20, 0.21, epochs_setting=50)
    new = result("mine", "cifar100", 0.30, 0.31, epochs_setting=50)
    again = dataclasses.replace(old, accuracies=(0.22, 0.23))  # the very same file and seed
    assert [row.value for row in build([old, new])[1].rows] == pytest.approx([0.305, 0.205])
    assert [row.value for row in build([old, again])[1].rows] == pytest.approx([0.225])


def test_a_set_that_was_renamed_is_one_row_with_its_new_path(result):
    old = result("mine", "cifar100", 0.20, 0.21, 0.22)
    new = dataclasses.replace(old, source="mine/renamed.pt")
    (row,) = (row for row in build([old, new])[0].rows if row.is_local)
    assert row.results["cifar100"].source == "mine/renamed.pt"


def test_of_two_files_for_a_dataset_the_one_that_is_packed_has_the_score_or_none_has(result):
    other = result("mine", "tinyimagenet", 0.1, 0.12, 0.11)
    packed = result("mine", "cifar100", 0.3, 0.31, 0.32)
    first, second = (result("mine", "cifar100", value, 0.4, 0.4, source=f"mine/{value}.pt") for value in (0.4, 0.5))

    def scores(*results):
        return [row.score for row in build(results)[0].rows if row.is_local]

    assert scores(packed, first, other) == scores(first, packed, other) == [pytest.approx(0.21), None]
    assert scores(first, second, other) == [None] * 3
    assert scores(first, other) == [pytest.approx(0.255)]


def test_a_quick_look_takes_no_place_of_more_rounds(result):
    long = result("mine", "cifar100", 0.20, 0.22, 0.21, epochs_setting=50)
    real = result("random", "cifar100", 0.13, 0.15, 0.14, epochs_setting=50, kind="random-real")
    looks = [dataclasses.replace(whole, accuracies=whole.accuracies[:1]) for whole in (long, real)]
    mine, random = build([long, real, *looks])[1].rows
    assert (mine.value, random.value) == (pytest.approx(0.21), pytest.approx(0.14))
    assert mine.to_random.half_width is not None
    assert [row.value for row in build([*looks, long, real])[1].rows] == pytest.approx([0.21, 0.14])


def test_time_budgets_of_track_2_have_tables_of_their_own(result):
    of = {"track": 2, "official": False}
    groups = build([
        result("mine", "cifar100", 0.30, 0.31, epochs_setting=100, time_budget=60.0, **of),
        result("mine", "cifar100", 0.33, 0.34, epochs_setting=100, time_budget=120.0, **of),
        result("mine", "cifar100", 0.35, 0.36, epochs_setting=100, time_budget=600.0, **of),
    ], [2])  # fmt: skip
    titles = ["Not official: E = 100", *(f"Not official: E = 100, {s} s to generate" for s in (120, 60))]
    assert [group.title for group in groups[1:]] == titles
    assert [len(group.rows) for group in groups[1:]] == [1, 1, 1]


def test_a_dataset_made_again_keeps_the_result_of_the_other(result):
    (group,) = build([
        result("mine", "cifar100", 0.3, 0.3, 0.3),
        result("mine", "tinyimagenet", 0.1, 0.1, 0.1, date="2026-07-01T00:00:00+00:00"),
        result("mine", "cifar100", 0.4, 0.4, 0.4),
    ])  # fmt: skip
    best = group.rows[1]
    assert best.score == pytest.approx(0.25) and best.remarks == ("TinyImageNet as evaluated on 2026-07-01",)


def test_track_2_has_ranks_without_numbers(result):
    groups = build([result("generator", "cifar100", 0.3, 0.31, 0.32, track=2, official=True)])
    track_2 = next(group for group in groups if group.track == 2)
    assert [(row.rank, row.score) for row in track_2.rows] == [(1, None), (2, None), (3, None), (None, None)]
    assert any("no public numbers" in remark for remark in track_2.remarks)


def test_datasets_of_ones_own_have_groups_of_their_own(result):
    groups = build([result("mine", "letters", 0.6, epochs_setting=50), result("mine", "signs", 0.7, epochs_setting=50)])
    assert {group.title for group in groups[1:]} == {"letters: E = 50", "signs: E = 50"}
    assert {group.rows[0].score for group in groups[1:]} == {0.6, 0.7}


def test_first_real_images_are_a_baseline_and_no_entry(result):
    group = build([result("first", "cifar100", 0.12, epochs_setting=50, kind="first-real")])[1]
    (row,) = group.rows
    assert row.name == "first real images" and not row.is_local


def test_track_2_says_what_was_made_of_the_time(result):
    made = {"generated": (6000, 5900), "generation_seconds": (580.0, 610.0)}
    groups = build([result("generator", "cifar100", 0.3, 0.31, track=2, official=True, **made)])
    (row,) = [row for group in groups for row in group.rows if row.is_local]
    assert "CIFAR-100: 5,950 images a round, 10.0 a second" in row.remarks


def test_only_the_wanted_tracks(result):
    results = [result("generator", "cifar100", 0.3, track=2, epochs_setting=50)]
    assert {group.track for group in build(results)} == {2}
    assert {group.track for group in build([])} == {1}
    assert {group.track for group in build([*results, result("mine", "cifar100", 0.3)])} == {1, 2}
    assert {group.track for group in build(results, [1])} == {1}


def test_equal_rounds_leave_no_interval_as_a_single_one_does(result):
    mine = result("mine", "cifar100", 0.5, 0.5, 0.5, epochs_setting=3)
    random = result("random", "cifar100", 0.4, 0.4, 0.4, epochs_setting=3, kind="random-real")
    (group,) = [group for group in build([mine, random], [1]) if any(row.results for row in group.rows)]
    row = next(row for row in group.rows if row.name == "mine")
    assert row.spread.half_width is row.to_random.half_width is row.to_random.is_clear is mine.interval is None
    assert "so no interval can be given" in group.remarks[-1]
    single = result("mine", "cifar100", 0.5, epochs_setting=3)
    assert not any("no interval can" in remark for group in build([single], [1]) for remark in group.remarks)


def test_sets_of_one_name_are_distinguished_by_their_origin(result):
    (*_, group) = build([
        result("submission", "glyphs", 0.55, made_by={"kind": "generated"}),
        result("submission", "glyphs", 0.91, made_by={"kind": "refined", "refined_steps": 60}),
        result("other", "glyphs", 0.5, made_by={"kind": "generated"}),
    ])  # fmt: skip
    assert [row.name for row in group.rows] == ["submission, refined, 60 steps", "submission, generated", "other"]


def test_sets_of_one_name_and_origin_are_distinguished_by_hash_or_seed(result):
    (*_, group) = build([
        result("mine", "glyphs", 0.5, sha256="ab12cdef"), result("mine", "glyphs", 0.4, sha256="34567890"),
        result("yours", "glyphs", 0.3, sha256="ffff"), result("yours", "glyphs", 0.2, sha256="ffff", seed=1),
    ])  # fmt: skip
    assert [row.name for row in group.rows] == ["mine, ab12cd", "mine, 345678", "yours, seed 0", "yours, seed 1"]


def test_interval_of_a_single_round_is_shown_as_not_available(result):
    (*_, group) = build([result("mine", "glyphs", 0.5), result("yours", "glyphs", 0.4, 0.4)])
    assert [half_interval(row) for row in group.rows] == ["n/a (1 round)", "n/a (equal rounds)"]
