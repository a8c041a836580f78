"""The stages of training the generator: the autoencoder on pixels, the denoiser on its latents, and its fine-tuning."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ddkit.data.store import ImageSet
from ddkit.generator.autoencoder import AutoencoderLoss, to_signed
from ddkit.generator.minimax import MinimaxCriteria
from ddkit.generator.networks import null_class, predict
from ddkit.generator.objective import Objective
from ddkit.generator.presets import GeneratorConfig, MinimaxConfig
from ddkit.generator.training.latents import LatentSet
from ddkit.runtime.seeds import Shuffling, generator_for


class AutoencoderStage:
    """Reconstruct images. The recorded figure is the mean squared error of pixels in [-1, 1]."""

    name = "autoencoder"
    task = "Training the autoencoder"
    figures = ("mse",)
    remedy = "Its rate is the preset's: choose another --preset, or a pretrained --autoencoder."
    memory = None

    def __init__(self, config: GeneratorConfig, network: AutoencoderKL, images: ImageSet) -> None:
        self.network = network.to(memory_format=torch.channels_last)
        self.loss = AutoencoderLoss(self.network, config.kl_weight)
        self.optimizer = config.autoencoder_optimizer
        self.ema_width, self.ema_decay = config.ema_width, None
        self._images = images
        self._flips = config.flips
        self._seed = config.seed
        self._latent_shape = config.autoencoder.latent_shape(images.images.shape[-1])
        self._order = Shuffling(len(images), config.seed)

    def draw(self, step: int, device: torch.device) -> dict[str, Tensor]:
        """pixels (B, 3, S, S) float32 in [-1, 1]; noise (B, C, s, s) float32."""
        count = self.optimizer.batch_size
        chosen = self._order.take(step * count, count)
        generator = generator_for(device, self.name, self._seed, step)
        pixels = to_signed(self._images.images[chosen].to(device))
        if self._flips:
            mirrored = torch.rand(count, 1, 1, 1, generator=generator, device=device) < 0.5
            pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        noise = torch.randn(count, *self._latent_shape, generator=generator, device=device)
        return {"pixels": pixels.contiguous(memory_format=torch.channels_last), "noise": noise}


class DenoiserStage:
    """Remove noise from latents. The recorded figure is the unweighted squared error of the target."""

    name = "denoiser"
    task = "Training the denoiser"
    figures: tuple[str, ...] = ("mse",)
    remedy = "Try a lower --lr."
    memory: nn.Module | None = None

    def __init__(self, config: GeneratorConfig, network: nn.Module, latents: LatentSet) -> None:
        self.network = network
        self.objective = Objective(config.objective)
        self.loss: nn.Module = DenoiserLoss(network, self.objective)
        self.optimizer = config.denoiser_optimizer
        self.ema_width, self.ema_decay = config.ema_width, config.ema_decay
        self._latents = latents
        self._seed = config.seed
        self._null_class = null_class(network)
        self._dropout = config.objective.label_dropout
        self._order = Shuffling(len(latents), config.seed)

    def draw(self, step: int, device: torch.device) -> dict[str, Tensor]:
        """clean, noise (B, C, s, s) float32, scaled; times (B,) float32 in [0, 1000]; labels (B,) int64."""
        count = self.optimizer.batch_size
        chosen = self._order.take(step * count, count)
        generator = generator_for(device, self.name, self._seed, step)
        views = self._latents.latents.shape[1]
        view = torch.randint(views, (count,), generator=generator, device=device).cpu()
        clean = self._latents.latents[chosen, view].to(device).float() / self._latents.std
        labels = self._latents.labels[chosen].to(device)
        dropped = torch.rand(count, generator=generator, device=device) < self._dropout
        times = self.objective.draw_times(count, generator)
        return {
            "clean": clean,
            "noise": torch.randn(clean.shape, generator=generator, device=device),
            "times": times[torch.randperm(count, generator=generator, device=device)],
            "labels": torch.where(dropped, self._null_class, labels),
        }


class MinimaxStage(DenoiserStage):
    """Fine-tune a denoiser by the minimax criteria. They are recorded too, without their weights.

    To the criteria each part of an accumulated batch is a batch of its own.
    """

    name = "minimax"
    task = "Fine-tuning the denoiser"
    figures = ("mse", "representativeness", "diversity")
    remedy = "Try a lower --lr, --lambda-r or --lambda-d."

    def __init__(self, config: GeneratorConfig, network: nn.Module, latents: LatentSet, num_classes: int) -> None:
        super().__init__(config, network, latents)
        self.memory = MinimaxCriteria(num_classes, config.minimax.memory_size)
        self.loss = MinimaxLoss(network, self.objective, self.memory, config.minimax)

    def draw(self, step: int, device: torch.device) -> dict[str, Tensor]:
        """As `DenoiserStage.draw`, and classes: (B,) int64, the labels none of which is replaced by the null class."""
        count = self.optimizer.batch_size
        classes = self._latents.labels[self._order.take(step * count, count)]
        return super().draw(step, device) | {"classes": classes.to(device)}


class DenoiserLoss(nn.Module):
    """The weighted squared error of a batch."""

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network = network
        self.objective = objective

    def forward(self, clean: Tensor, noise: Tensor, times: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `DenoiserStage.draw` gives them. Returns the weighted and the unweighted mean squared error."""
        output = predict(self.network, self.objective.mix(clean, noise, times), times, labels)
        return self._of_output(output, clean, noise, times)

    def _of_output(self, output: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        errors = (output - self.objective.target(clean, noise, times)).square().flatten(1).mean(dim=1)  # (B,)
        return (self.objective.weight(times) * errors).mean(), errors.mean()


class MinimaxLoss(DenoiserLoss):
    """The same, with the minimax criteria of the clean latents that the network predicts (arXiv 2311.15529, section 3)."""

    def __init__(self, network: nn.Module, objective: Objective, criteria: MinimaxCriteria, config: MinimaxConfig) -> None:
        super().__init__(network, objective)
        self.criteria = criteria
        self.config = config

    def forward(
        self, clean: Tensor, noise: Tensor, times: Tensor, labels: Tensor, classes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `MinimaxStage.draw` gives them. Returns the weighted sum, the mean squared error and both criteria."""
        noisy = self.objective.mix(clean, noise, times)
        output = predict(self.network, noisy, times, labels)
        loss, error = self._of_output(output, clean, noise, times)
        representativeness, diversity = self.criteria(self.objective.clean(noisy, output, times), clean, classes)
        loss = loss + self.config.lambda_r * representativeness + self.config.lambda_d * diversity
        return loss, error, representativeness, diversity
