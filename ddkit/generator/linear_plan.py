"""The steps of a deterministic sampler as fixed linear combinations. This file imports only torch and diffusers.

It must stay so: the stand-alone track 2 entry bundles this very file.

diffusers' deterministic samplers compute the next point as a combination of earlier points and network outputs, with
coefficients that do not depend on the images. `linear_plan` finds the coefficients by running the scheduler on unit vectors
instead of images. Sampling therefore needs no bookkeeping by the scheduler, and agrees with diffusers by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

_MODE_GUIDED = 0.5  # of the steps, from the first on (arXiv 2505.18963, section 4.2: t_stop)


@dataclass(frozen=True)
class LinearPlan:
    """A sampler of n steps as numbers.

    Terms are the noise, with mode guidance the mode, then the network's output of step 0, 1, ...; with shifts, each output is
    followed by what is added to the point after that step. Their number is m.
    times: (n,) float32, the time that the network is given at each step.
    inputs: (n, m) float32; row i makes the network's input of step i from the terms.
    final: (m,) float32; makes the clean latents from the terms.
    """

    times: Tensor
    inputs: Tensor
    final: Tensor


def linear_plan(scheduler: SchedulerMixin, steps: int, *, mode_guidance: float = 0.0, shifts: bool = False) -> LinearPlan:
    """The coefficients of a deterministic scheduler of `steps` steps.

    mode_guidance: lambda; after each step of the first half, lambda * sigma_t * (mode - predicted clean latents) is added to
    the point, where sigma_t is the noise level (Chan-Santiago et al. 2025, arXiv 2505.18963, section 4.2).
    shifts: something else is added to the point after every step, as influence guidance does.
    """
    set_steps(scheduler, steps)
    times = scheduler.timesteps
    first, per_step = 1 + (mode_guidance > 0), 1 + shifts
    count = first + per_step * len(times)
    # Each term is a unit vector; some schedulers require image-like dimensions.
    terms = torch.eye(count, dtype=torch.float64).reshape(count, 1, -1, 1, 1)
    point = terms[0]
    inputs = []
    for i, time in enumerate(times):
        inputs.append(point)
        output = terms[first + per_step * i]
        after = scheduler.step(output, time, point, return_dict=False)[0].double()
        if mode_guidance and i < _MODE_GUIDED * len(times):
            clean, sigma = _clean(scheduler, point, output, time)
            after = after + mode_guidance * sigma * (terms[1] - clean)
        point = after + terms[first + 1 + per_step * i] if shifts else after
    return LinearPlan(times.float(), torch.stack(inputs).flatten(1).float(), point.flatten().float())


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


def _clean(scheduler: SchedulerMixin, point: Tensor, output: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The clean latents that an output for a point implies, and the noise level of the time."""
    prediction = getattr(scheduler.config, "prediction_type", "flow_prediction")  # Euler's method is for flows alone
    if prediction == "flow_prediction":
        sigma = time.float() / scheduler.config.num_train_timesteps
        return point - sigma * output, sigma
    power = scheduler.alphas_cumprod[time.long()]
    signal, sigma = power.sqrt(), (1 - power).sqrt()
    if prediction == "epsilon":
        return (point - sigma * output) / signal, sigma
    return signal * point - sigma * output, sigma
