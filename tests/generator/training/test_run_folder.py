"""The folder of a training: which one it holds, and that nothing else is lost there."""

import dataclasses
import shutil

import pytest

from ddkit.errors import UsageError
from ddkit.generator.config import MinimaxConfig
from ddkit.generator.training.run_folder import start_over
from ddkit.generator.training.train import TrainingRequest, train


def test_other_settings_raise_usage_error_that_lists_them(data, config, tmp_path):
    train(data, TrainingRequest(config, tmp_path))
    other = dataclasses.replace(config, seed=3, ema_width=0.2)
    with pytest.raises(UsageError, match="ema_width: 0.1, not 0.2; seed: 0, not 3") as caught:
        train(data, TrainingRequest(other, tmp_path))
    assert "--fresh" in caught.value.remedy


def test_another_preset_raises_usage_error_that_lists_the_differences(data, config, tmp_path):
    train(data, TrainingRequest(config, tmp_path, preset="demo"))
    with pytest.raises(UsageError, match="preset: demo, not tiny; seed: 0, not 3"):
        train(data, TrainingRequest(dataclasses.replace(config, seed=3), tmp_path, preset="tiny"))


def test_another_method_raises_usage_error_that_names_both(data, config, tmp_path):
    train(data, TrainingRequest(config, tmp_path / "own"))
    train(data, TrainingRequest(config, tmp_path / "other"))
    tuned = dataclasses.replace(config, minimax=MinimaxConfig(str(tmp_path / "own")))
    with pytest.raises(UsageError, match="with other settings: method: diffusion, not minimax"):
        train(data, TrainingRequest(tuned, tmp_path / "other"))


def test_another_dataset_or_other_classes_raise_usage_error(data, config, tmp_path):
    train(data, TrainingRequest(config, tmp_path))
    with pytest.raises(UsageError, match="dataset: colors, not shapes"):
        train(dataclasses.replace(data, name="shapes"), TrainingRequest(config, tmp_path))
    renamed = dataclasses.replace(data.images, class_names=("red", "green", "violet"))
    with pytest.raises(UsageError, match="other classes"):
        train(dataclasses.replace(data, images=renamed), TrainingRequest(config, tmp_path))


def test_images_of_another_size_raise_usage_error(data, config, tmp_path):
    train(data, TrainingRequest(config, tmp_path))
    smaller = dataclasses.replace(data.images, images=data.images.images[..., ::2, ::2].contiguous())
    with pytest.raises(UsageError, match="image_size: 16, not 8"):
        train(dataclasses.replace(data, images=smaller), TrainingRequest(config, tmp_path))


def test_model_that_was_not_trained_there_is_not_overwritten(data, config, tmp_path):
    train(data, TrainingRequest(config, tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "got", ignore=shutil.ignore_patterns("config.json", "checkpoints"))
    before = (tmp_path / "got" / "ddkit.json").read_bytes()
    with pytest.raises(UsageError, match="not trained there"):
        train(data, TrainingRequest(config, tmp_path / "got"))
    with pytest.raises(UsageError, match="does not hold a training"):
        train(data, TrainingRequest(config, tmp_path / "got", fresh=True))
    assert (tmp_path / "got" / "ddkit.json").read_bytes() == before


def test_start_over_leaves_other_files(data, config, tmp_path):
    train(data, TrainingRequest(config, tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tensorboard").mkdir()
    start_over(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", ".lock"}
    with pytest.raises(UsageError, match="does not hold a training"):
        start_over(tmp_path)
