"""The report of a results file, and its plain values."""

import json
import re

import pytest

from ddkit.errors import UsageError
from ddkit.reporting.leaderboard import build
from ddkit.reporting.report import as_data, report
from ddkit.results import append


@pytest.fixture
def groups(result):
    return build([
        result("mine", "cifar100", 0.31, 0.32, 0.33),
        result("mine", "tinyimagenet", 0.12, 0.13, 0.14),
        result("=cmd()|`a`<b>", "cifar100", 0.15, epochs_setting=50),
    ])  # fmt: skip


def test_plain_values_survive_json_and_are_fractions(groups):
    official, other = json.loads(json.dumps(as_data(groups)))
    assert [row["rank"] for row in official["rows"]] == [1, 2]
    mine = official["rows"][1]
    assert mine["score"] == pytest.approx(0.225) and mine["rounds"] == {"cifar100": 3, "tinyimagenet": 3}
    assert mine["to_first"]["value"] == pytest.approx(0.225 - 0.2946) and mine["interval"]["half_width"] > 0
    assert other["rows"][0]["deviations"] == ["E = 50 instead of 1000"]


def test_report_of_a_results_file_ranks_it_and_writes_the_page(result, tmp_path):
    path, page = tmp_path / "results.jsonl", tmp_path / "report.html"
    append(result("mine", "glyphs", 0.5, 0.6), path)
    board = report(path, html=page, runs_folder=tmp_path)
    assert [row.name for group in board.groups for row in group.rows] == ["M-DATM", "mine"]
    assert board.as_data()["leaderboard"][1]["rows"][0]["accuracy"] == {"glyphs": pytest.approx(0.55)}
    assert "mine" in page.read_text(encoding="utf-8") and board.problems == ()
    assert board.as_data()["written"] == [str(page)]


def test_report_of_no_track_there_is_raises_usage_error(tmp_path):
    with pytest.raises(UsageError, match="Unknown track 3"):
        report(tracks=[3])


def test_report_of_one_track_counts_and_compares_its_results_only(result, tmp_path):
    path, page = tmp_path / "results.jsonl", tmp_path / "report.html"
    for name, accuracy in (("a", 0.3), ("b", 0.2)):
        append(result(name, "cifar100", accuracy, accuracy, accuracy), path)
        append(result(name, "cifar100", accuracy, track=2, official=False, epochs_setting=100), path)
    board = report(path, tracks=[2], compare=("a", "b"), html=page, runs_folder=tmp_path)
    assert [one.first.track for one in board.comparisons] == [2] and len(board.results) == 4
    assert re.search(r"Your evaluations</h2>\s*<p class=\"value \">2</p>", page.read_text(encoding="utf-8"))
