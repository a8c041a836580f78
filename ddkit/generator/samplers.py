"""diffusers' samplers by name."""

from __future__ import annotations

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ddkit.errors import UsageError
from ddkit.generator.linear_plan import LinearPlan, linear_plan
from ddkit.generator.objective import BETA_SCHEDULES, TIME_SCALE

_PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}


def make_scheduler(sampler: str, prediction: str) -> SchedulerMixin:
    """diffusers' scheduler for a sampler, one of SAMPLERS, and a network with that prediction.

    On a flow "ddim" is Euler's method (`FlowMatchEulerDiscreteScheduler`), which takes the same steps.
    """
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


def make_plan(sampler: str, prediction: str, steps: int, *, mode_guidance: float = 0.0, shifts: bool = False) -> LinearPlan:
    """`linear_plan` of the sampler of that name for a network with that prediction.

    Raises UsageError for more steps than the sampler can distinguish.
    """
    scheduler = make_scheduler(sampler, prediction)
    try:
        return linear_plan(scheduler, steps, mode_guidance=mode_guidance, shifts=shifts)
    except AssertionError as error:  # UniPC raises it when two steps fall on one time
        raise UsageError(f"{type(scheduler).__name__} cannot take as many as {steps} steps.", "Ask for fewer.") from error
