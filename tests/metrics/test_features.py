from __future__ import annotations

import dataclasses
import shutil
import signal

import processes
import pytest
import torch

from ddkit.challenge import DatasetSpec
from ddkit.data.store import ImageSet
from ddkit.errors import UsageError
from ddkit.metrics.features import ConvNetFeatures, FeatureSettings, _training_images, convnet_features, is_cached
from ddkit.metrics.frechet import frechet_distance
from ddkit.runtime.files import cache_folder

SPEC = DatasetSpec("stripes", 2, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
QUICK = FeatureSettings(images=120, epochs=3)


def stripes(count: int, seed: int, side: int = 16) -> ImageSet:
    """Two classes that a network learns at once: horizontal and vertical stripes under noise."""
    generator = torch.Generator().manual_seed(seed)
    pattern = ((torch.arange(side) // 2) % 2 * 120 + 60).expand(side, side)
    noise = torch.randint(-40, 40, (count, 3, side, side), generator=generator)
    labels = torch.arange(count) % 2
    images = torch.where(labels.view(-1, 1, 1, 1) == 1, pattern.T, pattern) + noise
    return ImageSet(images.clamp(0, 255).to(torch.uint8), labels, ("rows", "columns"))


@pytest.fixture(scope="module")
def trained(shared_folder) -> ConvNetFeatures:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDKIT_CACHE", str(shared_folder))
        return convnet_features(stripes(200, 0), SPEC, QUICK)


@pytest.mark.slow
def test_features_tell_the_classes_apart(trained):
    held_out = stripes(60, 1)
    features = trained(held_out.images)
    assert features.shape == (60, ConvNetFeatures.num_features) and features.dtype == torch.float32
    rows, columns = features[held_out.labels == 0], features[held_out.labels == 1]
    assert frechet_distance(rows, columns) > 5 * frechet_distance(rows[::2], rows[1::2])


@pytest.mark.slow
def test_float_images_have_the_features_of_their_bytes(trained):
    images = stripes(4, 2).images
    torch.testing.assert_close(trained(images), trained(images.float() / 255))
    assert trained(images[:0]).shape == (0, ConvNetFeatures.num_features)


@pytest.mark.slow
def test_the_network_is_trained_once_and_found_again():
    dataset, reports = stripes(200, 0), []
    assert not is_cached(dataset, SPEC, QUICK)
    first = convnet_features(dataset, SPEC, QUICK, progress=reports.append)
    assert is_cached(dataset, SPEC, QUICK)
    assert [(report.done, report.total) for report in reports] == [(0, 360), (120, 360), (240, 360), (360, 360)]
    assert all("loss" in report.figures for report in reports[1:])
    again = convnet_features(dataset, SPEC, QUICK, progress=lambda report: pytest.fail("trained again"))
    torch.testing.assert_close(first(dataset.images[:8]), again(dataset.images[:8]))


# Train the network, saving its state after each epoch; the process dies when it has seen 240 images.
TRAIN_UNTIL_KILLED = f"""
import os, signal, sys, torch
from ddkit.challenge import DatasetSpec
from ddkit.data.store import ImageSet
from ddkit.metrics import features
def kill(report):
    if report.done >= 240:
        os.kill(os.getpid(), signal.SIGKILL)
features._SECONDS_BETWEEN_SAVES = 0
dataset, settings = torch.load(sys.argv[1], weights_only=True)
settings = features.FeatureSettings(**settings)
features.convnet_features(ImageSet(**dataset), {SPEC!r}, settings, progress=kill)
"""


@pytest.mark.slow
def test_killed_training_continues_and_ends_with_the_network_of_an_unbroken_one(tmp_path, own_cache, monkeypatch):
    dataset, settings, reports = stripes(200, 0), dataclasses.replace(QUICK, precision="float32"), []
    unbroken = convnet_features(dataset, SPEC, settings)
    # Without the network, but with the engine that was chosen: another one would round differently.
    shutil.copytree(own_cache, tmp_path, ignore=shutil.ignore_patterns("_features"), dirs_exist_ok=True)
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path))
    torch.save((dict(vars(dataset)), dataclasses.asdict(settings)), tmp_path / "given.pt")
    killed = processes.run("-c", TRAIN_UNTIL_KILLED, tmp_path / "given.pt")
    assert killed.returncode == -signal.SIGKILL and not is_cached(dataset, SPEC, settings), killed.stderr
    resumed = convnet_features(dataset, SPEC, settings, progress=reports.append)
    assert [report.done for report in reports] == [120, 240, 360]
    torch.testing.assert_close(resumed(dataset.images[:8]), unbroken(dataset.images[:8]), rtol=1e-3, atol=1e-4)
    assert [path.suffix for path in (tmp_path / "_features").iterdir() if not path.name.startswith(".")] == [".safetensors"]


@pytest.mark.slow
def test_other_pixels_or_settings_train_another_network():
    convnet_features(stripes(200, 0), SPEC, QUICK)
    assert not is_cached(stripes(200, 3), SPEC, QUICK)
    assert not is_cached(stripes(200, 0), SPEC, dataclasses.replace(QUICK, seed=1))


@pytest.mark.slow
def test_each_precision_has_a_network_of_its_own():
    dataset, trained = stripes(200, 0), {}
    for precision in ("float32", "bfloat16"):
        settings = dataclasses.replace(QUICK, precision=precision)
        assert not is_cached(dataset, SPEC, settings)
        trained[precision] = convnet_features(dataset, SPEC, settings)
        assert is_cached(dataset, SPEC, settings) and trained[precision].precision == precision
    features = [network(dataset.images[:8]) for network in trained.values()]
    assert not torch.equal(*features)
    automatic = convnet_features(dataset, SPEC, QUICK, progress=lambda report: pytest.fail("trained again"))
    assert torch.equal(automatic(dataset.images[:8]), features[list(trained).index(automatic.precision)])


@pytest.mark.slow
def test_a_network_of_earlier_versions_which_had_only_float32_is_found():
    dataset, settings = stripes(200, 0), dataclasses.replace(QUICK, precision="float32")
    convnet_features(dataset, SPEC, settings)
    (path,) = (cache_folder() / "_features").glob("*.safetensors")
    assert path.name == "stripes-5a0e5d74dcb68161a917.safetensors"


@pytest.mark.slow
def test_damaged_cached_network_is_trained_again():
    dataset = stripes(200, 0)
    convnet_features(dataset, SPEC, QUICK)
    (path,) = (cache_folder() / "_features").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    before = path.stat().st_size
    convnet_features(dataset, SPEC, QUICK)
    assert path.stat().st_size > before


@pytest.mark.slow
def test_large_images_are_reduced():
    spec = dataclasses.replace(SPEC, image_size=100)
    features = convnet_features(stripes(12, 0, side=100), spec, FeatureSettings(images=8, epochs=1))
    assert features(stripes(3, 1, side=100).images).shape == (3, ConvNetFeatures.num_features)


@pytest.mark.parametrize(("side", "available", "trained_on"), [(32, 200, 100), (64, 200, 50), (32, 60, 60)])
def test_fewer_training_images_are_drawn_of_larger_ones(side, available, trained_on):
    spec = dataclasses.replace(SPEC, image_size=side)
    images, labels = _training_images(stripes(available, 0, side=side), spec, FeatureSettings(images=100))
    assert len(images) == len(labels) == trained_on


def test_feature_settings_out_of_range_raise_usage_error():
    with pytest.raises(UsageError, match="FeatureSettings.epochs must be positive, got 0"):
        FeatureSettings(epochs=0)
    with pytest.raises(UsageError, match="Unknown precision 'float8'"):
        FeatureSettings(precision="float8")
