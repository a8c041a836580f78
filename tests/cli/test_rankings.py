"""`ddkit evaluate --ranking`, and its scores in `ddkit report`."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ddkit.cli import main
from ddkit.results import read

QUICK = ("--epochs-setting", "3", "--rounds", "2", "--device", "cpu")


def run(*arguments, status=0):
    finished = CliRunner().invoke(main, arguments)
    assert finished.exit_code == status, finished.output
    return finished.stdout, finished.stderr


@pytest.fixture
def mine(colors, tmp_path, monkeypatch):
    """A set of two pictures a color, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    run("generate", "--dataset", colors, "--from-real", "first", "--ipc", "2", "--out", "mine/colors.pt")
    facts = tmp_path / "mine" / "colors.json"
    facts.write_text(facts.read_text().replace("first-real", "generated"))
    return "mine/colors.pt"


@pytest.mark.slow
def test_ranking_runs_missing_evaluations_once_and_report_shows_the_scores(mine):
    output, errors = run("evaluate", mine, *QUICK, "--ranking", "--json")
    (ranking,) = json.loads(output)["rankings"]
    assert ranking["missing"] == [] and 0 <= ranking["LRS"] <= 1 and 0 <= ranking["ARS"] <= 1
    assert ranking["HLR"] == pytest.approx(_mean("full-real") - _mean("submission"))
    assert ranking["IOR"] == pytest.approx(_mean("submission") - _mean("random-real"))
    assert "For DD-Ranking, evaluating the whole real training set, with augmentation: 1 round of 4 epochs" in errors
    assert len(read("runs/results.jsonl").results) == 5

    again, errors = run("evaluate", mine, *QUICK, "--ranking")
    assert "For DD-Ranking" not in errors and f"{ranking['LRS']:.3f}" in again
    assert len(read("runs/results.jsonl").results) == 5

    assert f"{ranking['LRS']:.3f}" in run("report")[0]
    (reported,) = json.loads(run("report", "--json")[0])["rankings"]
    assert reported == ranking
    run("report", "--html", "report.html")
    page = Path("report.html").read_text(encoding="utf-8").split("DD-Ranking</h5>")[1]
    assert all(f"<dd>{ranking[name]:.3f}</dd>" in page for name in ("LRS", "ARS", "HLR", "IOR"))


def _mean(kind):
    (result,) = (r for r in read("runs/results.jsonl").results if r.kind == kind and r.augment)
    return result.mean


@pytest.mark.slow
def test_random_real_images_are_not_ranked(mine, colors):
    run("generate", "--dataset", colors, "--from-real", "random", "--ipc", "2", "--out", "random/colors.pt")
    _, errors = run("evaluate", "random/colors.pt", *QUICK, "--ranking", status=2)
    assert "real images themselves" in " ".join(errors.split())
    output, _ = run("evaluate", mine, "random/colors.pt", *QUICK, "--ranking", "--json")
    assert [ranking["name"] for ranking in json.loads(output)["rankings"]] == ["mine"]
