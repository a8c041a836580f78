"""The curves of a training, from its log."""

import json

import pytest

from ddkit.reporting.runs import training_runs


@pytest.fixture
def write_log(tmp_path):
    def write(*lines, name="cifar100"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (folder / "metrics.jsonl").write_text("\n".join(texts) + "\n")
        return tmp_path / "runs"

    return write


def record(stage, step, loss, **more):
    return {"stage": stage, "step": step, "loss": loss, "mse": loss, "seconds": 1.0} | more


def test_stages_with_the_same_steps_have_separate_curves(write_log):
    log = [*(record("autoencoder", s, 0.5 / s) for s in (10, 20)), *(record("denoiser", s, 2.0 / s) for s in (10, 20, 30))]
    (run,) = training_runs(write_log(*log))
    assert (run.name, run.steps) == ("cifar100", 30)
    assert [(chart.title, chart.lines[0].first) for chart in run.charts] == [
        ("Autoencoder: loss", 0.05), ("Denoiser: loss", 0.2),
    ]  # fmt: skip


def test_frechet_distances_and_minimax_criteria_are_drawn(write_log):
    folder = write_log(
        record("denoiser", 10, 1.0, representativeness=0.3, diversity=0.9),
        {"stage": "score", "step": 10, "name": "frechet", "value": 80.0},
        record("denoiser", 20, 0.9, representativeness=0.2, diversity=0.8),
        {"stage": "score", "step": 20, "name": "frechet", "value": 40.0},
    )
    (run,) = training_runs(folder)
    by_title = {chart.title: chart for chart in run.charts}
    assert set(by_title) == {"Denoiser: loss", "Minimax criteria", "Frechet distance of samples"}
    assert [line.name for line in by_title["Minimax criteria"].lines] == ["representativeness", "diversity"]
    assert by_title["Frechet distance of samples"].lines[0].best == 40.0


def test_torn_and_foreign_lines_are_skipped(write_log):
    folder = write_log(
        record("denoiser", 10, 1.0), "not json", '["a list"]', '{"step": "ten", "loss": 1}', '{"step": 20, "stage": "de'
    )
    (run,) = training_runs(folder)
    assert run.steps == 10


def test_repeated_steps_of_a_resumed_training_count_once_with_the_later_record(write_log):
    (run,) = training_runs(write_log(*(record("denoiser", step, loss) for step, loss in ((10, 3.0), (20, 9.0), (20, 2.0)))))
    assert run.charts[0].lines[0].last == 2.0


def test_folders_without_a_log_are_not_runs(tmp_path, write_log):
    assert training_runs(tmp_path / "missing") == ()
    folder = write_log("")
    (folder / "evaluations").mkdir()
    assert training_runs(folder) == ()
