"""The training objectives: noisy latents, the target to predict, and the clean latents that a prediction implies.

All objectives mix as z_t = a(t) z_0 + s(t) noise and differ in a, s and the target:
"flow" has a = 1 - t, s = t (Liu et al. 2022, arXiv 2209.03003); "epsilon" and "v" have a^2 + s^2 = 1 in 1,000 steps,
as diffusers' schedulers compute them from the betas.
"""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ddkit.generator.config import ObjectiveConfig

TIME_SCALE = 1000  # the denoiser sees times on the scale 0 to 1000, as diffusers' schedulers give them
BETA_SCHEDULES = {
    # The cosine schedule (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 17) ends in pure noise. A prediction of that
    # noise says nothing about the clean image, so "epsilon" takes the linear schedule (Ho et al. 2020), which stops before.
    "epsilon": "linear",
    "v": "squaredcos_cap_v2",
    "flow": "linear",  # unused, but diffusers' schedulers require one
}


class Objective:
    """The mixing, the targets and the weights of one ObjectiveConfig. `times` are (N,) float32 in [0, 1000]."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        scheduler = DDPMScheduler(num_train_timesteps=TIME_SCALE, beta_schedule=BETA_SCHEDULES[config.prediction])
        self._signal_power: Tensor = scheduler.alphas_cumprod  # (1000,), a(t)^2

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) float32 on the generator's device, spread evenly over the distribution.

        One random shift of an even grid, which makes the batch's loss less noisy (Kingma et al. 2021, appendix I.1).
        """
        device = generator.device
        shift = torch.rand((), generator=generator, device=device)
        even = (torch.arange(count, device=device) / count + shift) % 1
        if self.config.prediction != "flow":
            return (even * TIME_SCALE).floor().clamp(max=TIME_SCALE - 1)
        even = even.clamp(1e-4, 1 - 1e-4)
        # Apple's GPUs do not have this function.
        normal = torch.special.ndtri(even.cpu()).to(device) if device.type == "mps" else torch.special.ndtri(even)
        return torch.sigmoid(self.config.time_mean + self.config.time_std * normal) * TIME_SCALE

    def mix(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Noisy latents z_t. clean, noise: (N, ...) of the same shape."""
        signal, spread = self.levels(times, clean)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The tensor that the denoiser's output is compared with. clean, noise: (N, ...) of the same shape.

        It is the noise, for "v" a(t) noise - s(t) z_0 (Salimans & Ho 2022, arXiv 2202.00512), and for "flow" noise - z_0.
        """
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "flow":
            return noise - clean
        signal, spread = self.levels(times, clean)
        return signal * noise - spread * clean

    def clean(self, noisy: Tensor, output: Tensor, times: Tensor) -> Tensor:
        """The prediction of z_0 that a denoiser's output for z_t implies. noisy, output: (N, ...) of the same shape."""
        signal, spread = self.levels(times, noisy)
        if self.config.prediction == "epsilon":
            return (noisy - spread * output) / signal
        if self.config.prediction == "flow":
            return noisy - spread * output
        return signal * noisy - spread * output

    def weight(self, times: Tensor) -> Tensor:
        """(N,) weights of the squared error: min-SNR for epsilon and v (arXiv 2303.09556, section 3.4), else ones."""
        if self.config.prediction == "flow" or self.config.min_snr_gamma is None:
            return torch.ones_like(times)
        signal, spread = self.levels(times, times)
        snr = (signal / spread) ** 2
        clipped = snr.clamp(max=self.config.min_snr_gamma)
        return clipped / snr if self.config.prediction == "epsilon" else clipped / (snr + 1)

    def levels(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a(t) and s(t), shaped to multiply `like`."""
        if self.config.prediction == "flow":
            spread = times / TIME_SCALE
            signal = 1 - spread
        else:
            if self._signal_power.device != times.device:
                self._signal_power = self._signal_power.to(times.device)  # once, as every copy makes the host wait
            power = self._signal_power[times.long()]
            signal, spread = power.sqrt(), (1 - power).sqrt()
        shape = (-1, *[1] * (like.ndim - 1))
        return signal.view(shape), spread.view(shape)
