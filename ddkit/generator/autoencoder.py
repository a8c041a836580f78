"""The KL autoencoder between images and latents: building it, its training loss, encoding and decoding.

Squares of pixels become channels before the first convolution and turn back after the last one, which avoids the
costly convolutions at full size. The size of the squares follows from the number of channels, so a saved autoencoder is
an ordinary `diffusers.AutoencoderKL` folder.
"""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from ddkit.data.images import resize
from ddkit.generator.config import AutoencoderConfig

_STARTING_LOG_VARIANCE = -5.0
_MOST_AT_ONCE = 256  # images; more are not faster, and batches of samples are multiples of it
_BYTES_AT_ONCE = 2**30  # of the widest feature maps


def build_autoencoder(config: AutoencoderConfig, image_size: int, *, seed: int) -> AutoencoderKL:
    """An untrained autoencoder for (N, 3, image_size, image_size); its weights depend on `seed` alone."""
    config.latent_shape(image_size)
    levels = len(config.channels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # which leaves those of GPUs alone
        autoencoder = AutoencoderKL(
            in_channels=3 * config.pixel_patch**2,
            out_channels=3 * config.pixel_patch**2,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.channels,
            layers_per_block=config.layers_per_level,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            mid_block_add_attention=False,
            sample_size=image_size // config.pixel_patch,
        )
    with torch.no_grad():
        # Residual branches of zero and nearly no noise in the latents make the map almost linear at first.
        for module in autoencoder.modules():
            if type(module).__name__ == "ResnetBlock2D":
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()
        autoencoder.quant_conv.weight[config.latent_channels :].zero_()
        autoencoder.quant_conv.bias[config.latent_channels :].fill_(_STARTING_LOG_VARIANCE)
    return autoencoder


def pixel_patch(autoencoder: AutoencoderKL) -> int:
    """The side of the squares of pixels that the autoencoder takes as channels; 1 for most pretrained ones."""
    return math.isqrt(autoencoder.config.in_channels // 3)


def pixels_per_latent(autoencoder: AutoencoderKL) -> int:
    """The image side divided by the latent side."""
    return pixel_patch(autoencoder) * 2 ** (len(autoencoder.config.block_out_channels) - 1)


def images_at_once(autoencoder: AutoencoderKL, latent_side: int) -> int:
    """The number of images to encode or decode together, so that memory stays bounded whatever their size."""
    levels = autoencoder.config.block_out_channels
    side = latent_side * 2 ** (len(levels) - 1)  # of the first and last feature maps, which are the largest
    return max(1, min(_MOST_AT_ONCE, _BYTES_AT_ONCE // (4 * levels[0] * side**2)))


def encode(autoencoder: AutoencoderKL, pixels: Tensor, latent_side: int) -> Tensor:
    """(N, 3, S, S) in [-1, 1] -> (N, C, s, s), s = latent_side: means of the posterior, not scaled.

    Images of another size than the latent side requires are resized first, which pretrained autoencoders may need.
    """
    pixels = resize(pixels, latent_side * pixels_per_latent(autoencoder))
    return autoencoder.encode(F.pixel_unshuffle(pixels, pixel_patch(autoencoder))).latent_dist.mean


def decode(autoencoder: AutoencoderKL, latents: Tensor, image_size: int) -> Tensor:
    """(N, C, s, s), not scaled -> (N, 3, S, S) around [-1, 1], S = image_size; the inverse of `encode`."""
    pixels = F.pixel_shuffle(autoencoder.decode(latents).sample, pixel_patch(autoencoder))
    return resize(pixels.float(), image_size)  # on a CPU PyTorch resizes no bfloat16


def to_signed(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], the autoencoder's range (not the protocol's normalization)."""
    return images.float() / 127.5 - 1


class AutoencoderLoss(nn.Module):
    """The loss of a batch: the mean absolute and the mean squared error of the pixels, and a small KL term.

    The squared error alone blurs, and the absolute error alone converges slowly.
    """

    def __init__(self, network: AutoencoderKL, kl_weight: float) -> None:
        super().__init__()
        self.network = network
        self.kl_weight = kl_weight

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """pixels: (N, 3, S, S) in [-1, 1]. noise: (N, C, s, s), standard normal.

        Returns the loss and the mean squared error, both scalars.
        """
        posterior = self.network.encode(F.pixel_unshuffle(pixels, pixel_patch(self.network))).latent_dist
        decoded = decode(self.network, posterior.mean + posterior.std * noise, pixels.shape[-1])
        squared = F.mse_loss(decoded, pixels)
        # Kingma & Welling 2013, appendix B, as a mean over latents, so that one weight suits every image size.
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return F.l1_loss(decoded, pixels) + squared + self.kl_weight * kl, squared
