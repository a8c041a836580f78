"""The stages of training: the autoencoder on pixels, the denoiser on its latents, and its fine-tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ddkit.data.store import ImageSet
from ddkit.generator.autoencoder import AutoencoderLoss, to_signed
from ddkit.generator.config import GeneratorConfig, MinimaxConfig, OptimizerConfig
from ddkit.generator.minimax import MinimaxCriteria
from ddkit.generator.networks import null_class, predict
from ddkit.generator.objective import Objective
from ddkit.generator.training.latents import LatentSet
from ddkit.runtime.device import free_memory, upload
from ddkit.runtime.seeds import Shuffling, generator_for

_STEPS_DRAWN = 100  # at most, whose row numbers go to the device at once
_MOST_OF_MEMORY = 0.04  # of a GPU's free memory that pixels or latents may take; a plan leaves a tenth of it


class Stage(ABC):
    """One stage of training, which a Trainer runs.

    network: the network whose parameters are trained. loss: a module that holds it and maps a part of a batch to the
    mean loss and the figures worth recording, all scalars. memory: what the loss keeps from step to step besides.
    ema_width, ema_decay: as in GeneratorConfig.
    """

    name: str  # in checkpoints and records
    task: str  # in progress reports
    figures: tuple[str, ...] = ("mse",)  # names of the values after the loss; the first is a squared error
    remedy: str  # advice when the loss diverges
    smaller: str  # advice when memory runs out, perhaps with {accumulation}: twice as many parts as now
    network: nn.Module
    loss: nn.Module
    memory: nn.Module | None = None
    optimizer: OptimizerConfig
    ema_width: float
    ema_decay: float | None = None

    def __init__(self, images: int, seed: int) -> None:
        self.seed = seed
        self._images, self._order = images, Shuffling(images, seed)
        self._block = -1
        self._rows = torch.empty(0, dtype=torch.int64)

    @abstractmethod
    def draw(self, step: int, device: torch.device) -> dict[str, Tensor]:
        """The global batch of a step, a function of (seed, step): tensors whose first dimension is the batch."""

    def rows(self, step: int, device: torch.device) -> Tensor:
        """(B,) int64 on the device: the numbers of the images in a step's batch."""
        count = self.optimizer.batch_size
        drawn = max(1, min(_STEPS_DRAWN, self._images // count))
        block, place = divmod(step, drawn)
        if block != self._block or self._rows.device.type != device.type:
            self._rows = upload(self._order.take(block * drawn * count, drawn * count), device)
            self._block = block
        return self._rows[place * count : (place + 1) * count]


class AutoencoderStage(Stage):
    """Reconstruct images. The recorded figure is the mean squared error of pixels in [-1, 1]."""

    name = "autoencoder"
    task = "Training the autoencoder"
    remedy = "The preset decides its learning rate: choose another --preset, or a pretrained --autoencoder."
    smaller = "The preset decides its size: choose a smaller --preset, or another --device."

    def __init__(self, config: GeneratorConfig, network: AutoencoderKL, images: ImageSet) -> None:
        super().__init__(len(images), config.seed)
        self.network = network.to(memory_format=torch.channels_last)
        self.loss = AutoencoderLoss(self.network, config.kl_weight)
        self.optimizer = config.autoencoder_optimizer
        self.ema_width = config.ema_width
        self._pixels = DeviceRows(images.images)
        self._flips = config.flips
        self._latent_shape = config.autoencoder.latent_shape(images.images.shape[-1])

    def draw(self, step: int, device: torch.device) -> dict[str, Tensor]:
        """pixels (B, 3, S, S) float32 in [-1, 1]; noise (B, C, s, s) float32."""
        count = self.optimizer.batch_size
        generator = generator_for(device, self.name, self.seed, step)
        pixels = to_signed(self._pixels.take(self.rows(step, device)))
        if self._flips:
            mirrored = torch.rand(count, 1, 1, 1, generator=generator, device=device) < 0.5
            pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        noise = torch.randn(count, *self._latent_shape, generator=generator, device=device)
        return {"pixels": pixels.contiguous(memory_format=torch.channels_last), "noise": noise}


class DenoiserStage(Stage):
    """Remove noise from latents. The recorded figure is the unweighted squared error of the target."""

    name = "denoiser"
    task = "Training the denoiser"
    remedy = "Try a lower --lr."
    smaller = "Try --accumulation {accumulation}, a smaller --batch-size, or a smaller --preset."

    def __init__(self, config: GeneratorConfig, network: nn.Module, latents: LatentSet) -> None:
        super().__init__(len(latents), config.seed)
        self.network = network
        self.objective = Objective(config.objective)
        self.loss = DenoiserLoss(network, self.objective)
        self.optimizer = config.denoiser_optimizer
        self.ema_width, self.ema_decay = config.ema_width, config.ema_decay
        self._views = latents.latents.shape[1]
        self._latents, self._labels = DeviceRows(latents.latents.flatten(0, 1)), DeviceRows(latents.labels)
        self._std = latents.std
        self._null_class = null_class(network)
        self._dropout = config.objective.label_dropout

    def draw(self, step: int, device: torch.device) -> dict[str, Tensor]:
        """clean, noise (B, C, s, s) float32, scaled; times (B,) float32 in [0, 1000]; labels (B,) int64."""
        count = self.optimizer.batch_size
        rows = self.rows(step, device)
        generator = generator_for(device, self.name, self.seed, step)
        view = torch.randint(self._views, (count,), generator=generator, device=device)
        clean = self._latents.take(rows * self._views + view).float() / self._std
        labels = self._labels.take(rows)
        dropped = torch.rand(count, generator=generator, device=device) < self._dropout
        times = self.objective.draw_times(count, generator)
        return {
            "clean": clean,
            "noise": torch.randn(clean.shape, generator=generator, device=device),
            "times": times[torch.randperm(count, generator=generator, device=device)],
            "labels": torch.where(dropped, self._null_class, labels),
        }


class MinimaxStage(DenoiserStage):
    """Fine-tune a denoiser by the minimax criteria, which are recorded without their weights.

    The criteria treat each part of an accumulated batch as a separate batch.
    """

    name = "minimax"
    task = "Fine-tuning the denoiser"
    figures = ("mse", "representativeness", "diversity")
    remedy = "Try a lower --lr, --lambda-r or --lambda-d."
    smaller = "Start over with a smaller --batch-size or without --full, or use another --device."

    def __init__(
        self, config: GeneratorConfig, minimax: MinimaxConfig, network: nn.Module, latents: LatentSet, num_classes: int
    ) -> None:
        super().__init__(config, network, latents)
        self.memory = MinimaxCriteria(num_classes, minimax.memory_size)
        self.loss = MinimaxLoss(network, self.objective, self.memory, minimax)

    def draw(self, step: int, device: torch.device) -> dict[str, Tensor]:
        """Like `DenoiserStage.draw`, with classes: (B,) int64, the labels before any is replaced by the null class."""
        return super().draw(step, device) | {"classes": self._labels.take(self.rows(step, device))}


class DeviceRows:
    """The rows of a tensor, taken by number. They move to the device if they leave most of its memory free."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def take(self, rows: Tensor) -> Tensor:
        """The rows with these numbers, (n,) int64 -> (n, ...), on the device of the numbers."""
        if self._values.device.type != rows.device.type:
            if self._values.nbytes > _MOST_OF_MEMORY * free_memory(rows.device):
                return self._values[rows.cpu()].to(rows.device)
            self._values = self._values.to(rows.device)
        return self._values[rows]


class DenoiserLoss(nn.Module):
    """The weighted squared error of a batch."""

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network = network
        self.objective = objective

    def forward(self, clean: Tensor, noise: Tensor, times: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Arguments: as `DenoiserStage.draw` returns them. Returns the weighted and the unweighted mean squared error."""
        output = predict(self.network, self.objective.mix(clean, noise, times), times, labels)
        return self.errors(output, clean, noise, times)

    def errors(self, output: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """The two that `forward` returns, scalars. output: (B, C, s, s), the network's."""
        errors = (output - self.objective.target(clean, noise, times)).square().flatten(1).mean(dim=1)  # (B,)
        return (self.objective.weight(times) * errors).mean(), errors.mean()


class MinimaxLoss(nn.Module):
    """The denoiser's loss and the minimax criteria of the clean latents it predicts (arXiv 2311.15529, section 3)."""

    def __init__(self, network: nn.Module, objective: Objective, criteria: MinimaxCriteria, config: MinimaxConfig) -> None:
        super().__init__()
        self.plain = DenoiserLoss(network, objective)
        self.criteria = criteria
        self.config = config

    def forward(self, clean: Tensor, noise: Tensor, times: Tensor, labels: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        """Arguments: as `MinimaxStage.draw` returns them. Returns the weighted sum, the mean squared error, the criteria."""
        objective = self.plain.objective
        noisy = objective.mix(clean, noise, times)
        output = predict(self.plain.network, noisy, times, labels)
        loss, error = self.plain.errors(output, clean, noise, times)
        representativeness, diversity = self.criteria(objective.clean(noisy, output, times), clean, classes)
        loss = loss + self.config.lambda_r * representativeness + self.config.lambda_d * diversity
        return loss, error, representativeness, diversity
