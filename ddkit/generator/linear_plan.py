"""The steps of a deterministic sampler as fixed linear combinations. This file imports only torch and diffusers.

It must stay so: the stand-alone track 2 entry bundles this very file.

diffusers' deterministic samplers compute the next point as a combination of earlier points and network outputs, with
coefficients that do not depend on the images. `linear_plan` finds the coefficients by running the scheduler on unit vectors
instead of images. Sampling therefore needs no bookkeeping by the scheduler, and agrees with diffusers by construction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

_MODE_GUIDED = 0.5  # of the steps, from the first on (arXiv 2505.18963, section 4.2: t_stop)


@dataclass(frozen=True)
class LinearPlan:
    """A sampler of n steps as numbers.

    Terms are the noise, with mode guidance the mode, then what `term` makes of the network's output of step 0, 1, ...; with
    shifts, each of these is followed by what is added to the point after that step. Their number is m.
    times: (n,) float32, the time that the network is given at each step.
    inputs: (n, m) float32; row i makes the network's input of step i from the terms.
    final: (m,) float32; makes the clean latents from the terms.
    clean: for each step the coefficients of the network's input and output in its term; empty if the term is the output.
    """

    times: Tensor
    inputs: Tensor
    final: Tensor
    clean: tuple[tuple[float, float], ...] = ()

    def term(self, step: int, point: Tensor, output: Tensor) -> Tensor:
        """The term of a step from the network's input and output: the output itself, or the clean latents that it implies."""
        if not self.clean:
            return output
        of_point, of_output = self.clean[step]
        return of_point * point + of_output * output


def linear_plan(scheduler: SchedulerMixin, steps: int, *, mode_guidance: float = 0.0, shifts: bool = False) -> LinearPlan:
    """The coefficients of a deterministic scheduler of `steps` steps.

    mode_guidance: lambda; after each step of the first half, lambda * sigma_t * (mode - predicted clean latents) is added to
    the point (Chan-Santiago et al. 2025, arXiv 2505.18963, section 4.2). sigma_t is the noise level here; the authors' sampler,
    DDPM, has the deviation of the noise that it adds in the step, which a deterministic one does not have.
    shifts: something else is added to the point after every step, as influence guidance does.
    """
    set_steps(scheduler, steps)
    times = scheduler.timesteps
    guided = math.ceil(_MODE_GUIDED * len(times)) if mode_guidance else 0
    if isinstance(scheduler, UniPCMultistepScheduler):
        # The corrector begins again from the point before a step, and would lose what is added after it.
        scheduler.disable_corrector = list(range(len(times) if shifts else guided))
    first, per_step = 1 + (mode_guidance > 0), 1 + shifts
    count = first + per_step * len(times)
    # Each term is a unit vector; some schedulers require image-like dimensions.
    terms = torch.eye(count, dtype=torch.float64).reshape(count, 1, -1, 1, 1)
    point = terms[0]
    inputs, clean = [], []
    for i, time in enumerate(times):
        inputs.append(point)
        output = terms[first + per_step * i]
        if guided and _prediction(scheduler) == "epsilon":
            # In terms of the noise predictions, each guided step would multiply the coefficients by up to a hundred, and their
            # sum in float32 would be rounding errors alone.
            signal, sigma = _levels(scheduler, time)
            clean.append((float(1 / signal), float(-sigma / signal)))
            output = (point - signal * output) / sigma
        after = scheduler.step(output, time, point, return_dict=False)[0].double()
        if i < guided:
            after = after + mode_guidance * _levels(scheduler, time)[1] * (terms[1] - _clean(scheduler, point, output, time))
        point = after + terms[first + 1 + per_step * i] if shifts else after
    return LinearPlan(times.float(), torch.stack(inputs).flatten(1).float(), point.flatten().float(), tuple(clean))


def set_steps(scheduler: SchedulerMixin, steps: int) -> None:
    """Set a scheduler's steps. Euler's method for flows gets evenly spaced ones; diffusers would make the last one tiny."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    else:
        scheduler.set_timesteps(steps)


def weighted_sum(coefficients: Tensor, terms: Tensor) -> Tensor:
    """The combination of (k, n, C, s, s) by (k,) coefficients, in float32 even under autocast.

    Coefficients can be a hundred times as large as the sum, so a matrix product is avoided: a GPU may compute it in TF32.
    """
    return (coefficients.view(-1, 1, 1, 1, 1) * terms).sum(dim=0)


def _prediction(scheduler: SchedulerMixin) -> str:
    return getattr(scheduler.config, "prediction_type", "flow_prediction")  # Euler's method is for flows alone


def _levels(scheduler: SchedulerMixin, time: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of clean latents and of noise in the latents of a time."""
    if _prediction(scheduler) == "flow_prediction":
        sigma = time.float() / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma
    power = scheduler.alphas_cumprod[time.long()]
    return power.sqrt(), (1 - power).sqrt()


def _clean(scheduler: SchedulerMixin, point: Tensor, output: Tensor, time: Tensor) -> Tensor:
    """The clean latents that an output for a point implies."""
    signal, sigma = _levels(scheduler, time)
    if _prediction(scheduler) == "flow_prediction":
        return point - sigma * output
    if _prediction(scheduler) == "epsilon":
        return (point - sigma * output) / signal
    return signal * point - sigma * output
