"""Settings of the latent diffusion generator, as frozen values, and the presets that name whole sets of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ddkit.errors import BadFileError, UsageError, did_you_mean, require_positive

ARCHITECTURES = ("uvit", "unet", "dit")
PREDICTIONS = ("epsilon", "v", "flow")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class AutoencoderConfig:
    """The KL autoencoder: a `diffusers.AutoencoderKL` over pixels folded into channels.

    pixel_patch: side of the squares of pixels that become channels before the first convolution.
    channels: of each level; the side halves between levels, so latents are S / (pixel_patch * 2**(levels - 1)).
    """

    pixel_patch: int = 4
    channels: tuple[int, ...] = (64,)
    layers_per_level: int = 1
    latent_channels: int = 4
    norm_groups: int = 8

    def __post_init__(self) -> None:
        require_positive(self, "pixel_patch", "layers_per_level", "latent_channels", "norm_groups")
        if not self.channels or any(width < 1 or width % self.norm_groups for width in self.channels):
            raise UsageError(f"AutoencoderConfig.channels must be multiples of {self.norm_groups}, got {self.channels}.")

    @property
    def factor(self) -> int:
        """Pixels of an image's side for each latent of the latents' side."""
        return self.pixel_patch * 2 ** (len(self.channels) - 1)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, s, s). Raises UsageError where the image side is no multiple of the factor."""
        if image_size % self.factor:
            fitting = max(1, round(image_size / self.factor)) * self.factor
            raise UsageError(
                f"Images of {image_size} pixels cannot be encoded: their side is no multiple of {self.factor}.",
                f"Prepare the dataset with --image-size {fitting}, or choose another preset.",
            )
        side = image_size // self.factor
        return (self.latent_channels, side, side)


@dataclass(frozen=True)
class DenoiserConfig:
    """The network that removes noise from latents.

    architecture: "uvit" (ours), "unet" (`diffusers.UNet2DModel`) or "dit" (`diffusers.DiTTransformer2DModel`).
    hidden_size, depth: of the transformers; for the U-Net the channels of its first level and its levels.
    tokens_per_side: patches along each side of the latents; the patch size follows from the latents' side.
    """

    architecture: str = "uvit"
    hidden_size: int = 256
    depth: int = 7
    num_heads: int = 4
    tokens_per_side: int = 4

    def __post_init__(self) -> None:
        _check_choice(self, "architecture", ARCHITECTURES)
        require_positive(self, "hidden_size", "depth", "num_heads", "tokens_per_side")
        if self.hidden_size % self.num_heads:
            raise UsageError(f"DenoiserConfig.hidden_size {self.hidden_size} is no multiple of {self.num_heads} heads.")
        if self.architecture == "uvit" and self.depth % 2 == 0:
            raise UsageError(f"DenoiserConfig.depth of a U-ViT must be odd, got {self.depth}.")

    def patch_size(self, latent_side: int) -> int:
        """Raises UsageError where the latents cannot be cut into that many patches."""
        if latent_side % self.tokens_per_side:
            raise UsageError(
                f"Latents of {latent_side} x {latent_side} cannot be cut into {self.tokens_per_side} patches a side.",
                "Choose another preset for images of this size.",
            )
        return latent_side // self.tokens_per_side


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the denoiser learns to predict, and which noise levels it sees.

    prediction: "epsilon", "v" (Salimans & Ho 2022) or "flow" (rectified flow: noise minus data, Liu et al. 2022).
    min_snr_gamma: weights of epsilon and v losses (Hang et al. 2023, arXiv 2303.09556); None for the same weight
        at every noise level; not used by flow.
    time_mean, time_std: of the logit of flow's times (Esser et al. 2024, arXiv 2403.03206, section 3.1).
    label_dropout: share of labels replaced by the null class.
    """

    prediction: str = "flow"
    min_snr_gamma: float | None = 5.0
    time_mean: float = 0.0
    time_std: float = 1.0
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        _check_choice(self, "prediction", PREDICTIONS)
        require_positive(self, "time_std", *(() if self.min_snr_gamma is None else ("min_snr_gamma",)))
        if not 0 <= self.label_dropout < 1:
            raise UsageError(f"ObjectiveConfig.label_dropout must be in [0, 1), got {self.label_dropout}.")


@dataclass(frozen=True)
class OptimiserConfig:
    """One stage's AdamW. The rate rises linearly over warmup_steps, then falls as 1 / sqrt(step / decay_after_steps)
    once decay_after_steps are done (Karras et al. 2024, arXiv 2312.02696, equation 67), whatever the number of steps.

    batch_size: images per step over all processes and accumulated parts. accumulation: parts a step is computed in.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    decay_after_steps: int = 4000
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulation: int = 1
    beta2: float = 0.99

    def __post_init__(self) -> None:
        require_positive(
            self, "steps", "batch_size", "learning_rate", "warmup_steps", "decay_after_steps", "clip_norm", "accumulation"
        )
        if not 0 < self.beta2 < 1:
            raise UsageError(f"OptimiserConfig.beta2 must be in (0, 1), got {self.beta2}.")
        if self.weight_decay < 0:
            raise UsageError(f"OptimiserConfig.weight_decay must not be negative, got {self.weight_decay}.")
        if self.batch_size % self.accumulation:
            raise UsageError(f"A batch of {self.batch_size} cannot be split into {self.accumulation} equal parts.")

    def rate(self, step: int) -> float:
        """The learning rate of the step with this index, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warm / max(1.0, (step + 1) / self.decay_after_steps) ** 0.5


@dataclass(frozen=True)
class MinimaxConfig:
    """Fine-tuning by the minimax criteria. Defaults: Gu et al. 2024, arXiv 2311.15529, section 4.1.

    init: the generator to start from, a folder or a hub id. full: tune all parameters, not only DiffFit's.
    lambda_r, lambda_d: weights of representativeness and diversity beside the diffusion loss.
    memory_size: latents of each class in each of the two memories. epochs: over the training set, where no steps
    are given.
    class_map: pairs of a class and what it starts from, as `ddkit.generator.pretrained.map_classes` takes them.
    """

    init: str
    full: bool = False
    lambda_r: float = 0.002
    lambda_d: float = 0.008
    memory_size: int = 64
    epochs: int = 8
    class_map: tuple[tuple[str, str | int | None], ...] = ()

    def __post_init__(self) -> None:
        # JSON knows no tuples.
        object.__setattr__(self, "class_map", tuple((name, label) for name, label in self.class_map))
        require_positive(self, "memory_size", "epochs")
        for name in ("lambda_r", "lambda_d"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"MinimaxConfig.{name} is a number from 0 on, not {getattr(self, name)}.")
        if not self.init:
            raise UsageError("Minimax diffusion fine-tunes a generator.", "Say which with --init FOLDER or a hub id.")


@dataclass(frozen=True)
class GeneratorConfig:
    """All that decides what a training run computes.

    kl_weight: of the autoencoder's KL term beside the mean absolute and mean squared errors of pixels in [-1, 1].
    flips: show every image mirrored as well; wrong for letters.
    pretrained_autoencoder: hub id or folder of one to use instead of training one; of `autoencoder` only the
        latents' side then counts.
    ema_width: of the averaged weights' profile, as a share of the training so far (sigma_rel of Karras et al. 2024).
    ema_decay: the same of every step, in place of that profile.
    minimax: fine-tune a generator by these criteria; its autoencoder and its network then take the place of the ones
        described here.
    """

    autoencoder: AutoencoderConfig
    denoiser: DenoiserConfig
    autoencoder_optimizer: OptimiserConfig
    denoiser_optimizer: OptimiserConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    kl_weight: float = 1e-4
    ema_width: float = 0.1
    flips: bool = True
    precision: str = "float32"
    compile: bool = True
    pretrained_autoencoder: str = ""
    seed: int = 0
    ema_decay: float | None = None
    minimax: MinimaxConfig | None = None

    def __post_init__(self) -> None:
        _check_choice(self, "precision", PRECISIONS)
        if self.kl_weight < 0:
            raise UsageError(f"GeneratorConfig.kl_weight must not be negative, got {self.kl_weight}.")
        if not 0 < self.ema_width < 0.28:
            raise UsageError(f"GeneratorConfig.ema_width must be in (0, 0.28), got {self.ema_width}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UsageError(f"GeneratorConfig.ema_decay must be in [0, 1), got {self.ema_decay}.")


@dataclass(frozen=True)
class Preset:
    """A named configuration.

    meant_for: the machine and the time it takes there, for people.
    configs: by the smallest image side each is meant for.
    track_every: steps between two scores of the model in training; 0 for none.
    """

    name: str
    meant_for: str
    configs: Mapping[int, GeneratorConfig]
    track_every: int = 1000

    def config(self, image_size: int) -> GeneratorConfig:
        """The configuration for images of that side, cut into about as many patches as the preset has.

        Fine-tuning takes sizes and patches from what it starts from. Raises UsageError where the autoencoder cannot
        encode that side.
        """
        smallest = max((side for side in self.configs if side <= image_size), default=min(self.configs))
        config = self.configs[smallest]
        if config.minimax is not None:
            return config
        tokens = _nearest_divisor(config.autoencoder.latent_shape(image_size)[1], config.denoiser.tokens_per_side)
        return dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, tokens_per_side=tokens))


def preset(name: str) -> Preset:
    """The preset of that name. Raises UsageError, offering the nearest."""
    if name not in PRESETS:
        raise UsageError(f"There is no preset '{name}'.", did_you_mean(name, tuple(PRESETS)))
    return PRESETS[name]


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries of plain values."""
    return dataclasses.asdict(config)


def from_json(value: Mapping[str, Any], kind: type = GeneratorConfig) -> Any:
    """The inverse of `to_json`. Raises BadFileError that names an unknown or missing key."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    value = {name.replace("optimiser", "optimizer"): item for name, item in value.items()}  # the spelling of version 0.1.0
    if unknown := sorted(set(value) - set(fields)):
        raise BadFileError(f"{kind.__name__} has no {', '.join(unknown)}.", "The file was written by another version of ddkit.")
    known = {name: _from_json_value(fields[name].type, item) for name, item in value.items()}
    try:
        return kind(**known)
    except TypeError as error:
        raise BadFileError(f"{kind.__name__} is not complete: {error}.") from error


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """Lines such as "objective.prediction: v, not flow" for each setting in which `theirs` differs from `ours`."""
    lines = []
    for f in dataclasses.fields(ours):
        mine, other = getattr(ours, f.name), getattr(theirs, f.name)
        if dataclasses.is_dataclass(mine) and dataclasses.is_dataclass(other):
            lines += differences(mine, other, f"{prefix}{f.name}.")
        elif mine != other:
            lines.append(f"{prefix}{f.name}: {other}, not {mine}")
    return lines


def _from_json_value(annotation: str, item: Any) -> Any:
    if isinstance(item, Mapping):
        return from_json(item, _NESTED[annotation.removesuffix(" | None")])
    return tuple(item) if isinstance(item, list) else item


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is `wanted`, or the fewest times more or less."""
    divisors = (divisor for divisor in range(1, number + 1) if number % divisor == 0)
    return min(divisors, key=lambda divisor: max(divisor, wanted) / min(divisor, wanted))


def _check_choice(config: Any, name: str, known: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in known:
        raise UsageError(f"{type(config).__name__}.{name} cannot be '{value}'.", did_you_mean(str(value), known))


_KINDS = (AutoencoderConfig, DenoiserConfig, MinimaxConfig, ObjectiveConfig, OptimiserConfig)
_NESTED = {kind.__name__: kind for kind in _KINDS}

MINIMAX_PRESET = "minimax-paper"
BY_SIZE = ("tiny", "small", "base")  # those for any pictures, of one kind


def _minimax_paper() -> GeneratorConfig:
    """The published settings (arXiv 2311.15529 and its public code).

    Not taken over is the loss of the predicted variance, which no sampler here reads.
    """
    return GeneratorConfig(
        # The first three are not used: both networks come from minimax.init.
        AutoencoderConfig(),
        DenoiserConfig("dit"),
        OptimiserConfig(steps=1, batch_size=8, learning_rate=1e-3),
        # A constant rate, and gradients as they are. 10,000 steps are 8 epochs of 10,000 images.
        OptimiserConfig(
            steps=10_000, batch_size=8, learning_rate=1e-3, warmup_steps=1, decay_after_steps=10**9, clip_norm=1e9,
            beta2=0.999,
        ),
        ObjectiveConfig(prediction="epsilon", min_snr_gamma=None),  # every noise level counts the same
        ema_decay=0.9999,
        compile=False,
        minimax=MinimaxConfig(init="facebook/DiT-XL-2-256"),
    )  # fmt: skip


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "demo",
            "built-in letters, a minute and a half on 2 CPU cores",
            {
                32: GeneratorConfig(
                    AutoencoderConfig(pixel_patch=4, channels=(32,)),
                    DenoiserConfig(hidden_size=128, depth=3, num_heads=4),
                    OptimiserConfig(steps=400, batch_size=32, learning_rate=4e-3),
                    OptimiserConfig(steps=1500, batch_size=64, learning_rate=2e-3),
                    flips=False,
                    compile=False,
                )
            },
            track_every=0,
        ),
        Preset(
            "tiny",
            "2 CPU cores, 30 minutes or more",
            {
                32: GeneratorConfig(
                    AutoencoderConfig(pixel_patch=4, channels=(64,)),
                    DenoiserConfig(hidden_size=192, depth=5, num_heads=3),
                    OptimiserConfig(steps=6000, batch_size=32, learning_rate=3e-3),
                    OptimiserConfig(steps=10_000, batch_size=128, learning_rate=1e-3),
                ),
                128: GeneratorConfig(
                    AutoencoderConfig(pixel_patch=8, channels=(64, 128), latent_channels=8),
                    DenoiserConfig(hidden_size=192, depth=5, num_heads=3, tokens_per_side=8),
                    OptimiserConfig(steps=6000, batch_size=32, learning_rate=3e-3),
                    OptimiserConfig(steps=10_000, batch_size=64, learning_rate=1e-3),
                ),
            },
        ),
        Preset(
            "small",
            "any GPU, about an hour",
            {
                32: GeneratorConfig(
                    AutoencoderConfig(pixel_patch=1, channels=(64, 128), layers_per_level=2, latent_channels=4),
                    DenoiserConfig(hidden_size=384, depth=9, num_heads=6, tokens_per_side=8),
                    OptimiserConfig(steps=10_000, batch_size=128, learning_rate=1e-3, decay_after_steps=5000),
                    OptimiserConfig(
                        steps=50_000, batch_size=256, learning_rate=5e-4, warmup_steps=1000, decay_after_steps=20_000
                    ),
                ),
                64: GeneratorConfig(
                    AutoencoderConfig(pixel_patch=2, channels=(64, 128), layers_per_level=2, latent_channels=4),
                    DenoiserConfig(hidden_size=384, depth=9, num_heads=6, tokens_per_side=8),
                    OptimiserConfig(steps=15_000, batch_size=64, learning_rate=1e-3, decay_after_steps=5000),
                    OptimiserConfig(
                        steps=50_000, batch_size=256, learning_rate=5e-4, warmup_steps=1000, decay_after_steps=20_000
                    ),
                ),
                128: GeneratorConfig(
                    AutoencoderConfig(pixel_patch=2, channels=(64, 128, 256), layers_per_level=2, latent_channels=4),
                    DenoiserConfig(hidden_size=384, depth=9, num_heads=6, tokens_per_side=16),
                    OptimiserConfig(steps=15_000, batch_size=32, learning_rate=5e-4, decay_after_steps=5000),
                    OptimiserConfig(
                        steps=50_000, batch_size=256, learning_rate=5e-4, warmup_steps=1000, decay_after_steps=20_000
                    ),
                ),
            },
            track_every=5000,
        ),
        Preset(
            "base",
            "an H200 or its like, hours",
            {
                32: GeneratorConfig(
                    AutoencoderConfig(pixel_patch=1, channels=(128, 256), layers_per_level=2, latent_channels=4),
                    DenoiserConfig(hidden_size=512, depth=13, num_heads=8, tokens_per_side=8),
                    OptimiserConfig(steps=20_000, batch_size=256, learning_rate=5e-4, decay_after_steps=10_000),
                    OptimiserConfig(
                        steps=200_000, batch_size=1024, learning_rate=3e-4, warmup_steps=2000, decay_after_steps=50_000
                    ),
                    precision="bfloat16",
                ),
                64: GeneratorConfig(
                    AutoencoderConfig(pixel_patch=1, channels=(64, 128, 256), layers_per_level=2, latent_channels=4),
                    DenoiserConfig(hidden_size=512, depth=13, num_heads=8, tokens_per_side=8),
                    OptimiserConfig(steps=30_000, batch_size=128, learning_rate=5e-4, decay_after_steps=10_000),
                    OptimiserConfig(
                        steps=200_000, batch_size=1024, learning_rate=3e-4, warmup_steps=2000, decay_after_steps=50_000
                    ),
                    precision="bfloat16",
                ),
            },
            track_every=5000,
        ),
        Preset(
            "dit",
            "as tiny, with diffusers' diffusion transformer",
            {
                32: GeneratorConfig(
                    AutoencoderConfig(pixel_patch=4, channels=(64,)),
                    DenoiserConfig("dit", hidden_size=192, depth=6, num_heads=3),
                    OptimiserConfig(steps=6000, batch_size=32, learning_rate=3e-3),
                    OptimiserConfig(steps=10_000, batch_size=128, learning_rate=1e-3),
                ),
                128: GeneratorConfig(
                    AutoencoderConfig(pixel_patch=8, channels=(64, 128), latent_channels=8),
                    DenoiserConfig("dit", hidden_size=192, depth=6, num_heads=3, tokens_per_side=8),
                    OptimiserConfig(steps=6000, batch_size=32, learning_rate=3e-3),
                    OptimiserConfig(steps=10_000, batch_size=64, learning_rate=1e-3),
                ),
            },
        ),
        Preset(
            MINIMAX_PRESET,
            "fine-tuning DiT-XL/2, or a generator of yours, by the minimax criteria",
            {32: _minimax_paper()},
            # What the criteria are to bring is not what the distance measures: the last model is the result.
            track_every=0,
        ),
    )
}
