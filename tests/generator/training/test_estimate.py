"""What a training will cost: counted parameters, memory that grows with the batch, and what would fit."""

import dataclasses

import pytest
import torch

from ddkit.errors import ComputeError
from ddkit.generator.autoencoder import build_autoencoder
from ddkit.generator.config import MinimaxConfig
from ddkit.generator.model_folder import save_model
from ddkit.generator.networks import build_denoiser
from ddkit.generator.presets import PRESETS
from ddkit.generator.pretrained import start_from
from ddkit.generator.training import estimate as module
from ddkit.generator.training.estimate import Estimate, StageEstimate, estimate, shortage

CPU = torch.device("cpu")


def check_memory(*subject, start=None):
    costs = estimate(*subject, seconds=0, start=start)
    if not costs.fits:
        raise shortage(costs, *subject)


def batches_of(config, size):
    optimizer = dataclasses.replace(config.denoiser_optimizer, batch_size=size)
    return dataclasses.replace(config, denoiser_optimizer=optimizer)


def test_parameters_are_those_of_the_networks(config):
    autoencoder, denoiser = estimate(config, 16, 3, CPU, seconds=0).stages
    counted = [sum(p.numel() for p in network.parameters()) for network in (
        build_autoencoder(config.autoencoder, 16, seed=0), build_denoiser(config.denoiser, (2, 4, 4), 3, seed=0)
    )]  # fmt: skip
    assert [autoencoder.parameters, denoiser.parameters] == counted
    assert autoencoder.images_per_second is None


def test_memory_is_states_and_activations_of_each_image(config):
    states = 6 * 4 * estimate(config, 16, 3, CPU, seconds=0).stages[1].parameters
    small, large = (estimate(batches_of(config, size), 16, 3, CPU, seconds=0).stages[1].memory for size in (8, 80))
    assert large - states == pytest.approx(10 * (small - states), rel=0.01)
    one = estimate(batches_of(config, 1), 16, 3, CPU, seconds=0).stages[1].memory
    assert one - states == pytest.approx((small - states) / 8, rel=0.1)


def test_cores_that_share_a_step_add_their_own_gradients(config):
    alone = estimate(batches_of(config, 8), 16, 3, CPU, seconds=0).stages[1]
    torch.set_num_threads(3)  # put back by the fixture that set one; eight images are shared by two of three
    shared = estimate(batches_of(config, 8), 16, 3, CPU, seconds=0).stages[1]
    assert shared.memory - alone.memory == 2 * 4 * alone.parameters


def test_memory_of_an_image_is_near_its_activations(config):
    """The hidden states alone, which every block keeps several times over, are a lower bound."""
    stage = estimate(batches_of(config, 100), 16, 3, CPU, seconds=0).stages[1]
    per_image = (stage.memory - 6 * 4 * stage.parameters) / 100
    hidden_state = (2 + 4) * 16 * 4  # tokens * hidden size * bytes
    assert 3 * 8 * hidden_state < per_image < 3 * 60 * hidden_state


def test_processes_and_accumulated_parts_divide_the_batch(config):
    whole = estimate(batches_of(config, 64), 16, 3, CPU, seconds=0).stages[1]
    shared = estimate(batches_of(config, 64), 16, 3, CPU, processes=4, seconds=0).stages[1]
    parts = dataclasses.replace(
        config, denoiser_optimizer=dataclasses.replace(config.denoiser_optimizer, batch_size=64, accumulation=4)
    )
    alone = estimate(parts, 16, 3, CPU, seconds=0).stages[1]
    assert whole.at_once == 64 and shared.at_once == alone.at_once == 16
    assert alone.memory < whole.memory
    assert shared.memory == alone.memory + 4 * alone.parameters  # gradients once more, to be sent around


def test_half_precision_keeps_less_of_an_image(config):
    full, half = (
        estimate(dataclasses.replace(batches_of(config, 64), precision=precision), 16, 3, CPU, seconds=0).stages[1]
        for precision in ("float32", "bfloat16")
    )
    assert half.memory - half.fixed_memory < full.memory - full.fixed_memory


def test_half_precision_weights_count_once_for_any_batch_size(config, monkeypatch):
    half = dataclasses.replace(batches_of(config, 64), precision="bfloat16")
    found = [estimate(half, 16, 3, CPU, seconds=0).stages[1]]
    monkeypatch.setattr(module, "_PROBE_BATCH", 16)
    found.append(estimate(half, 16, 3, CPU, seconds=0).stages[1])
    assert found[0].memory == pytest.approx(found[1].memory, rel=0.02)
    assert found[0].fixed_memory > estimate(batches_of(config, 64), 16, 3, CPU, seconds=0).stages[1].fixed_memory


def test_each_parameter_counts_with_its_gradient_moments_average_and_the_copy_that_averaging_makes(config):
    for stage in estimate(config, 16, 3, CPU, seconds=0).stages:
        assert 6 * 4 * stage.parameters <= stage.fixed_memory < 7 * 4 * stage.parameters


def test_fine_tuning_that_does_not_fit_raises_compute_error_with_a_remedy(config, monkeypatch, make_model, tmp_path):
    save_model(make_model(), tmp_path)
    tuned = dataclasses.replace(batches_of(config, 64), minimax=MinimaxConfig(init=str(tmp_path)))
    tuned = dataclasses.replace(tuned, denoiser_optimizer=dataclasses.replace(tuned.denoiser_optimizer, accumulation=4))
    start = start_from(tuned.minimax, ["red", "green", "blue"])
    (stage,) = estimate(tuned, 16, 3, CPU, seconds=0, start=start).stages
    monkeypatch.setattr(module, "free_memory", lambda device: (stage.memory + stage.fixed_memory) // 2)
    with pytest.raises(ComputeError) as caught:
        check_memory(tuned, 16, 3, CPU, start=start)
    fitting = int(caught.value.remedy.split()[1])
    assert caught.value.remedy == f"--batch-size {fitting} would fit." and 0 < fitting < 64 and fitting % 4 == 0
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    with pytest.raises(ComputeError, match="Leave out --full"):
        check_memory(tuned, 16, 3, CPU, start=start)


def test_stage_that_does_not_fit_is_not_run(config, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    costs = estimate(config, 16, 3, CPU, seconds=0.05)
    assert not costs.fits
    assert [(stage.images_per_second, stage.seconds_for(5)) for stage in costs.stages] == [(None, None)] * 2


def test_speed_is_measured_on_demand(config):
    autoencoder, denoiser = estimate(config, 16, 3, CPU, seconds=0.05).stages
    assert autoencoder.images_per_second > 0
    assert denoiser.seconds_for(denoiser.steps) == pytest.approx(6 * 6 / denoiser.images_per_second)


def test_steps_within_divide_the_time_like_a_training():
    def stage(name, steps, speed):
        return StageEstimate(name, 1, 10, 1, 1, speed, steps, batch_size=10)

    ours = Estimate((stage("autoencoder", 20, 10.0), stage("denoiser", 5, 5.0)), free_memory=100)
    assert ours.steps_within(100) == (15, 42)  # 15 of 100 s at a second a step, and 85 s at two seconds a step
    assert ours.steps_within(1000) == (20, 490)  # no more of the autoencoder's than its own
    assert ours.steps_within(0.1) == (1, 1)
    alone = Estimate((stage("minimax", 5, 5.0),), free_memory=100)
    assert alone.steps_within(100) == (50,)
    assert Estimate((stage("minimax", 5, None),), free_memory=100).steps_within(100) == (None,)


def test_least_seconds_give_each_stage_its_steps_within_its_share():
    def stage(name, steps, speed):
        return StageEstimate(name, 1, 10, 1, 1, speed, steps, batch_size=10)

    autoencoder, denoiser = stage("autoencoder", 200, 10.0), stage("denoiser", 500, 1.0)
    assert Estimate((autoencoder, denoiser), free_memory=100).least_seconds(17) == pytest.approx(170 / 0.85)
    faster = dataclasses.replace(denoiser, images_per_second=10.0)
    assert Estimate((autoencoder, faster), free_memory=100).least_seconds(15) == pytest.approx(100)
    assert Estimate((autoencoder, faster), free_memory=100).least_seconds(10**6) == pytest.approx(200 / 0.15)
    assert Estimate((denoiser,), free_memory=100).least_seconds(15) == pytest.approx(150)
    assert Estimate((stage("denoiser", 5, None),), free_memory=100).least_seconds(15) == 0


def test_training_that_does_not_fit_raises_compute_error_with_what_would(config, monkeypatch):
    check_memory(config, 16, 3, CPU)
    wanted = estimate(batches_of(config, 64), 16, 3, CPU, seconds=0)
    monkeypatch.setattr(module, "free_memory", lambda device: wanted.memory // 2)
    with pytest.raises(ComputeError, match="GiB") as caught:
        check_memory(batches_of(config, 64), 16, 3, CPU)
    parts = int(caught.value.remedy.split()[1])
    assert caught.value.remedy == f"--accumulation {parts} would fit." and 64 % parts == 0
    optimizer = dataclasses.replace(config.denoiser_optimizer, batch_size=64, accumulation=parts)
    check_memory(dataclasses.replace(config, denoiser_optimizer=optimizer), 16, 3, CPU)
    with pytest.raises(ComputeError):  # with half as many it does not
        optimizer = dataclasses.replace(optimizer, accumulation=parts // 2)
        check_memory(dataclasses.replace(config, denoiser_optimizer=optimizer), 16, 3, CPU)
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    with pytest.raises(ComputeError) as caught:
        check_memory(config, 16, 3, CPU)
    assert caught.value.remedy == "No smaller preset fits: close other programs, or use another --device."


@pytest.mark.slow
def test_shortage_names_a_preset_that_fits(monkeypatch):
    needs = {name: estimate(PRESETS[name].config(32), 32, 10, CPU, seconds=0) for name in ("tiny", "small")}
    fixed = max(stage.fixed_memory for stage in needs["small"].stages)
    assert needs["tiny"].memory < 0.9 * fixed
    monkeypatch.setattr(module, "free_memory", lambda device: fixed)
    with pytest.raises(ComputeError) as caught:
        check_memory(PRESETS["small"].config(32), 32, 10, CPU)
    assert caught.value.remedy == "--preset tiny would fit."


def test_pretrained_autoencoder_has_no_stage(config):
    (stage,) = estimate(dataclasses.replace(config, pretrained_autoencoder="here"), 16, 3, CPU, seconds=0).stages
    assert stage.stage == "denoiser"


def test_shortage_of_the_autoencoder_does_not_suggest_smaller_batches(config, monkeypatch):
    large = dataclasses.replace(config.autoencoder_optimizer, batch_size=6000)
    config = dataclasses.replace(config, autoencoder_optimizer=large)
    autoencoder, denoiser = estimate(config, 16, 3, CPU, seconds=0).stages
    monkeypatch.setattr(module, "free_memory", lambda device: (autoencoder.memory + denoiser.memory) // 2)
    with pytest.raises(ComputeError) as caught:
        check_memory(config, 16, 3, CPU)
    assert caught.value.remedy == "No smaller preset fits: close other programs, or use another --device."
