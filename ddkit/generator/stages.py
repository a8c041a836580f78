"""The two stages of training the generator: the autoencoder on pixels, the denoiser on its latents."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ddkit.data.store import ImageSet
from ddkit.generator.autoencoder import AutoencoderLoss, to_signed
from ddkit.generator.latents import LatentSet
from ddkit.generator.networks import null_class, predict
from ddkit.generator.objective import Objective
from ddkit.generator.presets import GeneratorConfig, to_json
from ddkit.generator.seeds import Shuffling, generator_for


class AutoencoderStage:
    """Reconstruct images. The recorded figure is the mean squared error of pixels in [-1, 1]."""

    name = "autoencoder"
    task = "Training the autoencoder"
    figure = "mse"

    def __init__(self, config: GeneratorConfig, network: AutoencoderKL, images: ImageSet) -> None:
        self.network = network.to(memory_format=torch.channels_last)
        self.loss = AutoencoderLoss(self.network, config.kl_weight)
        self.optimiser = config.autoencoder_optimiser
        self.ema_width = config.ema_width
        self.config: Mapping[str, object] = {
            "autoencoder": to_json(config.autoencoder),
            "kl_weight": config.kl_weight,
            "seed": config.seed,
            "flips": config.flips,
        }
        self._images = images
        self._flips = config.flips
        self._seed = config.seed
        self._latent_shape = config.autoencoder.latent_shape(images.images.shape[-1])
        self._order = Shuffling(len(images), config.seed)

    def draw(self, step: int, device: torch.device) -> dict[str, Tensor]:
        """pixels (B, 3, S, S) float32 in [-1, 1]; noise (B, C, s, s) float32."""
        count = self.optimiser.batch_size
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
    figure = "mse"

    def __init__(self, config: GeneratorConfig, network: nn.Module, latents: LatentSet) -> None:
        self.network = network
        self.objective = Objective(config.objective)
        self.loss = DenoiserLoss(network, self.objective)
        self.optimiser = config.denoiser_optimiser
        self.ema_width = config.ema_width
        self.config: Mapping[str, object] = {
            "denoiser": to_json(config.denoiser),
            "objective": to_json(config.objective),
            "optimiser": {name: value for name, value in to_json(self.optimiser).items() if name != "steps"},
            "ema_width": config.ema_width,
            "pretrained_autoencoder": config.pretrained_autoencoder,
            "seed": config.seed,
            "flips": config.flips,
        }
        self._latents = latents
        self._seed = config.seed
        self._null_class = null_class(network)
        self._dropout = config.objective.label_dropout
        self._order = Shuffling(len(latents), config.seed)

    def draw(self, step: int, device: torch.device) -> dict[str, Tensor]:
        """clean, noise (B, C, s, s) float32, scaled; times (B,) float32 in [0, 1000]; labels (B,) int64."""
        count = self.optimiser.batch_size
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


class DenoiserLoss(nn.Module):
    """The weighted squared error of a batch."""

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network = network
        self.objective = objective

    def forward(self, clean: Tensor, noise: Tensor, times: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `DenoiserStage.draw` gives them. Returns the weighted and the unweighted mean squared error."""
        output = predict(self.network, self.objective.mix(clean, noise, times), times, labels)
        errors = (output - self.objective.target(clean, noise, times)).square().flatten(1).mean(dim=1)  # (B,)
        return (self.objective.weight(times) * errors).mean(), errors.mean()
