"""Fine-tuning by the minimax criteria: from any generator, resumable, the same in several processes, to a plain model."""

import dataclasses
import json
import shutil
import textwrap

import processes
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ddkit.errors import ComputeError, UsageError
from ddkit.generator.config import GeneratorConfig, MinimaxConfig
from ddkit.generator.model_folder import load_model, save_model
from ddkit.generator.presets import preset
from ddkit.generator.sampling import Sampler, SamplingSettings, class_ordered
from ddkit.generator.training.checkpoints import list_checkpoints, load_latest
from ddkit.generator.training.train import TrainingData, TrainingRequest, train
from ddkit.runtime.records import read_record


@pytest.fixture
def tuning(config):
    """Settings for a few steps from `init`."""

    def make(init, *, steps=6, prediction="flow", learning_rate=1e-3, **minimax):
        optimizer = dataclasses.replace(config.denoiser_optimizer, steps=steps, learning_rate=learning_rate, batch_size=6)
        return dataclasses.replace(
            config,
            denoiser_optimizer=optimizer,
            objective=dataclasses.replace(config.objective, prediction=prediction),
            minimax=MinimaxConfig(str(init), memory_size=3, **minimax),
        )

    return make


@pytest.fixture
def own(make_model, tmp_path):
    """A generator of ddkit's."""
    save_model(make_model("uvit", "flow"), tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def pretrained(save_dit, tmp_path):
    """A DiTPipeline that knows red and green by name, not blue."""
    return save_dit(tmp_path / "pretrained", ["tench", "green", "red, crimson"])


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder):
    """Everything of the newest checkpoint that steps decide."""
    checkpoint = load_latest(folder / "checkpoints", "minimax")
    averaged = {f"ema.{i}": value for i, value in enumerate(checkpoint.ema["shadow_params"])}
    return {**checkpoint.network, **averaged, **checkpoint.memory, "step": torch.tensor(checkpoint.step)}


def same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, msg=name, **(tolerance or {"atol": 0, "rtol": 0}))


def sampled(model, precision="float32"):
    settings = SamplingSettings(steps=2, batch_size=4, precision=precision)
    return torch.cat([*Sampler(model, settings).images(*class_ordered(2, 3))])


@pytest.mark.parametrize("full", [False, True])
def test_fine_tuning_a_pretrained_transformer_gives_a_plain_model(data, tuning, pretrained, tmp_path, full):
    config = tuning(pretrained, prediction="epsilon", full=full)
    model = train(data, TrainingRequest(config, tmp_path / "run", "minimax-paper"))
    assert model.facts.class_names == ("red", "green", "blue") and model.facts.steps == 6
    assert model.denoiser.config.num_embeds_ada_norm == 3 and model.denoiser.config.out_channels == 4
    assert model.autoencoder.config.scaling_factor == pytest.approx(0.18215)
    before = load_file(pretrained / "transformer" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "run" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert after.keys() == before.keys()
    kept = "transformer_blocks.1.attn1.to_q.weight"  # of the second half, so without factors
    assert torch.equal(before[kept], after[kept]) is not full
    assert not torch.equal(before["transformer_blocks.0.attn1.to_q.bias"], after["transformer_blocks.0.attn1.to_q.bias"])
    assert sampled(model).shape == (6, 3, 16, 16)


@pytest.mark.slow
def test_images_of_another_size_are_resized_for_training_and_sampled_at_their_own(images, tuning, pretrained, tmp_path):
    """Images of 40 px, latents of 8 x 8 as the model's own 16 px have them, pictures of 40 px."""
    pixels = images.images.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)[..., :40, :40]
    large = TrainingData("colors", dataclasses.replace(images, images=pixels), "of-larger-pixels")
    model = train(large, TrainingRequest(tuning(pretrained, prediction="epsilon", steps=1), tmp_path / "run"))
    with safe_open(tmp_path / "run" / "checkpoints" / "latents.safetensors", "pt") as file:
        assert file.get_slice("latents").get_shape() == [12, 2, 4, 8, 8]
    assert {sampled(model, precision).shape for precision in ("float32", "bfloat16")} == {(6, 3, 40, 40)}


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "said"), [(0.9999, "still 100 % those of the beginning"), (0.5, "")])
def test_averaged_weights_that_keep_to_the_beginning_are_named(data, tuning, own, tmp_path, caplog, decay, said):
    train(data, TrainingRequest(dataclasses.replace(tuning(own, steps=2), ema_decay=decay), tmp_path / "run"))
    assert said in caplog.text and ("averaged weights" in caplog.text) == bool(said)


@pytest.mark.slow
def test_fine_tuning_our_generator_resumes_bit_for_bit(data, tuning, own, tmp_path):
    train(data, TrainingRequest(tuning(own, steps=6), tmp_path / "straight"))
    train(data, TrainingRequest(tuning(own, steps=2), tmp_path / "resumed"))
    train(data, TrainingRequest(tuning(own, steps=6), tmp_path / "resumed"))
    same(state(tmp_path / "straight"), state(tmp_path / "resumed"))
    straight, resumed = (load_model(tmp_path / name) for name in ("straight", "resumed"))
    assert torch.equal(sampled(straight), sampled(resumed))
    assert straight.autoencoder.config.scaling_factor == pytest.approx(0.7), "the scale it has learned with"
    assert state(tmp_path / "straight")["seen"].sum() == 36


def test_records_hold_the_terms_of_the_loss(data, tuning, own, tmp_path):
    train(data, TrainingRequest(tuning(own, steps=20, lambda_r=0.5, lambda_d=0.25), tmp_path))
    kept = records(tmp_path)
    assert kept
    for record in kept:
        expected = record["mse"] + 0.5 * record["representativeness"] + 0.25 * record["diversity"]
        assert record["stage"] == "minimax" and record["loss"] == pytest.approx(expected, rel=1e-5)
        assert record["representativeness"] > 0


@pytest.mark.slow
def test_large_weights_improve_their_criterion(data, tuning, own, tmp_path):
    """Predictions come to lie nearer to all real latents, or further from each other, than without the criteria."""
    last = {}
    for name, weights in {"none": (0, 0), "real": (3, 0), "varied": (0, 3)}.items():
        config = tuning(own, steps=60, learning_rate=3e-3, full=True, lambda_r=weights[0], lambda_d=weights[1])
        train(data, TrainingRequest(config, tmp_path / name))
        last[name] = records(tmp_path / name)[-1]
    assert last["real"]["representativeness"] < last["none"]["representativeness"]
    assert last["varied"]["diversity"] < last["none"]["diversity"]


def test_diverging_loss_leaves_the_last_good_state(data, tuning, own, tmp_path):
    train(data, TrainingRequest(tuning(own, steps=2, full=True), tmp_path))
    good, model = list_checkpoints(tmp_path / "checkpoints", "minimax"), sampled(load_model(tmp_path))
    wild = tuning(own, steps=400, learning_rate=1.0, lambda_d=1e9, full=True)
    begun = json.loads((tmp_path / "config.json").read_text())
    begun["config"] = dataclasses.asdict(wild)
    (tmp_path / "config.json").write_text(json.dumps(begun))
    with pytest.raises(ComputeError, match="loss of minimax training is (too large|NaN or infinite)") as caught:
        train(data, TrainingRequest(wild, tmp_path))
    assert "--lambda-d" in caught.value.remedy and str(good[-1]) in caught.value.remedy
    assert list_checkpoints(tmp_path / "checkpoints", "minimax") == good
    assert torch.equal(sampled(load_model(tmp_path)), model)


def test_overflowing_gradients_raise_compute_error(data, tuning, own, tmp_path):
    """The loss itself stays a number, and clipped to nothing such gradients would train nothing, unnoticed."""
    with pytest.raises(ComputeError, match="gradient of minimax training is NaN or infinite") as caught:
        train(data, TrainingRequest(tuning(own, steps=20, lambda_d=1e25), tmp_path))
    assert "--lambda-d" in caught.value.remedy
    assert not (tmp_path / "ddkit.json").exists()


def test_progress_shows_the_terms_of_the_loss(data, tuning, own, tmp_path):
    reports = []
    train(data, TrainingRequest(tuning(own, steps=4), tmp_path), progress=reports.append)
    shown = [report.figures for report in reports if "mse" in report.figures]
    assert shown and all({"loss", "representativeness", "diversity"} <= figures.keys() for figures in shown)


@pytest.mark.slow
def test_two_processes_train_like_one(data, tuning, own, tmp_path):
    config = tuning(own, steps=4, lambda_r=0.5, lambda_d=0.5)
    train(data, TrainingRequest(config, tmp_path / "one"))
    torch.save(dict(vars(data.images)), tmp_path / "images.pt")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
            import json, torch
            from pathlib import Path
            from ddkit.data.store import ImageSet
            from ddkit.generator.config import GeneratorConfig
            from ddkit.generator.training.train import TrainingData, TrainingRequest, train
            from ddkit.runtime.records import read_record
            here = Path({str(tmp_path)!r})
            images = ImageSet(**torch.load(here / "images.pt", weights_only=True))
            config = read_record(GeneratorConfig, json.loads((here / "config.json").read_text()))
            train(TrainingData("colors", images, "of-these-pixels"), TrainingRequest(config, here / "two"))
        """)
    )
    both = processes.run_together(script)
    assert [process.returncode for process in both] == [0, 0], both
    same(state(tmp_path / "one"), state(tmp_path / "two"), atol=1e-4, rtol=1e-4)


class TestInvalidRequests:
    def test_resuming_from_another_start_raises_usage_error(self, data, tuning, own, tmp_path):
        train(data, TrainingRequest(tuning(own, steps=1), tmp_path / "run"))
        shutil.copytree(own, tmp_path / "other")
        with pytest.raises(UsageError, match=r"minimax.init: .*own, not .*other"):
            train(data, TrainingRequest(tuning(tmp_path / "other", steps=2), tmp_path / "run"))

    def test_training_in_the_folder_of_the_start_raises_usage_error(self, data, tuning, own, tmp_path):
        with pytest.raises(UsageError, match="holds the generator that fine-tuning starts from"):
            train(data, TrainingRequest(tuning(own), own, fresh=True))

    def test_another_prediction_raises_usage_error(self, data, tuning, own, tmp_path):
        with pytest.raises(UsageError, match="predicts 'flow', not 'v'"):
            train(data, TrainingRequest(tuning(own, prediction="v"), tmp_path / "run"))

    @pytest.mark.parametrize("wrong", [{"init": ""}, {"lambda_r": -1}, {"lambda_d": -1}, {"memory_size": 0}, {"epochs": 0}])
    def test_invalid_minimax_settings_raise_usage_error(self, wrong):
        with pytest.raises(UsageError):
            MinimaxConfig(**{"init": "somewhere", **wrong})


def test_minimax_preset_has_the_published_settings():
    config = preset("minimax-paper").config(64)
    minimax, optimizer = config.minimax, config.denoiser_optimizer
    assert (minimax.lambda_r, minimax.lambda_d, minimax.memory_size, minimax.epochs) == (0.002, 0.008, 64, 8)
    assert (optimizer.batch_size, optimizer.learning_rate, optimizer.weight_decay) == (8, 1e-3, 0)
    assert optimizer.rate(0) == optimizer.rate(100_000) == 1e-3
    assert config.ema_decay == 0.9999 and not minimax.full and minimax.init == "facebook/DiT-XL-2-256"
    assert read_record(GeneratorConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config
