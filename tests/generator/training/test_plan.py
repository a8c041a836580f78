"""Which training the arguments, the folder and the machine ask for."""

import dataclasses
import json
import math
import re

import pytest

from ddkit.errors import MissingModelError, UsageError
from ddkit.generator.model_folder import save_model
from ddkit.generator.presets import preset
from ddkit.generator.training.plan import SETTINGS, plan_training, require_time, train_generator
from ddkit.generator.training.run_folder import RunRecord, write_run_record
from ddkit.runtime.device import cpu_model


@pytest.fixture
def begin(data, tmp_path):
    """Records a training in a folder, as one that has begun leaves it."""

    def begin(name, config, preset_name="demo", *tracked):
        folder = tmp_path / name
        folder.mkdir()
        of = (data.name, data.sha256, data.images.class_names, data.image_size)
        write_run_record(folder, RunRecord(*of, preset_name, config, *tracked))
        return folder

    return begin


@pytest.fixture(autouse=True)
def flags(monkeypatch):
    """The names of the processor's instruction sets, none of them for bfloat16 at first."""
    flags = {"avx2", "avx512f"}
    monkeypatch.setattr("ddkit.runtime.device.cpu_flags", lambda: flags)
    return flags


@pytest.fixture
def plan(data, tmp_path):
    def plan(folder="new", *, preset=None, runs="nothing", **options):
        settings = {name: options.pop(name) for name in SETTINGS if name in options}
        return plan_training(
            data, settings, preset_name=preset, folder=tmp_path / folder, runs=tmp_path / runs, device="cpu", **options
        )

    return plan


def test_new_training_is_the_preset_with_the_given_settings(plan):
    assert plan().preset == "tiny" and plan().config == preset("tiny").config(16)
    said = plan(preset="demo", batch_size=7, learning_rate=0.5, prediction="v", architecture="dit", flips=False, seed=9)
    config = said.config
    assert said.preset == "demo" and said.start is None
    assert (config.denoiser_optimizer.batch_size, config.denoiser_optimizer.learning_rate) == (7, 0.5)
    assert (config.objective.prediction, config.denoiser.architecture, config.flips, config.seed) == ("v", "dit", False, 9)
    assert config.autoencoder_optimizer == preset("demo").config(16).autoencoder_optimizer


def test_new_training_computes_in_bfloat16_where_the_processor_has_instructions_for_it(plan, begin, flags):
    assert plan(preset="tiny").choices == ()
    begin("begun", preset("demo").config(16))
    flags.add("avx512_bf16")
    said = plan(preset="tiny")
    assert said.config == dataclasses.replace(preset("tiny").config(16), precision="bfloat16")
    assert said.choices == (f"Precision bfloat16: {cpu_model()} computes it faster than float32.",)
    asked = plan(preset="tiny", precision="float32")
    assert asked.config.precision == "float32" and asked.choices == ()
    assert plan("begun").config.precision == "float32"


def test_settings_of_the_objective_and_of_averaging_are_applied(plan):
    config = plan(preset="demo", label_dropout=0.3, prediction="v", min_snr=7.0, ema_width=0.05).config
    assert (config.objective.label_dropout, config.objective.min_snr_gamma, config.ema_width) == (0.3, 7.0, 0.05)
    assert plan(preset="demo", prediction="epsilon", min_snr=0.0).config.objective.min_snr_gamma is None
    for gamma in (0.0, 7.0):
        with pytest.raises(UsageError, match="--min-snr has no effect with the prediction flow"):
            plan(preset="demo", min_snr=gamma)
    assert plan(preset="demo", ema_decay=0.9).config.ema_decay == 0.9
    with pytest.raises(UsageError, match="contradict"):
        plan(preset="demo", ema_width=0.05, ema_decay=0.9)
    with pytest.raises(UsageError, match="min_snr_gamma must be positive, got nan"):
        plan(preset="demo", min_snr=math.nan)


def test_resumed_training_keeps_its_settings(plan, begin, config):
    begin("run", config)
    assert plan("run").config == config and plan("run").preset == "demo"
    assert plan("run", preset="demo", steps=50).config.denoiser_optimizer == dataclasses.replace(
        config.denoiser_optimizer, steps=50
    )
    assert plan("run", preset="tiny").config == preset("tiny").config(16), "to be refused where it is claimed"
    assert plan("run", fresh=True).config == preset("tiny").config(16)
    assert plan("run").track_every == preset("demo").track_every


def test_resumed_training_keeps_its_score_unless_options_change_it(plan, begin, config, tmp_path):
    folder = begin("run", config, "demo", 500, "frechet_inception")
    assert (plan("run").track_every, plan("run").features) == (500, "inception")
    said = plan("run", track_every=7, features="convnet")
    assert (said.track_every, said.features) == (7, "convnet")
    assert plan("run", track_every=0).track_every == 0
    assert (plan().track_every, plan().features) == (preset("tiny").track_every, "convnet")
    with pytest.raises(UsageError, match="--features needs --track-every"):
        plan("run", track_every=0, features="inception")
    record = json.loads((folder / "config.json").read_text())
    record["config"] = {name.replace("optimizer", "optimiser"): value for name, value in record["config"].items()}
    (folder / "config.json").write_text(json.dumps(record))
    assert plan("run").config == config, "as version 0.1.0 wrote it"


def test_training_without_a_preset_resumes(plan, begin, config):
    begin("run", config, preset_name="")
    assert plan("run").config == config and plan("run").track_every == 0


def test_time_too_short_for_a_new_training_raises_usage_error_with_a_time(plan, data):
    with pytest.raises(
        UsageError, match="of training is too short: preset tiny needs at least 100 steps of the autoencoder and"
    ):
        require_time(data, plan(seconds=0.01))
    with pytest.raises(UsageError) as caught:
        require_time(data, plan(preset="dit", seconds=0.01, autoencoder="somewhere"))
    assert "the autoencoder" not in caught.value.message and "100 steps of the denoiser" in caught.value.message
    assert re.fullmatch(r"Give --time [\d.]+[smh] or more\.", caught.value.remedy)
    require_time(data, plan(seconds=36_000.0))
    require_time(data, plan(steps=1))
    require_time(data, plan(preset="demo", seconds=0.01))  # it is there to try things out


def test_training_that_continues_may_be_of_any_length_unless_it_is_started_over(plan, begin, data):
    begin("begun", preset("tiny").config(16), "tiny")
    require_time(data, plan("begun", seconds=0.01))
    with pytest.raises(UsageError, match="too short"):
        require_time(data, plan("begun", preset="tiny", seconds=0.01, fresh=True))


def test_fine_tuning_starts_from_the_datasets_own_generator(plan, begin, config, make_model, data, tmp_path):
    letters = dataclasses.replace(config, flips=False)
    (tmp_path / "runs").mkdir()
    own = begin("runs/colors", letters)
    save_model(make_model(prediction="v"), own)
    tuned = plan(runs="runs", method="minimax", batch_size=5, epochs=3, lambda_d=0.5)
    assert tuned.preset == "minimax-paper"
    assert tuned.start.generator.prediction == tuned.config.objective.prediction == "v"
    assert tuned.config.denoiser_optimizer.steps == 3 * len(data.images) // 5
    assert not tuned.config.flips, "as its start was trained"
    minimax = tuned.config.minimax
    assert (minimax.init, minimax.lambda_r, minimax.lambda_d, minimax.epochs) == (str(own), 0.002, 0.5, 3)
    assert plan(runs="runs", method="minimax", flips=True, steps=4).config.flips

    begin("tuned", tuned.config, tuned.preset)
    again = plan("tuned", lambda_r=0.1)
    assert again.config == dataclasses.replace(tuned.config, minimax=dataclasses.replace(minimax, lambda_r=0.1))
    assert dataclasses.asdict(again.config)["denoiser_optimizer"]["steps"] == tuned.config.denoiser_optimizer.steps


def test_fine_tuning_without_a_start_raises_missing_model_error(plan, tmp_path):
    with pytest.raises(MissingModelError, match="no generator of 'colors' to start from") as caught:
        plan(method="minimax", init=None)
    assert "ddkit train --dataset colors" in caught.value.remedy
    assert "--init facebook/DiT-XL-2-256" in caught.value.remedy, "gigabytes are not downloaded unasked"
    with pytest.raises(MissingModelError, match="There is no folder .*/missing to start from"):
        plan(init=str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"preset": "tinny"}, "Unknown preset 'tinny'"),
        ({"lambda_r": 0.1}, "--lambda-r needs --method minimax"),
        ({"class_map": (("red", None),)}, "--class-map needs --method minimax"),
        ({"method": "diffusion", "init": "somewhere"}, "--method diffusion trains a new generator"),
        ({"method": "diffusion", "preset": "minimax-paper"}, "--method diffusion trains a new generator"),
        ({"method": "minimax", "autoencoder": "x"}, "--autoencoder cannot be changed when fine-tuning"),
        ({"init": "somewhere", "prediction": "v"}, "--prediction cannot be changed when fine-tuning"),
    ],
)
def test_contradicting_settings_raise_usage_error(plan, wishes, said):
    with pytest.raises(UsageError, match=said):
        plan(**wishes)


def test_diffusion_in_the_folder_of_a_fine_tuning_raises_usage_error(plan, begin, config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    minimax = preset("minimax-paper").config(16).minimax
    begin("tuned", dataclasses.replace(config, minimax=minimax))
    with pytest.raises(UsageError, match="trains a new generator"):
        plan("tuned", method="diffusion")
    assert plan("tuned", method="diffusion", fresh=True).start is None
    with pytest.raises(MissingModelError):
        plan("tuned", lambda_r=0.1, init="nowhere/at-all")


def test_unknown_method_or_features_raise_usage_error_that_offers_the_nearest(plan):
    with pytest.raises(UsageError, match="Unknown method 'minmax'. Did you mean 'minimax'"):
        plan(method="minmax")
    with pytest.raises(UsageError, match="Unknown features 'incepton'. Did you mean 'inception'"):
        plan(features="incepton", track_every=5)


def test_unknown_setting_raises_usage_error_before_the_dataset_is_opened():
    with pytest.raises(UsageError, match="no setting 'batchsize'. Did you mean 'batch_size'"):
        train_generator("cifar100", batchsize=5)
    with pytest.raises(UsageError, match="no setting 'settings'"):
        train_generator("cifar100", settings={"batch_size": 5})
