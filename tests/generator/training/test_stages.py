"""What a step trains on: mirrored and scaled images, dropped labels, and the weights of the errors."""

import dataclasses

import pytest
import torch
from torch import nn

from ddkit.data.store import ImageSet
from ddkit.generator.autoencoder import build_autoencoder, to_signed
from ddkit.generator.config import ObjectiveConfig
from ddkit.generator.networks import build_denoiser
from ddkit.generator.objective import Objective
from ddkit.generator.training.latents import LatentSet
from ddkit.generator.training.stages import AutoencoderStage, DenoiserLoss, DenoiserStage

CPU, COUNT = torch.device("cpu"), 600


def of_many(config, **changes):
    """The configuration with batches in which shares can be told."""
    optimizers = ("autoencoder_optimizer", "denoiser_optimizer")
    large = {name: dataclasses.replace(getattr(config, name), batch_size=COUNT) for name in optimizers}
    return dataclasses.replace(config, **large, **changes)


@pytest.mark.parametrize(("flips", "mirrored"), [(True, 0.5), (False, 0.0)])
def test_half_of_the_images_are_mirrored_if_asked_for(config, flips, mirrored):
    slope = torch.arange(16, dtype=torch.uint8).expand(1, 3, 16, 16)  # darker on the left
    images = ImageSet(slope, torch.zeros(1, dtype=torch.int64), ("slope",))
    config = of_many(config, flips=flips)
    pixels = AutoencoderStage(config, build_autoencoder(config.autoencoder, 16, seed=0), images).draw(0, CPU)["pixels"]
    as_they_are = (pixels == to_signed(slope)).flatten(1).all(dim=1)
    assert (as_they_are | (pixels == to_signed(slope).flip(-1)).flatten(1).all(dim=1)).all()
    assert as_they_are.float().mean().item() == pytest.approx(1 - mirrored, abs=0.1)


def test_denoiser_sees_scaled_latents_of_both_views_and_few_labels_dropped(config):
    config = of_many(config)
    views = torch.tensor([2.0, 6.0]).view(1, 2, 1, 1, 1).expand(3, 2, 2, 4, 4).half()
    latents = LatentSet(views, torch.arange(3), std=2.0)
    stage = DenoiserStage(config, build_denoiser(config.denoiser, (2, 4, 4), 3, seed=0), latents)
    batch = stage.draw(5, CPU)
    shares = [(batch["clean"] == value).flatten(1).all(dim=1).float().mean().item() for value in (1.0, 3.0)]
    assert sum(shares) == pytest.approx(1) and shares[0] == pytest.approx(0.5, abs=0.1)
    counts = torch.bincount(batch["labels"], minlength=4) / COUNT
    assert counts.tolist() == pytest.approx([0.3, 0.3, 0.3, 0.1], abs=0.06), "the last label is the null class"
    halves = [times.mean().item() for times in batch["times"].split(COUNT // 2)]
    assert halves == pytest.approx([500, 500], abs=60), "every part of a batch has all noise levels"
    assert all(torch.equal(value, batch[name]) for name, value in stage.draw(5, CPU).items())


class Silent(nn.Module):
    """Predicts zeros."""

    def forward(self, noisy, timestep, class_labels):
        return torch.zeros_like(noisy)


def test_loss_of_each_image_has_the_weight_of_its_noise_level():
    objective = Objective(ObjectiveConfig("v", min_snr_gamma=5.0))
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 2, 3, 3, generator=generator)
    times = torch.tensor([1.0, 200.0, 600.0, 950.0])
    loss, error = DenoiserLoss(Silent(), objective)(clean, noise, times, torch.zeros(4, dtype=torch.int64))
    errors = objective.target(clean, noise, times).square().mean(dim=(1, 2, 3))
    assert error.item() == pytest.approx(errors.mean().item())
    assert loss.item() == pytest.approx((objective.weight(times) * errors).mean().item())
    assert loss.item() != pytest.approx(error.item(), rel=0.1)
