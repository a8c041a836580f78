"""`ddkit train --method minimax` as a person runs it: from what it can start, going on, and what it refuses."""

import json
import os

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner

from ddkit.cli import main

QUICK = ("--batch-size", "4", "--steps", "6", "--no-compile")


@pytest.fixture
def ddkit(tmp_path, monkeypatch, colors):
    """Runs ddkit in this process, in a folder of the test's own; `.output` is what it printed, on one line."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda *words: CliRunner().invoke(main, [str(word) for word in words])
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dit_folder(save_dit, tmp_path_factory):
    """A DiTPipeline that knows "red" by name, and not "blue"."""
    return save_dit(tmp_path_factory.mktemp("dit") / "tiny", ["tench", "green", "red, crimson"])


def said(done):
    return " ".join(done.output.split())


def tune(ddkit, *words):
    """A fine-tuning that is to succeed; what it said."""
    done = ddkit("train", "--method", "minimax", "--dataset", "colors", *QUICK, *words)
    assert done.exit_code == 0, done.output
    return said(done)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def settings(folder):
    return json.loads((folder / "config.json").read_text())["config"]


def steps_done(folder):
    return json.loads((folder / "ddkit.json").read_text())["steps"]


@pytest.mark.parametrize("architecture", ["uvit", "dit"])
@pytest.mark.slow
def test_minimax_fine_tunes_the_datasets_own_generator(ddkit, tmp_path, architecture):
    scratch = ("--preset", "demo", "--architecture", architecture, "--time", "1s", "--batch-size", "4")
    assert ddkit("train", "--dataset", "colors", *scratch).exit_code == 0
    told = tune(ddkit)
    assert "Starting from runs/colors" in told and "2 of 2 classes are known by name" in told
    assert "next: ddkit generate --ipc 10 --dataset colors --model runs/colors-minimax" in told
    folder = tmp_path / "runs" / "colors-minimax"
    assert settings(folder)["flips"] is False  # as the generator was trained
    last = records(folder)[-1]
    assert last["stage"] == "minimax" and last["step"] == steps_done(folder) == 6
    assert last["loss"] == pytest.approx(last["mse"] + 0.002 * last["representativeness"] + 0.008 * last["diversity"], rel=1e-5)
    made = ddkit("generate", "--ipc", "2", "--dataset", "colors", "--model", folder, "--sampling-steps", "2")
    assert made.exit_code == 0, made.output
    assert torch.load(tmp_path / "submission" / "colors.pt", weights_only=True).shape == (4, 3, 16, 16)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.slow
def test_minimax_fine_tunes_a_pretrained_transformer(ddkit, tmp_path, dit_folder, full):
    told = tune(ddkit, "--init", dit_folder, *(["--full"] if full else []))
    assert ("(100 %)" in told) is full
    assert "1 of 2 classes are known by name; the mean of all labels stands for blue." in told
    folder = tmp_path / "runs" / "colors-minimax"
    parts = {path.name for path in folder.iterdir()}
    assert parts >= {"model_index.json", "ddkit.json", "vae", "transformer", "scheduler"}
    weights = set(torch_keys(folder))
    assert weights == set(torch_keys(dit_folder))
    made = ddkit("generate", "--ipc", "1", "--dataset", "colors", "--model", folder, "--sampling-steps", "2")
    assert made.exit_code == 0, made.output


def torch_keys(folder):
    from safetensors import safe_open

    with safe_open(folder / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.slow
def test_minimax_resumes_without_repeating_its_settings(ddkit, tmp_path, dit_folder):
    folder = tmp_path / "tuned"
    (tmp_path / "map.json").write_text(json.dumps({"blue": "tench", "red": None}))
    own = ("--lambda-r", "0.5", "--lambda-d", "0", "--memory-size", "3", "--full", "--class-map", "map.json")
    told = tune(ddkit, "--init", dit_folder, "--out", folder, *own)
    assert "the mean of all labels stands for red" in told
    (tmp_path / "map.json").unlink()
    relative = os.path.relpath(dit_folder, tmp_path)  # the same start by another name
    for words in (["--method", "minimax", "--steps", "8", "--resume"], ["--steps", "10", "--init", f"{relative}/"]):
        again = ddkit("train", "--dataset", "colors", "--out", folder, "--batch-size", "4", "--no-compile", *words)
        assert again.exit_code == 0 and "Continuing to train" in again.output, again.output
    assert steps_done(folder) == 10
    minimax = settings(folder)["minimax"]
    assert (minimax["lambda_r"], minimax["lambda_d"], minimax["memory_size"], minimax["full"]) == (0.5, 0.0, 3, True)
    assert minimax["class_map"] == [["blue", "tench"], ["red", None]]
    losses = [(record["loss"], record["mse"] + 0.5 * record["representativeness"]) for record in records(folder)]
    assert losses and all(loss == pytest.approx(expected, rel=1e-5) for loss, expected in losses)

    other = ddkit("train", "--dataset", "colors", "--out", folder, *QUICK, "--memory-size", "5")
    assert other.exit_code == 2 and "minimax.memory_size: 3, not 5" in said(other)
    tamer = ddkit("train", "--dataset", "colors", "--out", folder, "--lambda-r", "0.1", "--lr", "1e-4")
    assert tamer.exit_code == 0 and settings(folder)["minimax"]["lambda_r"] == 0.1
    assert settings(folder)["denoiser_optimizer"]["learning_rate"] == 1e-4 and steps_done(folder) == 10
    scratch = ddkit("train", "--dataset", "colors", "--out", folder, "--method", "diffusion")
    assert scratch.exit_code == 2 and "folder without a fine-tuning" in said(scratch)


@pytest.mark.slow
def test_epochs_replace_steps(ddkit, tmp_path, dit_folder):
    words = ("--init", dit_folder, "--batch-size", "5", "--epochs", "3")
    done = ddkit("train", "--dataset", "colors", *words)
    assert done.exit_code == 0, done.output
    assert steps_done(tmp_path / "runs" / "colors-minimax") == 6, "10 images, 3 times, 5 a step"


@pytest.mark.slow
def test_dry_run_leaves_nothing(ddkit, tmp_path, dit_folder):
    done = ddkit("train", "--dataset", "colors", "--init", dit_folder, *QUICK, "--dry-run", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    (stage,) = told["stages"]
    assert stage["stage"] == "minimax" and stage["steps"] == 6
    start = told["start"]
    assert start["source"] == str(dit_folder) and start["unmatched_classes"] == ["blue"]
    assert 0 < start["trainable_parameters"] < start["parameters"] == stage["parameters"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_diverging_loss_exits_with_status_3(ddkit, tmp_path, dit_folder):
    folder = tmp_path / "runs" / "colors-minimax"
    wild = ("--init", dit_folder, "--full", "--lambda-d", "1e20", "--lr", "1")
    done = ddkit("train", "--dataset", "colors", "--batch-size", "4", "--steps", "2000", "--no-compile", *wild)
    assert done.exit_code == 3, done.output
    assert "loss of minimax training is" in said(done) and "--lambda-d" in said(done)
    assert not (folder / "ddkit.json").exists(), "a broken model is not kept"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--method", "minimax", "--init", "no/where/at/all"], 3, "no folder no/where/at/all"),
        (["--init", "pictures"], 3, "neither ddkit.json nor model_index.json"),
        (["--init", "stable"], 3, "StableDiffusionPipeline, not a DiTPipeline"),
        (["--init", "strangers"], 2, "knows none of the classes blue, red ... by name"),
        (["--init", "strangers", "--class-map", "list.json"], 3, "not a map of classes"),
        (["--init", "strangers", "--class-map", "wrong.json"], 2, "no class 'bleu' to map. Did you mean 'blue'?"),
        (["--init", "strangers", "--prediction", "v"], 2, "--prediction cannot be changed when fine-tuning"),
        (["--init", "strangers", "--method", "diffusion"], 2, "--method diffusion trains a new generator"),
        (["--lambda-r", "1"], 2, "--lambda-r needs --method minimax"),
        (["--init", "strangers", "--epochs", "2", "--steps", "9"], 2, "Give one of them"),
        (["--init", "mine", "--out", "mine", "--fresh"], 2, "mine holds the generator that fine-tuning starts from"),
        (["--method", "minimax", "--lambda-d", "-1"], 2, "-1"),
        (["--init", "strangers", "--class-map", "map.json", "--lambda-d", "nan"], 2, "lambda_d must be a finite number"),
        (["--init", "strangers", "--class-map", "map.json", "--lambda-r", "inf"], 2, "lambda_r must be a finite number"),
        (["--init", "strangers", "--class-map", "flag.json"], 3, "flag.json is not a map of classes"),
        (["--method", "minimax", "--init", "strangers", "--out", "foreign"], 3, "not written by a training of ddkit"),
    ],
)
def test_invalid_options_end_with_one_message(ddkit, save_dit, tmp_path, words, status, message):
    save_dit(tmp_path / "strangers", ["tench", "goldfish"])
    save_dit(tmp_path / "mine", ["blue", "red"])
    for folder, content in {"stable": {"_class_name": "StableDiffusionPipeline"}, "foreign": {}}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / {"stable": "model_index.json"}.get(folder, "config.json")).write_text(json.dumps(content))
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "wrong.json").write_text('{"bleu": "tench"}')
    (tmp_path / "map.json").write_text('{"blue": "tench"}')
    (tmp_path / "flag.json").write_text('{"blue": true}')
    done = ddkit("train", "--dataset", "colors", *words)
    assert done.exit_code == status, done.output
    assert message in said(done) and "Traceback" not in done.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_hub_id_without_a_network_exits_with_status_3(ddkit, colors, tmp_path, monkeypatch):
    """The hub is a port where nobody listens."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    done = ddkit("train", "--init", "facebook/DiT-XL-2-256", "--dataset", colors)
    told = said(done)
    assert done.exit_code == 3 and "Traceback" not in told
    assert "'facebook/DiT-XL-2-256' is not a folder here, and it cannot be downloaded" in told
    assert "hf download facebook/DiT-XL-2-256 --local-dir FOLDER" in told
