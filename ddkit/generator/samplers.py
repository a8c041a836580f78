"""diffusers' samplers by name, and their steps as fixed linear combinations of noise and network outputs.

Each of these samplers computes its next point as a combination of earlier points and outputs, with coefficients that do
not depend on the images. `linear_plan` finds the coefficients by running the scheduler on unit vectors instead of
images. Sampling therefore needs no bookkeeping by the scheduler, and agrees with diffusers by construction.
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
from ddkit.generator.config import SAMPLERS
from ddkit.generator.objective import BETA_SCHEDULES, TIME_SCALE, Objective

_MODE_GUIDED = 0.5  # of the steps, from the first on (arXiv 2505.18963, section 4.2: t_stop)
_PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}


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

    @property
    def steps(self) -> int:
        return len(self.times)


def make_scheduler(sampler: str, prediction: str) -> SchedulerMixin:
    """diffusers' scheduler of that name for a network with that prediction.

    On a flow "ddim" is Euler's method (`FlowMatchEulerDiscreteScheduler`), which takes the same steps.
    Raises UsageError that offers the nearest name.
    """
    if sampler not in SAMPLERS:
        raise UsageError(f"Unknown sampler '{sampler}'.", did_you_mean(sampler, SAMPLERS))
    if sampler == "ddim" and prediction == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIME_SCALE)
    common = {
        "num_train_timesteps": TIME_SCALE,
        "beta_schedule": BETA_SCHEDULES[prediction],
        "prediction_type": _PREDICTION_TYPES[prediction],
        # Begin at the noisiest step, as training saw it (Lin et al. 2023, arXiv 2305.08891, section 3.3).
        "timestep_spacing": "trailing",
    }
    if sampler == "ddim":
        return DDIMScheduler(**common, clip_sample=False)
    kind = DPMSolverMultistepScheduler if sampler == "dpm++" else UniPCMultistepScheduler
    return kind(**common, use_flow_sigmas=prediction == "flow", final_sigmas_type="zero")


def linear_plan(
    scheduler: SchedulerMixin,
    steps: int,
    *,
    mode_guidance: float = 0.0,
    objective: Objective | None = None,
    shifts: bool = False,
) -> LinearPlan:
    """The coefficients of a deterministic scheduler of `steps` steps.

    mode_guidance: lambda; after each step of the first half, lambda * sigma_t * (mode - predicted clean latents) is added to
    the point, where sigma_t is the noise level (Chan-Santiago et al. 2025, arXiv 2505.18963, section 4.2).
    objective: of the network, which mode guidance needs.
    shifts: something else is added to the point after every step, as influence guidance does.
    Raises UsageError unless `steps` is 1 to TIME_SCALE, and for more steps than the sampler can distinguish.
    """
    if not 1 <= steps <= TIME_SCALE:
        raise UsageError(f"Sampling takes 1 to {TIME_SCALE} steps, got {steps}.")
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
        try:
            after = scheduler.step(output, time, point, return_dict=False)[0].double()
        except AssertionError as error:  # UniPC raises it when two steps fall on one time
            raise UsageError(f"{type(scheduler).__name__} cannot take as many as {steps} steps.", "Ask for fewer.") from error
        if mode_guidance and i < _MODE_GUIDED * len(times):
            assert objective is not None
            at = time.float().view(1)
            _, sigma = objective.levels(at, point)
            after = after + mode_guidance * sigma * (terms[1] - objective.clean(point, output, at))
        point = after + terms[first + 1 + per_step * i] if shifts else after
    return LinearPlan(times.float(), torch.stack(inputs).flatten(1).float(), point.flatten().float())


def set_steps(scheduler: SchedulerMixin, steps: int) -> None:
    """Set a scheduler's steps. Euler's method for flows gets evenly spaced ones; diffusers would make the last one tiny."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    else:
        scheduler.set_timesteps(steps)
