"""The samplers as numbers agree with diffusers taking the same steps."""

import pytest
import torch

from ddkit.errors import UsageError
from ddkit.generator.config import PREDICTIONS, SAMPLERS, ObjectiveConfig
from ddkit.generator.linear_plan import set_steps
from ddkit.generator.objective import Objective
from ddkit.generator.samplers import make_plan, make_scheduler


def network(noisy, time):
    """Any function that is not linear will do."""
    return torch.tanh(noisy * (1 + time / 1000)) - 0.1 * noisy


def by_diffusers(sampler, prediction, steps, noise):
    scheduler = make_scheduler(sampler, prediction)
    set_steps(scheduler, steps)
    point = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
    for time in scheduler.timesteps:
        point = scheduler.step(network(point, time), time, point, return_dict=False)[0]
    return point


def by_plan(plan, noise):
    known = [noise]
    for i, time in enumerate(plan.times):
        known.append(network(torch.tensordot(plan.inputs[i, : i + 1], torch.stack(known), dims=1), time))
    return torch.tensordot(plan.final, torch.stack(known), dims=1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_linear_plan_agrees_with_diffusers(sampler, prediction, steps):
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    plan = make_plan(sampler, prediction, steps)
    expected = by_diffusers(sampler, prediction, steps, noise)
    assert len(plan.times) == steps
    assert torch.allclose(by_plan(plan, noise), expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_linear_plan_follows_a_straight_flow_exactly_in_any_number_of_steps(sampler):
    """If the network knows the one clean image, every sampler must end at it."""
    clean = torch.full((1, 1, 2, 2), 0.5)
    noise = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    for steps in (1, 4):
        plan = make_plan(sampler, "flow", steps)
        known = torch.stack([noise, *[noise - clean] * steps])
        assert torch.allclose(torch.tensordot(plan.final, known, dims=1), clean, atol=2e-3)


@pytest.mark.parametrize(
    ("sampler", "prediction"), [*((each, "epsilon") for each in SAMPLERS), ("unipc", "flow"), ("unipc", "v")]
)
def test_mode_guidance_in_many_steps_agrees_with_one_step_after_another(sampler, prediction):
    """The paper's 50 steps and its scale, and a network that knows that latents have a mean of 1 and a deviation of 0.5."""
    steps, scale, mode, objective = 50, 0.1, -0.5, Objective(ObjectiveConfig(prediction))

    def network(point, time):
        signal, spread = objective.levels(time.expand(len(point)), point)
        clean = 1 + 0.25 * signal / (0.25 * signal**2 + spread**2) * (point - signal)
        noise = (point - signal * clean) / spread
        return objective.target(clean, noise, time.expand(len(point)))

    noise = torch.randn(16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    scheduler, point = make_scheduler(sampler, prediction), noise.double()
    set_steps(scheduler, steps)
    scheduler.disable_corrector = range(steps // 2)  # of UniPC, as it would take back what is added
    for i, time in enumerate(scheduler.timesteps):
        output, times = network(point, time.float()), time.float().expand(len(point))
        added = scale * objective.levels(times, point)[1] * (mode - objective.clean(point, output, times))
        point = scheduler.step(output, time, point, return_dict=False)[0] + (added if i < steps / 2 else 0)

    plan, terms = make_plan(sampler, prediction, steps, mode_guidance=scale), [noise, torch.full_like(noise, mode)]
    for i, time in enumerate(plan.times):
        at = torch.tensordot(plan.inputs[i, : len(terms)], torch.stack(terms), dims=1)
        terms.append(plan.term(i, at, network(at, time)))
    torch.testing.assert_close(torch.tensordot(plan.final, torch.stack(terms), dims=1).double(), point, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_many_steps_of_any_number_reach_the_deviation_of_the_data(sampler, prediction):
    """The latents are normal with a deviation of 0.5, and the network knows that: what it makes of noise is then linear."""
    plan, objective = make_plan(sampler, prediction, 150), Objective(ObjectiveConfig(prediction))
    terms = [torch.ones(1, 1)]
    for i, time in enumerate(plan.times[:, None]):
        point = plan.inputs[i, : len(terms)] @ torch.cat(terms)
        signal, spread = objective.levels(time, point[:, None])
        clean = 0.25 * signal / (0.25 * signal**2 + spread**2) * point
        noise = (point - signal * clean) / spread
        terms.append(plan.term(i, point[:, None], objective.target(clean, noise, time)))
    assert float(plan.final @ torch.cat(terms)) == pytest.approx(0.5, abs=0.015)


def test_unipc_is_steered_to_the_mode_as_far_as_other_samplers():
    shares = [make_plan(sampler, "flow", 10, mode_guidance=0.5).final[1] for sampler in SAMPLERS]
    assert max(shares) - min(shares) < 0.05


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.slow
def test_very_many_steps_make_a_finite_plan_or_raise_usage_error(sampler, prediction):
    try:
        plan = make_plan(sampler, prediction, 999)
    except UsageError as error:
        assert (sampler, prediction) == ("unipc", "flow") and "cannot take as many as 999 steps" in error.message
    else:
        assert plan.inputs.isfinite().all() and plan.final.isfinite().all()
