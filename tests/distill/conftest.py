"""A generator of the flat colors, with random weights."""

import pytest
import torch

from ddkit.data.store import load_dataset, train_sha256
from ddkit.generator.autoencoder import build_autoencoder
from ddkit.generator.config import AutoencoderConfig, DenoiserConfig
from ddkit.generator.model_facts import ModelFacts
from ddkit.generator.model_folder import Model, save_model
from ddkit.generator.networks import build_denoiser


@pytest.fixture
def model_folder(colors, tmp_path):
    images = load_dataset(colors, "train")
    autoencoder = build_autoencoder(AutoencoderConfig(channels=(8,), latent_channels=2, norm_groups=4), 16, seed=0)
    config = DenoiserConfig(hidden_size=16, depth=1, num_heads=2, tokens_per_side=2)
    denoiser = build_denoiser(config, (2, 4, 4), 2, seed=0)
    facts = ModelFacts(colors, images.class_names, 16, "flow", "none", 3, 30, train_sha256(colors))
    torch.manual_seed(0)
    save_model(Model(denoiser, autoencoder, facts), tmp_path / "model")
    return tmp_path / "model"
