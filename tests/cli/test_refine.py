"""`ddkit refine` as a person runs it: its results, stopping and resuming, and what it refuses."""

import dataclasses
import json
import os
import signal

import processes
import pytest
import torch
from click.testing import CliRunner

from ddkit.cli import main
from ddkit.cli.refine import refine
from ddkit.distill import estimate
from ddkit.distill.generate import FromReal, generate
from ddkit.distill.refine import recorded_settings
from ddkit.distill.settings import PRESETS, ExpertSettings, RefineSettings

VALIDATE = ["--batch-real", "2", "--device", "cpu", "--set"]
QUICK = [*VALIDATE, "val_epochs=0"]


@pytest.fixture
def submission(colors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return generate(colors, 2, FromReal("first"), tmp_path / "submission" / "colors.pt").tensor


def ddkit(*words):
    return CliRunner().invoke(main, ["refine", *words])


@pytest.mark.slow
def test_refine_replaces_the_set_and_keeps_the_former_one(submission, tmp_path):
    before = submission.read_bytes()
    done = ddkit("submission/colors.pt", "--steps", "3", *QUICK, "--quiet", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.output)
    assert (result["steps"], result["files"]["tensor"]) == (3, "submission/colors.pt")
    assert (tmp_path / "runs" / "colors-refine" / "before.pt").read_bytes() == before != submission.read_bytes()

    again = ddkit("submission/colors.pt", "--steps", "4", *QUICK)
    assert again.exit_code == 0, again.output
    assert "next: ddkit evaluate submission/colors.pt" in again.output
    fresh = ddkit("submission/colors.pt", "--steps", "1", *QUICK, "--seed", "3", "--fresh", "--quiet", "--json")
    assert json.loads(fresh.output)["steps"] == 1
    assert (tmp_path / "runs" / "colors-refine" / "before.pt").read_bytes() == before


def test_refine_resumes_with_the_recorded_settings(submission):
    first = ddkit("submission/colors.pt", "--steps", "1", *QUICK, "--preset", "dm", "--set", "displayable=true")
    again = ddkit("submission/colors.pt", "--steps", "2", "--quiet", "--json")
    assert (first.exit_code, again.exit_code) == (0, 0), first.output + again.output
    assert json.loads(again.stdout)["steps"] == 2
    assert "More --steps or --time" in ddkit("submission/colors.pt", "--steps", "2").stderr
    other = ddkit("submission/colors.pt", "--steps", "3", "--batch-real", "3")
    assert other.exit_code == 2 and "batch_real: 2, not 3." in " ".join(other.output.split())


def test_mtt_resumes_with_its_experts(submission, monkeypatch, tmp_path):
    words = ("submission/colors.pt", "--objective", "mtt", "--set", "dm_steps=1", "--set", "student.steps=2", *QUICK)
    small = dataclasses.replace(RefineSettings(), experts=ExpertSettings(steps=4, batch_size=4, keep_every=1, span=2))
    monkeypatch.setitem(PRESETS, "track1", small)
    first = ddkit(*words, "--set", "experts.count=1", "--steps", "2")
    again = ddkit("submission/colors.pt", "--steps", "3", "--quiet", "--json")
    assert (first.exit_code, again.exit_code) == (0, 0), first.output + again.output
    assert json.loads(again.stdout)["steps"] == 3
    recorded = recorded_settings(tmp_path / "runs" / "colors-refine")
    assert (recorded.experts, recorded.student.steps) == (dataclasses.replace(small.experts, count=1), 2)
    other = ddkit("submission/colors.pt", "--steps", "4", "--set", "experts.count=2")
    assert other.exit_code == 2 and "with other settings: experts.count: 1, not 2" in " ".join(other.output.split())


def test_refine_of_another_set_needs_another_folder(submission):
    for words in ((), ("--run", "runs/colors-refine-2")):
        done = ddkit("submission/colors.pt", "--steps", "1", *QUICK, *words)
        assert done.exit_code == 0, done.output
        generate("colors", 2, FromReal("random", seed=5), submission, replace=True)
        for options in ((), ("--fresh",)):
            refused = ddkit("submission/colors.pt", "--steps", "1", *options)
            assert refused.exit_code == 2 and "--run runs/colors-refine-2" in " ".join(refused.output.split())


def test_refine_takes_the_dataset_from_the_provenance(submission):
    (submission.parent / "first.json").write_bytes(submission.with_suffix(".json").read_bytes())
    submission.rename(submission.parent / "first.pt")
    done = ddkit("submission/first.pt", "--steps", "1", *QUICK)
    assert done.exit_code == 0, done.output


def test_presets_are_those_of_the_library_and_options_change_single_settings(submission):
    (option,) = [option for option in refine.params if option.name == "preset"]
    assert set(option.type.choices) == set(PRESETS)
    done = ddkit("submission/colors.pt", "--steps", "1", *QUICK, "--preset", "dm", "--lr", "0.001", "--quiet")
    assert done.exit_code == 0, done.output
    facts = json.loads(submission.with_suffix(".json").read_text())
    assert (facts["objective"], facts["learning_rate"], facts["batch_real"]) == ("dm", 0.001, 2)


@pytest.mark.slow
def test_refine_stopped_while_it_validates_stops_at_once(submission, tmp_path):
    settings = [*VALIDATE, "val_epochs=100000"]
    process = processes.start("-m", "ddkit", "refine", submission, "--steps", "5", *settings)
    for line in process.stderr:
        if "Validating" in line:
            break
    second = ddkit(str(submission), "--steps", "5", *settings)  # which would forget how the first one's set was
    assert second.exit_code == 2 and "Another process refines in runs/colors-refine" in " ".join(second.output.split())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 130
    state = torch.load(tmp_path / "runs" / "colors-refine" / "state.pt", weights_only=True)
    assert (state["step"], state["validations"]) == (0, [])


@pytest.mark.slow
def test_refine_stopped_while_it_validates_resumes_with_validation(submission, tmp_path):
    """The length of a validation is a setting of the run, so that this one takes just long enough to be stopped in."""
    words = [str(submission), "--steps", "2", *VALIDATE, "val_epochs=60"]
    process = processes.start("-m", "ddkit", "refine", *words)
    for line in process.stderr:
        if "Validating" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 130
    done = ddkit(*words)
    assert done.exit_code == 0, done.output
    state = torch.load(tmp_path / "runs" / "colors-refine" / "state.pt", weights_only=True)
    assert [validation["step"] for validation in state["validations"]] == [0, 2]


@pytest.mark.slow
def test_refine_stopped_between_steps_saves_and_resumes(submission, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = processes.start("-m", "ddkit", "refine", submission, "--steps", "100000", *QUICK, env=environment)
    for line in process.stderr:
        if "Refining: " in line:
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    state = torch.load(tmp_path / "runs" / "colors-refine" / "state.pt", weights_only=True)
    assert state["step"] > 0
    assert f"Interrupted after step {state['step']}." in said
    done = ddkit(str(submission), "--steps", str(state["step"] + 1), *QUICK, "--quiet", "--json")
    assert json.loads(done.output)["steps"] == state["step"] + 1


def test_refine_dry_run_says_what_it_takes_and_changes_nothing(submission, tmp_path):
    before = submission.read_bytes()
    done = ddkit("submission/colors.pt", "--steps", "1000", *QUICK, "--dry-run", "--quiet")
    assert done.exit_code == 0, done.output
    for said in ("a step of frepo, pool", "1,000 in", "GiB are free", "no comparable refinement has been recorded"):
        assert said in " ".join(done.output.split())
    assert submission.read_bytes() == before and not (tmp_path / "runs").exists()


def test_accuracy_is_expected_of_a_set_that_was_not_refined_before(submission, monkeypatch):
    settings = RefineSettings(batch_real=2, val_epochs=0)
    monkeypatch.setitem(estimate._RECORDED, ("colors", 2), (settings, ((0, 0.2), (100, 0.4))))
    first = ddkit("submission/colors.pt", "--steps", "1", *QUICK)
    again = ddkit("submission/colors.pt", "--steps", "100", *QUICK, "--dry-run", "--json")
    assert "Expected accuracy: about 20.3%" in " ".join(first.output.split())
    assert json.loads(again.stdout)["accuracy"] == 0.4  # the steps count from the original set
    timed = ddkit("submission/colors.pt", "--time", "0.001s", *QUICK)
    assert timed.exit_code == 0 and "Expected accuracy" not in timed.output, "which would need a measurement"
    other = ddkit("submission/colors.pt", "--steps", "1", *QUICK, "--run", "runs/other")
    assert other.exit_code == 0 and "Expected accuracy" not in other.output, other.output
    more = ddkit("submission/colors.pt", "--steps", "100", *QUICK, "--run", "runs/other", "--dry-run", "--json")
    assert json.loads(more.stdout)["accuracy"] is None


def test_refine_reports_networks_of_the_pool_that_diverged(submission):
    words = ("--set", "dm_steps=0", "--set", "pool.from_step=0", "--set", "pool.learning_rate=1e8")
    done = ddkit("submission/colors.pt", "--steps", "3", *QUICK, *words)
    assert done.exit_code == 0, done.output
    assert "3 networks of the pool diverged and were replaced." in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["nowhere.pt", "--dataset", "colors"], 3, "nowhere.pt does not exist"),
        (["submission"], 2, "submission is a folder"),
        (["submission/colors.pt", "--steps", "2", "--time", "1m"], 2, "--steps and --time exclude each other"),
        (["submission/colors.pt", "--dataset", "colos"], 2, "Did you mean 'colors'?"),
        (["submission/colors.pt", "--lr", "0"], 2, "--lr"),
        (["submission/colors.pt", "--set", "krr_lambda"], 2, "--set krr_lambda assigns no value"),
        (["submission/colors.pt", "--set", "ridge=1"], 2, "Unknown setting 'ridge'. Known: objective, dm_steps, krr_lambda"),
        (["submission/colors.pt", "--set", "dm_steps=many"], 2, "dm_steps must be of type int, got 'many'"),
        (["submission/colors.pt", "--preset", "dm", "--set", "krr_lambda=1"], 2, "krr_lambda has no effect on the objective"),
        (["submission/colors.pt", "--preset", "dm", "--pool", "4"], 2, "pool.size has no effect on the objective dm"),
        (["submission/colors.pt", "--set", "student.steps=3"], 2, "student.steps has no effect on the objective frepo"),
        (["submission/colors.pt", "--set", "experts.count=2"], 2, "experts.count has no effect on the objective frepo"),
        (["submission/colors.pt", "--preset", "dm", "--set", "dm_steps=1"], 2, "dm_steps has no effect on the objective dm"),
        (
            ["submission/colors.pt", "--objective", "mtt", "--set", "dm_steps=0", "--batch-real", "3"],
            2,
            "batch_real has no effect on the objective mtt",
        ),
        (["submission/colors.pt", "--pool", "100000000"], 3, "A pool of 100,000,000 networks for colors needs"),
        (["submission/colors.pt", "--out", "refined.json"], 2, "does not end in .pt"),
    ],
)
def test_refine_refuses_in_one_message(submission, words, status, said):
    done = ddkit(*words)
    assert done.exit_code == status, done.output
    assert said in " ".join(done.output.split()) and "Traceback" not in done.output
