"""The denoisers to choose from: built from a configuration, with one function that calls any of them."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ddkit.generator.config import DenoiserConfig
from ddkit.generator.uvit import UViT


def build_denoiser(config: DenoiserConfig, latent_shape: tuple[int, ...], num_classes: int, *, seed: int) -> ModelMixin:
    """An untrained denoiser of latents (C, s, s) for `num_classes` classes and the null class.

    The weights depend on `seed` alone.
    """
    channels, side, _ = latent_shape
    patch_size = config.patch_size(side)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # which leaves those of GPUs alone
        if config.architecture == "uvit":
            return UViT(side, channels, num_classes, patch_size, config.hidden_size, config.depth, config.num_heads)
        denoiser = DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=channels,
            num_layers=config.depth,
            sample_size=side,
            patch_size=patch_size,
            num_embeds_ada_norm=num_classes,
        )
    return disable_label_dropout(denoiser)


def class_setting(denoiser: ModelMixin) -> str:
    """The name that a denoiser's configuration has for its number of classes."""
    return "num_embeds_ada_norm" if isinstance(denoiser, DiTTransformer2DModel) else "num_classes"


def null_class(denoiser: ModelMixin) -> int:
    """The label that stands for no class: the last of the denoiser's labels."""
    return int(denoiser.config[class_setting(denoiser)])


def predict(denoiser: nn.Module, noisy: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    """The denoiser's output. noisy: (N, C, s, s). times: (N,) in [0, 1000]. labels: (N,) int64. Returns the shape of noisy."""
    output = denoiser(noisy, timestep=times, class_labels=labels)
    return output if isinstance(output, Tensor) else output.sample


def disable_label_dropout(denoiser: ModelMixin) -> ModelMixin:
    """Turn off a denoiser's own label dropout, in place, and return the denoiser.

    Training drops labels by its own generator; diffusers' DiT would draw from the global one as well.
    """
    for module in denoiser.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return denoiser
