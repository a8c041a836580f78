import json
import shutil

import processes
import pytest
import torch
from click.testing import CliRunner

from ddkit.challenge import GLYPHS
from ddkit.cli import main
from ddkit.data.images import normalize
from ddkit.data.store import load_dataset


def run(*arguments):
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def half_submission(work):
    """A challenge folder that lacks TinyImageNet, with noise for CIFAR-100."""
    (work / "submission").mkdir()
    torch.save(torch.randn(1000, 3, 32, 32), work / "submission" / "cifar100.pt")
    return work


def test_check_of_an_unacceptable_submission_exits_with_1_and_a_table(half_submission):
    finished = run("check")
    assert finished.exit_code == 1
    assert "unacceptable" in finished.stdout and "F003" in finished.stdout
    assert "tinyimagenet.pt is missing" in " ".join(finished.stdout.split())
    assert "Traceback" not in finished.stderr


@pytest.mark.slow
def test_check_with_json_prints_nothing_else_on_stdout(half_submission):
    finished = processes.run("-m", "ddkit", "check", "--json")
    report = json.loads(finished.stdout)
    assert report["ok"] is False
    assert {"level", "code", "message", "where"} == set(report["findings"][0])
    assert "Checking" in finished.stderr


def test_ignored_code_may_be_in_lower_case_and_must_be_a_code(half_submission):
    finished = run("check", "--ignore", "f003", "--json")
    assert "F003" not in {finding["code"] for finding in json.loads(finished.stdout)["findings"]}
    finished = run("check", "--ignore", "order")
    assert finished.exit_code == 2 and "'order' is not the code of a finding" in finished.stderr


def test_check_with_strict_fails_on_warnings(half_submission):
    torch.save(torch.randn(1000, 3, 32, 32).requires_grad_(), half_submission / "submission" / "cifar100.pt")
    for strict, status in (((), 0), (("--strict",), 1)):
        finished = run("check", "submission/cifar100.pt", "--json", *strict)
        levels = {finding["code"]: finding["level"] for finding in json.loads(finished.stdout)["findings"]}
        assert finished.exit_code == status and levels["T005"] == ("error" if strict else "warning")


@pytest.mark.slow
def test_fix_order_writes_the_right_order_to_another_file(letters, work):
    real = load_dataset(letters, "train")
    right = normalize(real.images.unflatten(0, (10, -1))[:, :10].flatten(0, 1), GLYPHS)
    torch.save(right.flip(0), work / "glyphs.pt")
    finished = run("check", "glyphs.pt")
    assert finished.exit_code == 1 and "L006" in finished.stdout and "--fix-order" in " ".join(finished.stdout.split())
    finished = run("check", "glyphs.pt", "--fix-order", "fixed.pt")
    assert finished.exit_code == 0 and "next: ddkit check fixed.pt --dataset glyphs" in finished.stderr, finished.stderr
    finished = run("check", "fixed.pt", "--dataset", "glyphs", "--json")
    assert "L001" in {finding["code"] for finding in json.loads(finished.stdout)["findings"]}
    (work / "submission").mkdir()
    finished = run("check", "submission", "--fix-order", "out.pt")
    assert finished.exit_code == 2 and "Traceback" not in finished.stderr


def test_fix_order_with_options_that_judge_is_wrong_usage(work):
    finished = run("check", "glyphs.pt", "--fix-order", "out.pt", "--strict", "--ignore", "L001")
    assert finished.exit_code == 2 and "--strict, --ignore have no effect" in finished.stderr


@pytest.mark.slow
def test_first_check_reports_the_progress_of_fitting_the_classifier(letters, own_cache, work):
    shutil.rmtree(own_cache / "_checks")
    real = load_dataset(letters, "train")
    torch.save(normalize(real.images.unflatten(0, (10, -1))[:, :10].flatten(0, 1), GLYPHS), work / "glyphs.pt")
    first = run("check", "glyphs.pt")
    assert "fitting a classifier on real images of glyphs, once" in first.stderr
    second = run("check", "glyphs.pt")
    assert second.exit_code == 0 and "fitting" not in second.stderr


def test_check_without_a_submission_says_how_to_make_one(work):
    finished = run("check")
    assert finished.exit_code == 1
    assert "does not exist" in finished.stdout and "ddkit generate" in finished.stdout


def test_pack_of_what_check_refuses_exits_with_1_and_writes_nothing(half_submission):
    finished = run("pack")
    assert finished.exit_code == 1
    assert "tinyimagenet.pt is missing" in finished.stderr and "Traceback" not in finished.stderr
    assert not (half_submission / "submission.zip").exists()


def test_pack_names_the_zip_and_its_hashes(half_submission):
    finished = run("pack", "--ignore", "F003", "--json")
    assert finished.exit_code == 0, finished.stderr
    packed = json.loads(finished.stdout)
    assert [file["name"] for file in packed["files"]] == ["cifar100.pt"]
    assert len(packed["sha256"]) == 64
    assert (half_submission / "submission.zip").stat().st_size > 12_000_000
