"""`ddkit train` as a person runs it: going on, being stopped, and what it refuses."""

import json
import os
import signal
import time

import processes
import pytest
import torch
from click.testing import CliRunner

from ddkit.cli import main


@pytest.fixture
def ddkit(tmp_path, monkeypatch):
    """Runs ddkit in this process, in a folder of the test's own; `.output` is what it printed."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda *words: CliRunner().invoke(main, words)
    torch.set_num_threads(threads)


def steps_done(folder):
    return json.loads((folder / "ddkit.json").read_text())["steps"]


@pytest.mark.slow
def test_train_resumes_and_refuses_other_settings(ddkit, colors, tmp_path):
    words = ["train", "--dataset", colors, "--preset", "demo", "--batch-size", "8", "--quiet"]
    first = ddkit(*words, "--time", "0.5s", "--json")
    assert first.exit_code == 0, first.output
    folder = tmp_path / "runs" / "colors"
    assert json.loads(first.output) == {
        "folder": "runs/colors",
        "steps": steps_done(folder),
        "images_seen": 8 * steps_done(folder),
        "metrics": {},
    }
    # There is a chart once a network has two losses, for which half a second may be too short.
    assert {path.name for path in folder.iterdir()} - {"training.png"} == {
        ".lock", "checkpoints", "config.json", "ddkit.json", "metrics.jsonl", "model_index.json", "scheduler", "transformer",
        "vae",
    }  # fmt: skip

    before = steps_done(folder)
    longer = ddkit("train", "--dataset", colors, "--batch-size", "8", "--time", "1s", "--resume")
    assert longer.exit_code == 0 and "Continuing to train" in longer.output, longer.output
    assert "ddkit generate --ipc 10 --dataset colors" in longer.output
    assert steps_done(folder) > before

    other = ddkit(*words, "--time", "1s", "--ema-decay", "0.5", "--seed", "3")
    assert other.exit_code == 2
    assert "ema_decay: None, not 0.5" in other.output and "seed: 0, not 3" in other.output

    slower = ddkit(*words, "--time", "1.1s", "--lr", "1e-5")
    again = ddkit("train", "--dataset", colors, "--time", "1.2s")  # batch size and rate need not be said again
    assert (slower.exit_code, again.exit_code) == (0, 0), slower.output + again.output
    optimizer = json.loads((folder / "config.json").read_text())["config"]["denoiser_optimizer"]
    assert (optimizer["learning_rate"], optimizer["batch_size"]) == (1e-5, 8)

    other = ddkit("train", "--dataset", colors, "--preset", "tiny")
    assert other.exit_code == 2 and "other settings: preset: demo, not tiny; " in " ".join(other.output.split())

    fresh = ddkit(*words, "--time", "0.3s", "--seed", "3", "--fresh")
    assert fresh.exit_code == 0, fresh.output
    assert json.loads((folder / "config.json").read_text())["config"]["seed"] == 3


@pytest.mark.slow
def test_training_stopped_and_then_killed_resumes_each_time(ddkit, colors, tmp_path):
    words = ["train", "--dataset", colors, "--preset", "demo", "--batch-size", "8", "--save-every", "0.5s"]
    folder = tmp_path / "runs" / "colors"

    def saved():
        return max((int(path.stem.split("-")[1]) for path in folder.glob("checkpoints/denoiser-*.pt")), default=0)

    def records():
        return (folder / "metrics.jsonl").read_text().splitlines()

    begun = ddkit(*words, "--time", "0.3s")  # which ends the autoencoder's training
    assert begun.exit_code == 0, begun.output
    for number in (signal.SIGTERM, signal.SIGKILL):
        before = saved()
        # Small tensors: threads would only wait for each other.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = processes.start("-m", "ddkit", *words, "--time", "10h", env=environment)
        deadline = time.monotonic() + 600
        while saved() <= before and time.monotonic() < deadline:
            time.sleep(0.05)
        if number == signal.SIGTERM:
            second = ddkit(*words, "--time", "1s")
            assert second.exit_code == 2 and "Another process trains in runs/colors" in " ".join(second.output.split())
        process.send_signal(number)
        _, errors = process.communicate(timeout=300)
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == 130 and "the state is saved" in errors
        assert saved() > before

    done, last = records(), saved()
    spent = sum({record["stage"]: record["seconds"] for record in map(json.loads, done)}.values())
    again = ddkit(*words, "--time", f"{spent + 0.5:.1f}s")
    assert again.exit_code == 0, again.output
    steps = [(record["stage"], record["step"]) for record in map(json.loads, records())]
    for part in (steps[: len(done)], steps[len(done) :]):  # a kill costs the steps since the last checkpoint
        denoiser = [step for stage, step in part if stage == "denoiser"]
        assert denoiser == sorted(set(denoiser)), "no step was repeated after a request to stop"
    assert steps[len(done)][0] == "denoiser" and steps[len(done)][1] > last
    assert steps_done(folder) > last


def test_missing_inception_weights_fail_before_any_work(ddkit, colors, tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody answers
    (tmp_path / "runs").mkdir()
    done = ddkit("train", "--dataset", colors, "--preset", "demo", "--track-every", "5", "--features", "inception")
    assert done.exit_code == 3, done.output
    assert "weights of Inception" in " ".join(done.output.split())
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--dataset", "colours"], 2, "Did you mean 'colors'?"),
        (["--dataset", "cifar100", "--preset", "tinny"], 2, "'tinny' is not one of"),
        (["--dataset", "colors", "--resume"], 3, "no training in runs/colors"),
        (["--dataset", "colors", "--resume", "--fresh"], 2, "contradict"),
        (["--dataset", "colors", "--steps", "9", "--time", "9s"], 2, "contradict"),
        (["--dataset", "colors", "--time", "20"], 2, "'20' is not a length of time with a unit"),
        (["--dataset", "colors", "--time", "0.01s"], 2, "of training is too short: preset tiny needs at least 100 steps"),
        (["--dataset", "colors", "--batch-size", "0"], 2, "0 is not in the range"),
        (["--dataset", "colors", "--device", "cuda:99"], 3, "--device cpu"),
        pytest.param(["--dataset", "colors", "--batch-size", "100000"], 3, "would fit", marks=pytest.mark.slow),
        (["--dataset", "colors", "--autoencoder", "nowhere", "--preset", "demo"], 3, "nowhere"),
        (["--dataset", "colors", "--preset", "demo", "--features", "inception"], 2, "--features needs --track-every"),
    ],
)
def test_invalid_options_end_with_one_message(ddkit, colors, monkeypatch, words, status, said):
    monkeypatch.setattr("ddkit.generator.training.estimate.free_memory", lambda device: 2**30)
    done = ddkit("train", *words)
    assert done.exit_code == status, done.output
    assert said in " ".join(done.output.split()) and "Traceback" not in done.output


@pytest.mark.slow
def test_dry_run_on_a_gpu_says_what_was_chosen_and_why(gpu, ddkit, colors, short_measurements, tmp_path):
    gpu.memory = [(200 * 2**20, 4 * 2**30)]
    done = ddkit("train", "--dataset", colors, "--out", str(tmp_path / "run"), "--batch-size", "8", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    said = " ".join(done.stderr.split())
    assert "Preset tiny: NVIDIA Pretended has 0.2 GiB of free memory, and it needs about" in said
    assert "Precision bfloat16: NVIDIA Pretended computes it faster than float32." in said
    found = json.loads(done.stdout)
    assert len(found["choices"]) == 2 and found["config"]["precision"] == "bfloat16" and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_dry_run_shows_the_costs_and_leaves_nothing(ddkit, colors, short_measurements, tmp_path):
    words = ["train", "--dataset", colors, "--preset", "demo", "--batch-size", "8", "--dry-run"]
    done = ddkit(*words, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    costs = json.loads(done.output)
    assert [stage["stage"] for stage in costs["stages"]] == ["autoencoder", "denoiser"]
    assert all(stage["images_per_second"] > 0 for stage in costs["stages"])
    assert costs["config"]["denoiser_optimizer"]["batch_size"] == 8
    assert costs["steps"] == [400, 1500] and costs["fits"]
    shorter = json.loads(ddkit(*words, "--time", "20s", "--json", "--quiet").output)
    assert 1 <= shorter["steps"][0] <= 400 and shorter["steps"] != costs["steps"]
    assert not (tmp_path / "runs").exists()
