"""The settings of the generator, its training and its sampling, as frozen dataclasses.

This module imports no PyTorch, so that the command line can state the choices and defaults in its help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ddkit.errors import UsageError, did_you_mean, require_positive

ARCHITECTURES = ("uvit", "dit")
PREDICTIONS = ("flow", "v", "epsilon")
PRECISIONS = ("float32", "bfloat16", "float16")
SAMPLERS = ("dpm++", "ddim", "unipc")
SAMPLING_PRECISIONS = ("auto", "float32", "bfloat16")
METHODS = ("diffusion", "minimax")  # of training
MOST_SAMPLING_STEPS = 1000
SECONDS_WORTH_COMPILING = 300.0  # of a whole training that a time limits


@dataclass(frozen=True)
class AutoencoderConfig:
    """The KL autoencoder: a `diffusers.AutoencoderKL` over pixels folded into channels.

    pixel_patch: side of the squares of pixels that become channels before the first convolution.
    channels: channels of each level. The side halves between levels, so latents have the side
        S / (pixel_patch * 2**(levels - 1)).
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
        """The image side divided by the latent side."""
        return self.pixel_patch * 2 ** (len(self.channels) - 1)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, s, s). Raises UsageError when the image side is not a multiple of the factor."""
        if image_size % self.factor:
            fitting = max(1, round(image_size / self.factor)) * self.factor
            raise UsageError(
                f"This preset cannot encode images of {image_size} pixels: their side must be a multiple of {self.factor}.",
                f"Prepare the dataset with --image-size {fitting}, or choose another preset.",
            )
        side = image_size // self.factor
        return (self.latent_channels, side, side)


@dataclass(frozen=True)
class DenoiserConfig:
    """The transformer that removes noise from latents.

    architecture: "uvit" (`ddkit.generator.uvit.UViT`) or "dit" (`diffusers.DiTTransformer2DModel`).
    tokens_per_side: patches along each side of the latents; the patch size follows from the latent side.
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
            raise UsageError(f"DenoiserConfig.hidden_size {self.hidden_size} is not a multiple of {self.num_heads} heads.")
        if self.architecture == "uvit" and self.depth % 2 == 0:
            raise UsageError(
                f"DenoiserConfig.depth of a U-ViT must be odd, got {self.depth}.",
                "Choose a preset that is made for it, such as tiny, or leave out --architecture.",
            )

    def patch_size(self, latent_side: int) -> int:
        """The side of a patch. Raises UsageError when the latents cannot be cut into that many patches."""
        if latent_side % self.tokens_per_side:
            raise UsageError(
                f"Latents of {latent_side} x {latent_side} cannot be cut into {self.tokens_per_side} patches a side.",
                "Choose another preset for images of this size.",
            )
        return latent_side // self.tokens_per_side


@dataclass(frozen=True)
class ObjectiveConfig:
    """The target of the denoiser, and the noise levels it sees.

    prediction: "flow" (rectified flow: noise minus data, Liu et al. 2022), "v" (Salimans & Ho 2022) or "epsilon".
    min_snr_gamma: weights the losses of epsilon and v (Hang et al. 2023, arXiv 2303.09556); None gives every noise
        level the same weight. Flow does not use it.
    time_mean, time_std: mean and deviation of the logit of flow's times (Esser et al. 2024, arXiv 2403.03206, section 3.1).
    label_dropout: fraction of labels replaced by the null class, which classifier-free guidance needs.
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
class OptimizerConfig:
    """AdamW for one stage of training.

    The rate rises linearly over `warmup_steps` and falls as 1 / sqrt(step / decay_after_steps) once
    `decay_after_steps` are done (Karras et al. 2024, arXiv 2312.02696, equation 67), whatever the number of steps.
    batch_size: images a step over all processes and accumulated parts. accumulation: parts a step is computed in.
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
            raise UsageError(f"OptimizerConfig.beta2 must be in (0, 1), got {self.beta2}.")
        if self.weight_decay < 0:
            raise UsageError(f"OptimizerConfig.weight_decay must not be negative, got {self.weight_decay}.")
        if self.batch_size % self.accumulation:
            raise UsageError(
                f"A batch of {self.batch_size} cannot be split into {self.accumulation} equal parts.",
                "Choose another --batch-size or --accumulation.",
            )

    def rate(self, step: int) -> float:
        """The learning rate of the step with this index, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warm / max(1.0, (step + 1) / self.decay_after_steps) ** 0.5


@dataclass(frozen=True)
class MinimaxConfig:
    """Fine-tuning by the minimax criteria. Defaults: Gu et al. 2024, arXiv 2311.15529, section 4.1.

    init: the generator to start from, a folder or a hub id. full: train all parameters, not only those of DiffFit.
    lambda_r, lambda_d: weights of representativeness and diversity, added to the diffusion loss.
    memory_size: latents of each class in each of the two memories. epochs: passes over the training set when the
        number of steps is not given.
    class_map: pairs of a class and the label it starts from, as `ddkit.generator.pretrained.map_classes` takes them.
    """

    init: str
    full: bool = False
    lambda_r: float = 0.002
    lambda_d: float = 0.008
    memory_size: int = 64
    epochs: int = 8
    class_map: tuple[tuple[str, str | int | None], ...] = ()

    def __post_init__(self) -> None:
        # JSON turns tuples into lists, and people write a dictionary.
        object.__setattr__(self, "class_map", tuple(dict(self.class_map).items()))
        require_positive(self, "memory_size", "epochs")
        for name in ("lambda_r", "lambda_d"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"MinimaxConfig.{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        if not self.init:
            raise UsageError("Minimax diffusion fine-tunes a generator.", "Name one with --init FOLDER or a hub id.")


@dataclass(frozen=True)
class GeneratorConfig:
    """Everything that decides what a training run computes.

    kl_weight: weight of the autoencoder's KL term; the mean absolute and the mean squared error of pixels in [-1, 1]
        have weight 1.
    flips: show every image mirrored as well; wrong for letters.
    pretrained_autoencoder: hub id or folder of an autoencoder to use instead of training one. Only the latent side of
        `autoencoder` counts then.
    ema_width: relative width of the exponential moving average of the weights (sigma_rel of EDM2, Karras et al. 2024).
    ema_decay: a constant decay of that average, instead of `ema_width`.
    compile: compile the networks with torch.compile, where the training is long enough.
    minimax: fine-tune a generator by these criteria; its two networks replace the ones described here.
    """

    autoencoder: AutoencoderConfig
    denoiser: DenoiserConfig
    autoencoder_optimizer: OptimizerConfig
    denoiser_optimizer: OptimizerConfig
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


BATCH_ON_GPU, BATCH_ELSEWHERE = 1024, 256  # images sampled at once


@dataclass(frozen=True)
class SamplingSettings:
    """The settings of sampling.

    guidance: scale w of classifier-free guidance, null + w * (class - null); 1 turns it off. It is one more than the w of
        Ho & Salimans 2022 (arXiv 2207.12598).
    guidance_interval: the times, 0 (clean) to 1 (noise), in which guidance acts (Kynkaanniemi et al. 2024,
        arXiv 2404.07724).
    mode_guidance: lambda of mode guidance (Chan-Santiago et al. 2025, arXiv 2505.18963); 0 turns it off. Every step of the
        first half adds to it, so that the same scale steers further in more steps.
    influence_guidance: scale of influence guidance (Chen et al. 2025, ICLR): the length of each guided step relative to that of
        the noise in the latents; 0 turns it off. `ddkit.generator.influence` says what differs from the paper, and
        tools/results/generator.md what it is worth.
    batch_size: images at once; None for BATCH_ON_GPU on a GPU and BATCH_ELSEWHERE elsewhere.
    precision: "float32", "bfloat16" or "auto", which is bfloat16 on GPUs and processors with instructions for it, else float32.
    compile: use torch.compile, which is worth it above a few thousand images.
    """

    sampler: str = "dpm++"
    steps: int = 20
    guidance: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    mode_guidance: float = 0.0
    influence_guidance: float = 0.0
    seed: int = 0
    batch_size: int | None = None
    precision: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        _check_choice(self, "sampler", SAMPLERS)
        _check_choice(self, "precision", SAMPLING_PRECISIONS)
        if not 1 <= self.steps <= MOST_SAMPLING_STEPS:
            raise UsageError(f"Sampling takes 1 to {MOST_SAMPLING_STEPS} steps, got {self.steps}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"The batch size must be at least 1, got {self.batch_size}.")
        for name in ("guidance", "mode_guidance", "influence_guidance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"SamplingSettings.{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise UsageError(f"The guidance interval must lie within 0 and 1, its lower end first, got {low} to {high}.")


def _check_choice(config: Any, name: str, known: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in known:
        raise UsageError(f"{type(config).__name__}.{name} cannot be '{value}'.", did_you_mean(str(value), known))


# Scores during training: few steps and little guidance, as the course of the distance matters and not the best picture.
TRACKING = SamplingSettings(steps=10, guidance=1.5, precision="float32")


# In the time of a track 2 entry, many samples without classifier-free guidance, of which a classifier chooses, teach more than
# few with it.
BUNDLE_SAMPLING = SamplingSettings(steps=10, guidance=1.0)
BUNDLE_KEEP = 0.75


def default_mode_guidance(prediction: str) -> float:
    """The scale of mode guidance for a model with that prediction.

    It was measured with flow matching on CIFAR-100 in 10 and 20 steps (tools/results/generator.md, track2.md), for 10 to 185
    images a class and as many modes. The same scale steers a model that predicts noise further, in 50 steps four times as far.
    """
    return 1.0 if prediction == "flow" else 0.0


def default_sampling(prediction: str, **given: Any) -> SamplingSettings:
    """The settings of sampling a model of that prediction, where only `given` is chosen.

    Mode guidance takes the place of classifier-free guidance, with which the same images take twice as long and teach
    less (tools/results/generator.md), unless `given` has the guidance or its interval.
    """
    if not given.keys() & {"guidance", "guidance_interval"}:
        given = {"mode_guidance": default_mode_guidance(prediction)} | given
        if given["mode_guidance"]:
            given["guidance"] = 1.0
    return SamplingSettings(**given)


@dataclass(frozen=True)
class BundleSettings:
    """The settings of sampling and storing a bundle's model.

    sampling: sampler, steps, guidance, its interval, mode guidance and the precision are used. With mode guidance image i of a
        class is steered to mode i of the class, beginning again after the last.
    device: "auto" takes what there is; "cuda" refuses to run without a GPU. half: store the weights as float16.
    images_per_class: stop when there are so many; None makes as many as the time allows.
    keep: share of the images that are kept. A ConvNet trained on real images labels them; with mode guidance, the class that
        an image was sampled as counts ten times. For each class those with its highest probabilities are kept; 1 keeps all,
        each in its class.
    classifier: bundle that ConvNet even if `keep` is 1, for generate.py's option --keep.
    Raises UsageError for a `keep` that is not above 0 and at most 1.
    """

    sampling: SamplingSettings = BUNDLE_SAMPLING
    device: str = "auto"
    half: bool = False
    images_per_class: int | None = None
    keep: float = BUNDLE_KEEP
    classifier: bool = False

    def __post_init__(self) -> None:
        require_share("keep", self.keep)

    def __str__(self) -> str:
        """The settings in words, such as "dpm++, 10 steps, guidance 1, no mode guidance, precision auto, 50 % kept"."""
        sampling = self.sampling
        modes = f"mode guidance {sampling.mode_guidance:g}" if sampling.mode_guidance else "no mode guidance"
        return (
            f"{sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance:g}, {modes}, "
            f"precision {sampling.precision}, {100 * self.keep:g} % kept"
        )

    @property
    def has_classifier(self) -> bool:
        return self.classifier or self.keep < 1


def require_share(name: str, value: float) -> None:
    """Raise UsageError unless the value is above 0 and at most 1."""
    if not 0 < value <= 1:
        raise UsageError(f"{name} must be above 0 and at most 1, got {value:g}.")
