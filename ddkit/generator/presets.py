"""The presets: whole configurations under a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from ddkit.errors import UsageError, did_you_mean
from ddkit.generator.config import (
    AutoencoderConfig,
    DenoiserConfig,
    GeneratorConfig,
    MinimaxConfig,
    ObjectiveConfig,
    OptimizerConfig,
)

DEFAULT_PRESET = "tiny"
MINIMAX_PRESET = "minimax-paper"
GPU_PRESETS = ("small", "mid", "tiny")  # from the largest that trains in about an hour on a GPU to the smallest


@dataclass(frozen=True)
class Preset:
    """A named configuration.

    configs: the configurations by the smallest image side each is made for.
    track_every: steps between two scores of the model during training; 0 for never.
    least_steps: of each network, which a training that a time limits must have time for; 0 takes any time.
    """

    configs: Mapping[int, GeneratorConfig]
    track_every: int = 1000
    least_steps: int = 100  # the shortest warm-up

    def config(self, image_size: int) -> GeneratorConfig:
        """The configuration for images of that side, cut into about as many patches as the preset has.

        Fine-tuning takes sizes and patches from the generator it starts from. Raises UsageError when the autoencoder
        cannot encode that side.
        """
        smallest = max((side for side in self.configs if side <= image_size), default=min(self.configs))
        config = self.configs[smallest]
        if config.minimax is not None:
            return config
        side, wanted = config.autoencoder.latent_shape(image_size)[1], config.denoiser.tokens_per_side
        divisors = (divisor for divisor in range(1, side + 1) if side % divisor == 0)
        tokens = min(divisors, key=lambda divisor: max(divisor, wanted) / min(divisor, wanted))
        return dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, tokens_per_side=tokens))


def preset(name: str) -> Preset:
    """The preset of that name. Raises UsageError that offers the nearest name."""
    if name not in PRESETS:
        raise UsageError(f"Unknown preset '{name}'.", did_you_mean(name, tuple(PRESETS)))
    return PRESETS[name]


def _tiny(architecture: str, depth: int) -> dict[int, GeneratorConfig]:
    autoencoder = OptimizerConfig(steps=6000, batch_size=32, learning_rate=3e-3)
    return {
        32: GeneratorConfig(
            AutoencoderConfig(pixel_patch=4, channels=(64,)),
            DenoiserConfig(architecture, hidden_size=192, depth=depth, num_heads=3),
            autoencoder,
            OptimizerConfig(steps=10_000, batch_size=128, learning_rate=1e-3),
        ),
        128: GeneratorConfig(
            AutoencoderConfig(pixel_patch=8, channels=(64, 128), latent_channels=8),
            DenoiserConfig(architecture, hidden_size=192, depth=depth, num_heads=3, tokens_per_side=8),
            autoencoder,
            OptimizerConfig(steps=10_000, batch_size=64, learning_rate=1e-3),
        ),
    }


def _mid() -> dict[int, GeneratorConfig]:
    autoencoder = OptimizerConfig(steps=6000, batch_size=32, learning_rate=2e-3)
    denoiser = OptimizerConfig(steps=15_000, batch_size=128, learning_rate=7e-4, warmup_steps=500, decay_after_steps=6000)
    return {
        32: GeneratorConfig(
            AutoencoderConfig(pixel_patch=2, channels=(48, 96)),
            DenoiserConfig(hidden_size=320, depth=7, num_heads=5),
            autoencoder,
            denoiser,
        ),
        128: GeneratorConfig(
            AutoencoderConfig(pixel_patch=4, channels=(48, 96, 96), latent_channels=8),
            DenoiserConfig(hidden_size=320, depth=7, num_heads=5, tokens_per_side=8),
            autoencoder,
            dataclasses.replace(denoiser, batch_size=64),
        ),
    }


def _small() -> dict[int, GeneratorConfig]:
    denoiser = OptimizerConfig(steps=50_000, batch_size=256, learning_rate=5e-4, warmup_steps=1000, decay_after_steps=20_000)
    return {
        32: GeneratorConfig(
            AutoencoderConfig(pixel_patch=1, channels=(64, 128), layers_per_level=2),
            DenoiserConfig(hidden_size=384, depth=9, num_heads=6, tokens_per_side=8),
            OptimizerConfig(steps=10_000, batch_size=128, learning_rate=1e-3, decay_after_steps=5000),
            denoiser,
        ),
        64: GeneratorConfig(
            AutoencoderConfig(pixel_patch=2, channels=(64, 128), layers_per_level=2),
            DenoiserConfig(hidden_size=384, depth=9, num_heads=6, tokens_per_side=8),
            OptimizerConfig(steps=15_000, batch_size=64, learning_rate=1e-3, decay_after_steps=5000),
            denoiser,
        ),
        128: GeneratorConfig(
            AutoencoderConfig(pixel_patch=2, channels=(64, 128, 256), layers_per_level=2),
            DenoiserConfig(hidden_size=384, depth=9, num_heads=6, tokens_per_side=16),
            OptimizerConfig(steps=15_000, batch_size=32, learning_rate=5e-4, decay_after_steps=5000),
            denoiser,
        ),
    }


def _base() -> dict[int, GeneratorConfig]:
    network = DenoiserConfig(hidden_size=512, depth=13, num_heads=8, tokens_per_side=8)
    denoiser = OptimizerConfig(steps=200_000, batch_size=1024, learning_rate=3e-4, warmup_steps=2000, decay_after_steps=50_000)
    return {
        32: GeneratorConfig(
            AutoencoderConfig(pixel_patch=1, channels=(128, 256), layers_per_level=2),
            network,
            OptimizerConfig(steps=20_000, batch_size=256, learning_rate=5e-4, decay_after_steps=10_000),
            denoiser,
            precision="bfloat16",
        ),
        64: GeneratorConfig(
            AutoencoderConfig(pixel_patch=1, channels=(64, 128, 256), layers_per_level=2),
            network,
            OptimizerConfig(steps=30_000, batch_size=128, learning_rate=5e-4, decay_after_steps=10_000),
            denoiser,
            precision="bfloat16",
        ),
    }


def _minimax_paper() -> GeneratorConfig:
    """The published settings (arXiv 2311.15529 and its public code).

    The loss of the predicted variance is left out, because no sampler here reads the variance.
    """
    return GeneratorConfig(
        # The first three are not used: both networks come from minimax.init.
        AutoencoderConfig(),
        DenoiserConfig("dit"),
        OptimizerConfig(steps=1, batch_size=8, learning_rate=1e-3),
        # A constant rate and unclipped gradients. 10,000 steps are 8 epochs of 10,000 images.
        OptimizerConfig(
            steps=10_000, batch_size=8, learning_rate=1e-3, warmup_steps=1, decay_after_steps=10**9, clip_norm=1e9,
            beta2=0.999,
        ),
        ObjectiveConfig(prediction="epsilon", min_snr_gamma=None),
        ema_decay=0.9999,
        compile=False,
        minimax=MinimaxConfig(init="facebook/DiT-XL-2-256"),
    )  # fmt: skip


PRESETS = {
    # Built-in letters, a minute and a half on two CPU cores.
    "demo": Preset(
        {
            32: GeneratorConfig(
                AutoencoderConfig(pixel_patch=4, channels=(32,)),
                DenoiserConfig(hidden_size=128, depth=3, num_heads=4),
                OptimizerConfig(steps=400, batch_size=32, learning_rate=4e-3),
                OptimizerConfig(steps=1500, batch_size=64, learning_rate=2e-3),
                flips=False,
                compile=False,
            )
        },
        track_every=0,
        least_steps=0,  # to try things out
    ),
    "tiny": Preset(_tiny("uvit", 5)),  # two CPU cores, half an hour or more
    "mid": Preset(_mid(), track_every=2500),  # an evening on a laptop, minutes on a GPU
    "small": Preset(_small(), track_every=5000),  # any GPU, about an hour
    "base": Preset(_base(), track_every=5000),  # a large GPU, hours
    "dit": Preset(_tiny("dit", 6)),  # like tiny, with the diffusion transformer of diffusers
    # Fine-tuning DiT-XL/2 or another generator. The Frechet distance does not measure what the criteria improve, so
    # the last model is the result.
    MINIMAX_PRESET: Preset({32: _minimax_paper()}, track_every=0, least_steps=0),
}
