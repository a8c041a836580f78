"""diffusers' samplers by name."""

from __future__ import annotations

from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ddkit.errors import UsageError
from ddkit.generator.linear_plan import LinearPlan, linear_plan
from ddkit.generator.objective import BETA_SCHEDULES, TIME_SCALE

_PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}


def make_scheduler(sampler: str, prediction: str) -> SchedulerMixin:
    """diffusers' scheduler for a sampler, one of SAMPLERS, and a network with that prediction.

    On a flow "ddim" is Euler's method (`FlowMatchEulerDiscreteScheduler`), which takes the same steps. Else it is the first
    order of DPM-Solver++, which is DDIM (Lu et al. 2022, arXiv 2211.01095): diffusers' `DDIMScheduler` takes steps that are too
    short where their number does not divide 1,000, and leaves noise in the images.
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
    common |= {"use_flow_sigmas": prediction == "flow", "final_sigmas_type": "zero"}
    if sampler == "unipc":
        return UniPCMultistepScheduler(**common)
    return DPMSolverMultistepScheduler(**common, solver_order=1 if sampler == "ddim" else 2)


def make_plan(sampler: str, prediction: str, steps: int, *, mode_guidance: float = 0.0, shifts: bool = False) -> LinearPlan:
    """`linear_plan` of the sampler of that name for a network with that prediction.

    Raises UsageError for more steps than the sampler can distinguish.
    """
    scheduler = make_scheduler(sampler, prediction)
    try:
        return linear_plan(scheduler, steps, mode_guidance=mode_guidance, shifts=shifts)
    except AssertionError as error:  # UniPC raises it when two steps fall on one time
        raise UsageError(f"{type(scheduler).__name__} cannot take as many as {steps} steps.", "Ask for fewer.") from error
