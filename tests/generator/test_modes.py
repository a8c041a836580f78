"""The modes of each class in latent space: what k-means finds, and what is missing."""

import dataclasses

import pytest
import torch

from ddkit.errors import MissingModelError
from ddkit.generator.modes import find_modes
from ddkit.generator.training.train import TrainingRequest, train


@pytest.fixture
def trained(data, config, tmp_path):
    """A trained model and its folder, whose latents of the 12 training images are next to it."""
    short = dataclasses.replace(config, denoiser_optimizer=dataclasses.replace(config.denoiser_optimizer, steps=1))
    return train(data, TrainingRequest(short, tmp_path / "run")), tmp_path / "run"


def modes_of(trained, data, count, seed=0, sha256=None):
    model, folder = trained
    return find_modes(folder, model, data.images.labels, count, seed=seed, dataset_sha256=sha256 or data.sha256)


def latents_of(trained, data):
    from safetensors.torch import load_file

    model, folder = trained
    latents = load_file(folder / "checkpoints" / "latents.safetensors")["latents"][:, 0].float()
    return latents * model.autoencoder.config.scaling_factor


def test_single_mode_is_the_mean_of_the_scaled_latents_of_its_class(trained, data):
    modes, latents = modes_of(trained, data, 1), latents_of(trained, data)
    assert modes.shape == (3, 1, 2, 4, 4) and modes.dtype == torch.float32
    for label in range(3):
        torch.testing.assert_close(modes[label, 0], latents[data.images.labels == label].mean(dim=0), atol=1e-4, rtol=1e-4)


def test_more_modes_than_images_are_the_images(trained, data):
    modes, latents = modes_of(trained, data, 99), latents_of(trained, data)
    assert modes.shape == (3, 4, 2, 4, 4)
    for label in range(3):
        own = latents[data.images.labels == label].flatten(1)
        assert torch.cdist(own, modes[label].flatten(1)).min(dim=1).values.max() < 1e-3


def test_same_seed_finds_the_same_modes(trained, data):
    assert torch.equal(modes_of(trained, data, 2), modes_of(trained, data, 2))


def test_missing_latents_raise_missing_model_error_with_the_command_to_run(trained, data):
    _, folder = trained
    (folder / "checkpoints" / "latents.safetensors").unlink()
    with pytest.raises(
        MissingModelError, match=r"needs the latents of the training images.*latents.safetensors is missing"
    ) as caught:
        modes_of(trained, data, 2)
    assert "ddkit train --dataset colors" in caught.value.remedy and "--mode-guidance" in caught.value.remedy


def test_latents_of_other_images_raise_missing_model_error(trained, data):
    with pytest.raises(MissingModelError, match="belongs to other images or another autoencoder"):
        modes_of(trained, data, 2, sha256="of-other-pixels")
