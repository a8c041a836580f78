"""The denoisers to choose from, built from a config and called in one way."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ddkit.generator.presets import DenoiserConfig
from ddkit.generator.uvit import UViT

_LEAST_UNET_SIDE = 4  # of the latents at the U-Net's lowest level


def build_denoiser(config: DenoiserConfig, latent_shape: tuple[int, int, int], num_classes: int, *, seed: int) -> ModelMixin:
    """An untrained denoiser for latents (C, s, s) with one class more than `num_classes`; weights depend on `seed` alone."""
    builders = {"uvit": _build_uvit, "unet": _build_unet, "dit": _build_dit}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builders[config.architecture](config, latent_shape, num_classes)


def null_class(denoiser: nn.Module) -> int:
    """The label that stands for no class: the last of the denoiser's labels."""
    if isinstance(denoiser, UNet2DModel):
        return denoiser.config.num_class_embeds - 1
    if isinstance(denoiser, DiTTransformer2DModel):
        return denoiser.config.num_embeds_ada_norm
    return denoiser.config.num_classes


def predict(denoiser: nn.Module, noisy: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    """What the denoiser answers. noisy: (N, C, s, s). times: (N,) in [0, 1000]. labels: (N,) int64. Same shape as noisy."""
    output = denoiser(noisy, timestep=times, class_labels=labels)
    return output if isinstance(output, Tensor) else output.sample


def disable_label_dropout(denoiser: ModelMixin) -> ModelMixin:
    """The denoiser, in place, without a dropout of labels of its own.

    Labels are dropped by our own generator; diffusers' DiT would draw from the global one as well.
    """
    for module in denoiser.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return denoiser


def _build_uvit(config: DenoiserConfig, latent_shape: tuple[int, int, int], num_classes: int) -> UViT:
    channels, side, _ = latent_shape
    return UViT(
        sample_size=side,
        in_channels=channels,
        num_classes=num_classes,
        patch_size=config.patch_size(side),
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
    )


def _build_unet(config: DenoiserConfig, latent_shape: tuple[int, int, int], num_classes: int) -> UNet2DModel:
    """Levels of hidden_size, 2 * hidden_size, ... channels; multi-head attention on all but the first."""
    channels, side, _ = latent_shape
    levels = max(1, min(config.depth, (side // _LEAST_UNET_SIDE).bit_length()))
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(config.hidden_size * min(2**level, 4) for level in range(levels)),
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * (levels - 1)),
        up_block_types=(*["AttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=config.hidden_size // config.num_heads,
        norm_num_groups=8,
        num_class_embeds=num_classes + 1,
    )


def _build_dit(config: DenoiserConfig, latent_shape: tuple[int, int, int], num_classes: int) -> DiTTransformer2DModel:
    channels, side, _ = latent_shape
    denoiser = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=channels,
        num_layers=config.depth,
        sample_size=side,
        patch_size=config.patch_size(side),
        num_embeds_ada_norm=num_classes,
    )
    return disable_label_dropout(denoiser)
