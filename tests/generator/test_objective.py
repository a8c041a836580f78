"""Mixing, targets and weights against their definitions, and the way back from a perfect answer."""

import pytest
import torch
from diffusers import DDIMScheduler

from ddkit.generator.config import PREDICTIONS, ObjectiveConfig
from ddkit.generator.objective import BETA_SCHEDULES, Objective


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 2, 3, 3, generator=generator), torch.randn(4, 2, 3, 3, generator=generator)


TIMES = torch.tensor([1.0, 200.0, 600.0, 950.0])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perfect_prediction_implies_the_clean_latents(pair, prediction):
    clean, noise = pair
    objective = Objective(ObjectiveConfig(prediction=prediction))
    answer = objective.target(clean, noise, TIMES)
    assert torch.allclose(objective.clean(objective.mix(clean, noise, TIMES), answer, TIMES), clean, atol=1e-3)


def test_flow_mixes_on_a_straight_line(pair):
    clean, noise = pair
    objective = Objective(ObjectiveConfig(prediction="flow"))
    assert torch.allclose(objective.mix(clean, noise, TIMES)[1], 0.8 * clean[1] + 0.2 * noise[1])
    assert torch.equal(objective.target(clean, noise, TIMES), noise - clean)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_epsilon_and_v_mix_as_diffusers_does(pair, prediction):
    clean, noise = pair
    scheduler = DDIMScheduler(beta_schedule=BETA_SCHEDULES[prediction])
    objective = Objective(ObjectiveConfig(prediction=prediction))
    assert torch.allclose(objective.mix(clean, noise, TIMES), scheduler.add_noise(clean, noise, TIMES.long()), atol=1e-6)
    if prediction == "v":
        velocity = scheduler.get_velocity(clean, noise, TIMES.long())
        assert torch.allclose(objective.target(clean, noise, TIMES), velocity, atol=1e-6)


@pytest.mark.parametrize(("prediction", "offset"), [("epsilon", 0), ("v", 1)])
def test_min_snr_weights_follow_the_paper(prediction, offset):
    objective = Objective(ObjectiveConfig(prediction=prediction, min_snr_gamma=5.0))
    kept = DDIMScheduler(beta_schedule=BETA_SCHEDULES[prediction]).alphas_cumprod[TIMES.long()]
    snr = kept / (1 - kept)
    assert torch.allclose(objective.weight(TIMES), snr.clamp(max=5.0) / (snr + offset), rtol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_without_min_snr_are_equal(prediction):
    objective = Objective(ObjectiveConfig(prediction=prediction, min_snr_gamma=None))
    assert torch.equal(objective.weight(TIMES), torch.ones_like(TIMES))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_times_follow_their_distribution_and_their_generator(prediction):
    objective = Objective(ObjectiveConfig(prediction=prediction))
    times = objective.draw_times(4000, torch.Generator().manual_seed(3))
    assert torch.equal(times, objective.draw_times(4000, torch.Generator().manual_seed(3)))
    assert 0 <= times.min() and times.max() <= 1000
    quartiles = torch.quantile(times, torch.tensor([0.25, 0.5, 0.75]))
    # Of a logistic-normal: sigmoid(-0.6745), one half, sigmoid(0.6745).
    expected = [337.5, 500, 662.5] if prediction == "flow" else [250, 500, 750]
    assert quartiles.tolist() == pytest.approx(expected, abs=2)
    if prediction != "flow":
        assert torch.equal(times, times.floor())
