"""The generator on a pretended GPU: no mixed devices, few waits of the host, and defaults for the device."""

import dataclasses

import pytest
import torch

from ddkit.data.store import ImageSet
from ddkit.errors import ComputeError
from ddkit.generator.config import PREDICTIONS, SAMPLERS, MinimaxConfig, SamplingSettings
from ddkit.generator.model_folder import save_model
from ddkit.generator.sampling import Sampler, class_ordered, resolve_settings
from ddkit.generator.training.plan import plan_training
from ddkit.generator.training.train import TrainingData, TrainingRequest, train

CUDA = torch.device("cuda")


@pytest.fixture
def data():
    """Enough images that the numbers of many steps' rows go to the GPU at once."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (300, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return TrainingData("colors", ImageSet(pixels, torch.arange(300) % 3, ("red", "green", "blue")), "of-these-pixels")


def with_steps(config, denoiser=2, autoencoder=2, **objective):
    return dataclasses.replace(
        config,
        autoencoder_optimizer=dataclasses.replace(config.autoencoder_optimizer, steps=autoencoder),
        denoiser_optimizer=dataclasses.replace(config.denoiser_optimizer, steps=denoiser),
        objective=dataclasses.replace(config.objective, **objective),
    )


def waits_of(gpu, run):
    before = gpu.waits_in_all
    run()
    return gpu.waits_in_all - before


def waits_a_step(gpu, data, folder, configs):
    """Waits of each step, from trainings of 3 and of 23 steps; both begin with the first step."""
    few, many = (
        waits_of(gpu, lambda name=name, config=config: train(data, TrainingRequest(config, folder / name, device="cuda")))
        for name, config in zip(("few", "many"), configs, strict=True)
    )
    return (many - few) / 20


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.slow
def test_denoiser_step_never_waits(gpu, data, config, tmp_path, prediction, precision):
    config = dataclasses.replace(config, precision=precision)
    configs = [with_steps(config, denoiser=steps, prediction=prediction) for steps in (3, 23)]
    assert waits_a_step(gpu, data, tmp_path, configs) == 0


@pytest.mark.slow
def test_autoencoder_step_never_waits(gpu, data, config, tmp_path):
    configs = [with_steps(config, autoencoder=steps) for steps in (3, 23)]
    assert waits_a_step(gpu, data, tmp_path, configs) == 0


@pytest.mark.slow
def test_minimax_step_waits_once(gpu, data, config, make_model, tmp_path):
    save_model(make_model(), tmp_path / "start")
    minimax = MinimaxConfig(str(tmp_path / "start"), memory_size=3)
    configs = [dataclasses.replace(with_steps(config, denoiser=steps), minimax=minimax) for steps in (3, 23)]
    assert waits_a_step(gpu, data, tmp_path, configs) == 1


def test_training_on_a_gpu_resumes(gpu, data, config, tmp_path):
    for steps in (2, 5):
        model = train(data, TrainingRequest(with_steps(config, denoiser=steps), tmp_path, device="cuda"))
    assert model.facts.steps == 5


@pytest.mark.parametrize("architecture", ["uvit", "dit"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_waits_at_most_four_times_a_batch(gpu, make_model, architecture, sampler):
    """Noise, labels and centers go in, and images come out."""
    settings = SamplingSettings(sampler, steps=6, batch_size=4)
    labels, indices = class_ordered(8, 3)
    on_cpu = torch.cat([*Sampler(make_model(architecture), SamplingSettings(sampler, steps=6)).images(labels, indices)])
    ours = Sampler(make_model(architecture), dataclasses.replace(settings, precision="float32"), CUDA)
    made = []
    waits = waits_of(gpu, lambda: made.extend(ours.images(labels, indices)))
    assert waits <= 4 * 6
    assert (torch.cat(made).int() - on_cpu.int()).abs().max() <= 1


def test_sampling_defaults_suit_the_device(gpu):
    settings = resolve_settings(SamplingSettings(), CUDA)
    assert (settings.precision, settings.batch_size) == ("bfloat16", 1024)
    settings = resolve_settings(SamplingSettings(), torch.device("cpu"))
    assert (settings.precision, settings.batch_size) == ("float32", 256)
    assert resolve_settings(SamplingSettings(precision="float32", batch_size=7), CUDA).batch_size == 7


def test_batch_on_a_gpu_decodes_in_pieces_of_one_size(gpu, make_model, monkeypatch):
    sampler = Sampler(make_model(), SamplingSettings(steps=1), CUDA)
    decoded = []
    decoder = sampler._decoder
    monkeypatch.setattr(sampler, "_decoder", lambda latents: (decoded.append(len(latents)), decoder(latents))[1])
    labels, indices = class_ordered(400, 3)
    assert sum(map(len, sampler.images(labels, indices))) == 1200
    assert set(decoded[:4]) == {256} and sum(decoded) == 1200


def test_out_of_memory_says_what_to_try(gpu, data, config, make_model, tmp_path):
    optimizer = dataclasses.replace(config.denoiser_optimizer, batch_size=120)
    config = dataclasses.replace(with_steps(config, denoiser=1), denoiser_optimizer=optimizer)
    gpu.largest_tensor = 50_000
    with pytest.raises(ComputeError, match="Out of memory .* on cuda") as caught:
        train(data, TrainingRequest(config, tmp_path, device="cuda"))
    assert "--accumulation 2" in caught.value.remedy or "smaller --preset" in caught.value.remedy
    sampler = Sampler(make_model(), SamplingSettings(steps=1, batch_size=64), CUDA)
    with pytest.raises(ComputeError, match="Out of memory while sampling 64 images at once") as caught:
        list(sampler.images(*class_ordered(30, 3)))
    assert caught.value.remedy == "Try --batch-size 32."


class TestPlan:
    def test_gpu_takes_the_largest_preset_that_fits_and_bfloat16(self, gpu, tmp_path):
        data = TrainingData("any", ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), tuple("abcd")), "")
        request = plan_training(data, {}, runs=tmp_path, device="cuda")
        assert (request.preset, request.config.precision) == ("small", "bfloat16")
        preset, precision = request.choices
        assert preset.startswith("Preset small: ") and "GiB of free memory" in preset
        assert precision.startswith("Precision bfloat16: ")
        given = plan_training(data, {"precision": "float32"}, preset_name="tiny", runs=tmp_path, device="cuda")
        assert (given.preset, given.config.precision, given.choices) == ("tiny", "float32", ())

    def test_gpu_with_little_memory_takes_a_smaller_preset(self, gpu, tmp_path, monkeypatch):
        data = TrainingData("any", ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), tuple("abcd")), "")
        monkeypatch.setattr("ddkit.generator.training.plan.free_memory", lambda device: 2**29)
        request = plan_training(data, {}, runs=tmp_path, device="cuda")
        assert request.preset in ("mid", "tiny") and f"Preset {request.preset}: " in request.choices[0]

    def test_machine_without_a_gpu_keeps_the_default(self, data, tmp_path):
        request = plan_training(data, {}, runs=tmp_path, device="cpu")
        assert (request.preset, request.config.precision) == ("tiny", "float32")
        assert request.choices == ("Preset tiny: the default for training without a GPU.",)
