"""diffusers' samplers by name, and what their steps amount to: fixed linear combinations of noise and network outputs.

Each of these samplers computes its next point as a combination of the points and outputs before, with coefficients
that do not depend on the images. `linear_plan` finds the coefficients by letting the scheduler work on symbols
instead of images: vectors of coefficients. So sampling needs none of the scheduler's bookkeeping at run time,
and agrees with diffusers by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ddkit.errors import UsageError, did_you_mean
from ddkit.generator.objective import BETA_SCHEDULES, TIME_SCALE

SAMPLERS = ("ddim", "dpm++", "unipc", "euler")

_PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}


@dataclass(frozen=True)
class LinearPlan:
    """A sampler of n steps as numbers.

    times: (n,) float32, what the network is told at each step.
    inputs: (n, n + 1) float32; row i makes the network's input of step i from [noise, output 0, ..., output n - 1].
    final: (n + 1,) float32; makes the clean latents from them.
    """

    times: Tensor
    inputs: Tensor
    final: Tensor

    @property
    def steps(self) -> int:
        return len(self.times)


def make_scheduler(sampler: str, prediction: str) -> SchedulerMixin:
    """diffusers' scheduler of that name for a network with that prediction.

    DDIM takes Euler's steps along the probability flow, so both names give the same: on a flow as
    `FlowMatchEulerDiscreteScheduler`, else as `DDIMScheduler`. Raises UsageError, offering the nearest name.
    """
    if sampler not in SAMPLERS:
        raise UsageError(f"There is no sampler '{sampler}'.", did_you_mean(sampler, SAMPLERS))
    if prediction == "flow" and sampler in ("ddim", "euler"):
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIME_SCALE)
    common = {
        "num_train_timesteps": TIME_SCALE,
        "beta_schedule": BETA_SCHEDULES[prediction],
        "prediction_type": _PREDICTION_TYPES[prediction],
        # Begin at the noisiest step, as training saw it (Lin et al. 2023, arXiv 2305.08891, section 3.3).
        "timestep_spacing": "trailing",
    }
    if sampler in ("ddim", "euler"):
        return DDIMScheduler(**common, clip_sample=False)
    kind = DPMSolverMultistepScheduler if sampler == "dpm++" else UniPCMultistepScheduler
    return kind(**common, use_flow_sigmas=prediction == "flow", final_sigmas_type="zero")


def linear_plan(scheduler: SchedulerMixin, steps: int) -> LinearPlan:
    """The coefficients of a deterministic scheduler of `steps` steps.

    Raises UsageError unless they are 1 to TIME_SCALE, and for more than a sampler can tell apart.
    """
    if not 1 <= steps <= TIME_SCALE:
        raise UsageError(f"Sampling takes 1 to {TIME_SCALE} steps, not {steps}.")
    set_steps(scheduler, steps)
    times = scheduler.timesteps
    # Symbol 0 is the noise, symbol 1 + i the output of step i; some schedulers insist on image-like dimensions.
    symbols = torch.eye(len(times) + 1, dtype=torch.float64).reshape(len(times) + 1, 1, -1, 1, 1)
    point = symbols[0]
    inputs = []
    for i, time in enumerate(times):
        inputs.append(point)
        try:
            point = scheduler.step(symbols[1 + i], time, point, return_dict=False)[0].double()
        except AssertionError as error:  # UniPC's, where two steps have come to lie on one time
            raise UsageError(f"{type(scheduler).__name__} cannot take as many as {steps} steps.", "Ask for fewer.") from error
    return LinearPlan(times.float(), torch.stack(inputs).flatten(1).float(), point.flatten().float())


def set_steps(scheduler: SchedulerMixin, steps: int) -> None:
    """Give a scheduler its steps; Euler's for flows spaced evenly, where diffusers would end with one of almost no length."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    else:
        scheduler.set_timesteps(steps)
