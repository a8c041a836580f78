"""The leaderboard as JSON, comma-separated values and Markdown."""

import csv
import io
import json

import pytest

from ddkit.reporting.export import as_csv, as_data, as_markdown
from ddkit.reporting.leaderboard import build


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


def test_csv_has_a_line_an_entry_and_no_formulas(groups):
    lines = list(csv.DictReader(io.StringIO(as_csv(groups))))
    assert [line["entry"] for line in lines] == ["M-DATM", "mine", "'=cmd()|`a`<b>"]
    assert float(lines[1]["mean"]) == pytest.approx(0.225) and lines[1]["official"] == "true"
    assert lines[2]["mean"] == "" and lines[2]["cifar100"] == "0.15" and lines[2]["rank"] == ""


def test_markdown_keeps_names_as_text_and_tables_whole(groups):
    text = as_markdown(groups)
    assert "**mine**" in text and "22.50 ±" in text
    (line,) = (line for line in text.splitlines() if "cmd" in line)
    assert "\\|\\`a\\`&lt;b>" in line
    table = [line for line in text.splitlines() if line.startswith("|")]
    columns = [line.replace("\\|", "").count("|") for line in table]
    assert columns[:4] == [columns[0]] * 4
