"""The smallest generator there can be: 16 px images of three flat colors, latents of 4 x 4, two tokens a side."""

import dataclasses

import pytest
import torch

from ddkit.data.store import ImageSet
from ddkit.generator.autoencoder import build_autoencoder
from ddkit.generator.config import AutoencoderConfig, DenoiserConfig, GeneratorConfig, OptimizerConfig
from ddkit.generator.model_facts import ModelFacts
from ddkit.generator.model_folder import Model
from ddkit.generator.networks import build_denoiser
from ddkit.generator.training.train import TrainingData

CLASSES = ("red", "green", "blue")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that share tensors as small as these mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config():
    return GeneratorConfig(
        AutoencoderConfig(pixel_patch=4, channels=(8,), latent_channels=2, norm_groups=4),
        DenoiserConfig(hidden_size=16, depth=3, num_heads=2, tokens_per_side=2),
        OptimizerConfig(steps=4, batch_size=6, learning_rate=1e-3, warmup_steps=2),
        OptimizerConfig(steps=6, batch_size=6, learning_rate=1e-3, warmup_steps=2),
        compile=False,
    )


@pytest.fixture
def images():
    """12 images, 4 a class: a color each, with a little noise."""
    labels = torch.arange(3).repeat_interleave(4)
    pixels = torch.randint(0, 40, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for row, label in enumerate(labels.tolist()):
        pixels[row, label] += 200
    return ImageSet(pixels, labels, CLASSES)


@pytest.fixture
def data(images):
    return TrainingData("colors", images, sha256="of-these-pixels")


@pytest.fixture
def make_model(config):
    """Models with random weights, for any architecture and prediction."""

    def make(architecture="uvit", prediction="flow"):
        autoencoder = build_autoencoder(config.autoencoder, 16, seed=1)
        autoencoder.register_to_config(scaling_factor=0.7)
        denoiser_config = dataclasses.replace(config.denoiser, architecture=architecture)
        denoiser = build_denoiser(denoiser_config, (2, 4, 4), len(CLASSES), seed=2)
        generator = torch.Generator().manual_seed(3)
        for parameter in denoiser.parameters():
            # What begins at zero would hide mistakes: untrained outputs would all be nought.
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        facts = ModelFacts("colors", CLASSES, 16, prediction, "none", 0, 0, "of-these-pixels")
        return Model(denoiser.eval(), autoencoder.eval(), facts)

    return make
