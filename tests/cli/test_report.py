"""`ddkit report` as people and programs call it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ddkit.cli import main
from ddkit.results import Result, append

RESULT = Result(
    name="mine", dataset="cifar100", track=1, sha256="0" * 64, source="submission/cifar100.pt", images=1000,
    images_per_class=(10, 10), epochs_setting=1000, accuracies=(0.31, 0.32, 0.33), official=True,
    loss_curves=((4.6, 2.0, 1.0),) * 3, date="2026-07-12T10:00:00+00:00",
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def results():
    """A file of results with an official entry, its baseline and a quick look."""
    quick = {"epochs_setting": 50, "official": False, "deviations": ("E = 50 instead of 1000",), "sha256": "1" * 64}
    for result in (
        RESULT,
        dataclasses.replace(RESULT, dataset="tinyimagenet", accuracies=(0.12, 0.13, 0.14), sha256="2" * 64),
        dataclasses.replace(RESULT, name="random", kind="random-real", accuracies=(0.17, 0.16, 0.18), sha256="3" * 64),
        dataclasses.replace(RESULT, name="[red]quick[/red] <b>", accuracies=(0.15,), **quick),
    ):
        append(result)
    return "runs/results.jsonl"


def run(*arguments, status=0):
    finished = CliRunner().invoke(main, ["report", *arguments])
    assert finished.exit_code == status, finished.output
    return finished.stdout, finished.stderr


def test_without_results_it_shows_the_published_entries_and_what_to_type():
    output, errors = run()
    assert "M-DATM" in output and "No results in runs/results.jsonl yet" in errors and "next: ddkit evaluate" in errors


@pytest.mark.slow
def test_piped_it_is_plain_text_and_only_the_leaderboard(results):
    ours = {name: value for name, value in os.environ.items() if name != "COLUMNS"}  # a runner of tests may set it
    done = subprocess.run(
        [sys.executable, "-m", "ddkit", "report"],
        check=True, capture_output=True, encoding="utf-8", env={**ours, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    output = done.stdout
    assert "\x1b" not in output and "mine" in output and "next:" not in output
    assert "next: ddkit report --html report.html" in done.stderr
    (mine,) = (line for line in output.splitlines() if "mine" in line)
    assert "32.00 ±1.00" in mine and "22.50" in mine and "2026-07-12" in mine


def test_json_is_the_same_leaderboard(results):
    output, _ = run("--json")
    data = json.loads(output)
    official, quick = data["leaderboard"]
    mine = next(row for row in official["rows"] if row["name"] == "mine")
    assert mine["rank"] == 2 and mine["score"] == pytest.approx(0.225) and official["track"] == 1
    assert quick["rows"][0]["name"] == "[red]quick[/red] <b>"
    assert data["problems"] == [] and data["quality"] == [] and data["rankings"] == []


def test_lines_that_cannot_be_used_are_named_and_left_out(results):
    with Path(results).open("a", encoding="utf-8") as file:
        file.write('{"format": 0, "name": "old [x]"}\n[1]\n{"name": "x"}\n{}\n{"name": "torn')
    output, errors = run()
    assert "mine" in output and "line 5: format version 0, this ddkit reads 1" in " ".join(errors.split())
    assert "2 more lines; --json lists them all" in errors
    assert len(json.loads(run("--json")[0])["problems"]) == 5


def test_a_missing_file_of_results_that_was_asked_for_is_an_error():
    _, errors = run("--results", "elsewhere.jsonl", status=3)
    assert "elsewhere.jsonl" in errors and "ddkit evaluate --results" in errors


@pytest.mark.slow
def test_thousands_of_results_are_shortened_unless_all_are_wanted(folder):
    line = json.dumps(dataclasses.asdict(dataclasses.replace(RESULT, epochs_setting=50, official=False)))
    (folder / "runs").mkdir()
    lines = (line.replace('"mine"', f'"run-{i}"').replace("0.31", f"0.{i:04}") for i in range(1100))
    Path("runs/results.jsonl").write_text("\n".join(lines))
    output, _ = run()
    assert "1,088 more entries: ddkit report --all" in output and output.count("run-") == 12
    assert run("--all")[0].count("run-") == 1100


def test_the_page_is_written_with_what_is_left(results):
    _, errors = run("--html", "out/report.html")
    html = Path("out/report.html").read_text(encoding="utf-8")
    assert "wrote out/report.html" in errors and "is no longer there" in html and "32.00" in html


def test_the_page_does_not_replace_the_record(results):
    record = Path("runs/results.jsonl")
    before = record.read_bytes()
    _, errors = run("--html", str(record), status=2)
    assert "does not end in .html or .htm" in errors and "results.html" in errors and record.read_bytes() == before


def test_a_page_that_cannot_be_written_says_why(results):
    Path("file").touch()
    _, errors = run("--html", "file/report.html", status=3)
    assert "Error: file: File exists." in errors and "Traceback" not in errors


def test_only_the_wanted_track(results):
    append(dataclasses.replace(RESULT, track=2, epochs_setting=100))
    assert "Track 2" in run()[0] and "Track 2" not in run("--track", "1")[0]
    assert "Track 1" not in run("--track", "2")[0]


@pytest.mark.slow
def test_the_quality_of_a_set_is_measured_and_its_sheets_written(colors):
    CliRunner().invoke(main, ["generate", "--dataset", colors, "--from-real", "first", "--ipc", "2", "--out", "m/colors.pt"])
    _, errors = run("--quality", "m", "--device", "cpu", status=2)
    assert "too few real images" in errors  # five a class
    _, errors = run("--quality", "nowhere", status=3)
    assert "There is no distilled set at nowhere" in errors and "ddkit generate" in errors


def test_history_lists_evaluations_and_zips_and_json_has_it(results, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    Path("runs/packed.jsonl").write_text(
        json.dumps({"name": "final", "path": "s.zip", "sha256": "9" * 64, "track": 1, "date": "2026-07-13T10:00:00+00:00",
                    "files": {"cifar100.pt": "0" * 64, "tinyimagenet.pt": "2" * 64}}) + "\n"
    )  # fmt: skip
    shown, _ = run("--history")
    assert "final (packed)" in shown and "22.50" in shown and "random real" in shown and "M-DATM" not in shown
    assert "17.00 ± 2.48" in shown
    steps = json.loads(run("--json")[0])["history"]
    assert [step["name"] for step in steps][-1] == "final" and steps[-1]["accuracy"] == pytest.approx(0.225)


def test_compare_shows_both_sets_and_refuses_unknown_ones(results):
    shown, _ = run("--compare", "mine", "random")
    assert "+15.00" in shown and "CIFAR-100: mine and random" in shown
    (compared,) = json.loads(run("--compare", "mine", "random", "--json")[0])["comparisons"]
    assert compared["difference"]["value"] == pytest.approx(0.15)
    _, errors = run("--compare", "mine", "ranom", status=2)
    assert "Did you mean 'random'?" in errors


def test_page_has_the_history_and_the_comparison(results):
    run("--compare", "mine", "random", "--html", "report.html")
    page = Path("report.html").read_text()
    assert "Two sets side by side" in page and "How you got here" in page and "@media print" in page
    assert "[red]quick[/red] &lt;b&gt;" in page
    history = page[page.index('id="history"') :]
    assert history.index("random real images") < history.index("</table>")
