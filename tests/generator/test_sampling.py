"""The same image for the same (seed, class, index), guidance, and agreement with diffusers' own loop."""

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from ddkit.errors import UsageError
from ddkit.generator.autoencoder import decode
from ddkit.generator.compiling import can_compile
from ddkit.generator.config import PREDICTIONS, SAMPLERS, ObjectiveConfig
from ddkit.generator.linear_plan import set_steps, weighted_sum
from ddkit.generator.networks import null_class, predict
from ddkit.generator.objective import BETA_SCHEDULES, Objective
from ddkit.generator.samplers import make_scheduler
from ddkit.generator.sampling import Sampler, SamplingSettings, class_ordered


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """Images are compared value by value, so no test samples in bfloat16 because the processor can."""
    monkeypatch.setattr("ddkit.runtime.device.cpu_flags", frozenset)


def sample_all(sampler, labels, indices):
    return torch.cat([*sampler.images(labels, indices)])


def difference(first, second):
    return (first.int() - second.int()).abs().max().item()


def test_class_ordered_lists_labels_and_indices_class_by_class():
    labels, indices = class_ordered(2, 3)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert indices.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("architecture", ["uvit", "dit"])
def test_images_do_not_depend_on_batch_size_order_or_company(make_model, architecture):
    model = make_model(architecture)
    labels, indices = class_ordered(3, 3)
    whole = sample_all(Sampler(model, SamplingSettings(steps=3, batch_size=9)), labels, indices)
    small = sample_all(Sampler(model, SamplingSettings(steps=3, batch_size=4)), labels, indices)
    assert difference(whole, small) <= 1
    backwards = sample_all(Sampler(model, SamplingSettings(steps=3, batch_size=2)), labels.flip(0), indices.flip(0))
    assert difference(whole.flip(0), backwards) <= 1


def test_images_do_not_depend_on_how_many_cores_share_a_batch(make_model):
    model, config = make_model(), SamplingSettings(steps=3, batch_size=9)
    asked = class_ordered(3, 3)
    alone = sample_all(Sampler(model, config), *asked)
    torch.set_num_threads(2)  # put back by the fixture that set one
    assert difference(alone, sample_all(Sampler(model, config), *asked)) <= 1


@pytest.mark.slow
def test_compiled_sampler_makes_the_same_images_also_in_a_short_last_batch(make_model):
    if not can_compile():
        pytest.skip("no C++ compiler with Python's headers")
    model, (labels, indices) = make_model(), class_ordered(2, 3)
    plain = sample_all(Sampler(model, SamplingSettings(steps=2, batch_size=4)), labels, indices)
    compiled = Sampler(make_model(), SamplingSettings(steps=2, batch_size=4, compile=True))
    assert difference(plain, sample_all(compiled, labels, indices)) <= 1


class IdealDenoiser(nn.Module):
    """Knows the noise in latents that are normal with a deviation of 0.5, as well as that can be known."""

    def __init__(self, like):
        super().__init__()
        self.config = like.config
        self._kept = DDPMScheduler(beta_schedule=BETA_SCHEDULES["epsilon"]).alphas_cumprod

    def forward(self, noisy, timestep, class_labels):
        kept = self._kept[timestep.long()].view(-1, 1, 1, 1)
        return (1 - kept).sqrt() * noisy / (kept * 0.5**2 + 1 - kept)


@pytest.mark.parametrize("ideal", [False, True])
def test_bfloat16_makes_nearly_the_same_images(make_model, ideal):
    model, asked = make_model(prediction="epsilon" if ideal else "flow"), class_ordered(2, 3)
    if ideal:  # whose large sums cancel, as a trained network's do
        model = dataclasses.replace(model, denoiser=IdealDenoiser(model.denoiser))
    full = sample_all(Sampler(model, SamplingSettings(steps=20, batch_size=6)), *asked)
    half = sample_all(Sampler(model, SamplingSettings(steps=20, batch_size=6, precision="bfloat16")), *asked)
    off = (full.int() - half.int()).abs().float()
    assert 0 < off.mean() < 1


def test_seed_class_and_index_each_change_the_image(make_model):
    model = make_model()
    sampler = Sampler(model, SamplingSettings(steps=2, batch_size=4))
    images = sample_all(sampler, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 16, 16)
    other = sample_all(Sampler(model, SamplingSettings(steps=2, batch_size=4, seed=1)), torch.tensor([0]), torch.tensor([0]))
    distinct = torch.cat([images, other]).flatten(1).unique(dim=0)
    assert len(distinct) == 4


@torch.inference_mode()
def by_diffusers(model, scheduler, labels, noise, *, steps, guidance, added=lambda i, time, point, output: 0):
    """Images in [0, 1] by diffusers' own loop. added: what is added to the point after each step."""
    set_steps(scheduler, steps)
    both, point = torch.cat([labels, torch.full_like(labels, null_class(model.denoiser))]), noise
    for i, time in enumerate(scheduler.timesteps):
        inputs = torch.cat([point, point])
        with_class, without = predict(model.denoiser, inputs, time.expand(len(both)), both).chunk(2)
        output = without + guidance * (with_class - without)
        term = added(i, time, point, output)
        point = scheduler.step(output, time, point, return_dict=False)[0] + term
    images = decode(model.autoencoder, point / model.autoencoder.config.scaling_factor, model.facts.image_size)
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["flow", "v"])
def test_sampler_agrees_with_diffusers_own_loop(make_model, sampler, prediction):
    model = make_model(prediction=prediction)
    labels = torch.tensor([0, 1, 2, 2])
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(7))
    plain = by_diffusers(model, make_scheduler(sampler, prediction), labels, noise, steps=4, guidance=3.0)

    ours = Sampler(model, SamplingSettings(sampler, steps=4, guidance=3.0, batch_size=4))
    assert difference(ours.from_noise(noise, labels, torch.zeros_like(labels)), (plain * 255).round().to(torch.uint8)) <= 1


class TestGuidance:
    def images(self, model, **config):
        sampler = Sampler(model, SamplingSettings(steps=3, batch_size=3, **config))
        return sample_all(sampler, torch.arange(3), torch.zeros(3, dtype=int))

    def test_guidance_zero_ignores_the_class_and_one_is_the_class_alone(self, make_model):
        model = make_model()
        null = torch.full((3,), 3)
        sampler = Sampler(model, SamplingSettings(steps=3, batch_size=3, guidance=0.0))
        labels, indices = torch.arange(3), torch.zeros(3, dtype=int)
        noise = sampler.noise(labels, indices)
        free = Sampler(model, SamplingSettings(steps=3, batch_size=3, guidance=1.0))
        assert difference(sampler.from_noise(noise, labels, indices), free.from_noise(noise, null, indices)) <= 1

    def test_empty_guidance_interval_turns_guidance_off(self, make_model):
        model = make_model()
        none = self.images(model, guidance=1.0)
        assert difference(self.images(model, guidance=9.0), none) > 1
        assert torch.equal(self.images(model, guidance=9.0, guidance_interval=(0.001, 0.002)), none)


def test_images_yields_batches_in_order(make_model):
    sampler = Sampler(make_model(), SamplingSettings(steps=1, batch_size=4))
    assert [len(batch) for batch in sampler.images(*class_ordered(3, 3))] == [4, 4, 1]


def test_model_trained_without_label_dropout_refuses_guidance(make_model):
    model = make_model()
    model = dataclasses.replace(model, facts=dataclasses.replace(model.facts, label_dropout=0.0))
    with pytest.raises(UsageError, match="without label dropout") as caught:
        Sampler(model, SamplingSettings(steps=1))
    assert "--guidance 1" in caught.value.remedy
    assert Sampler(model, SamplingSettings(steps=1, guidance=1.0)) is not None


class TestModeGuidance:
    LABELS, INDICES = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 0, 4])

    def modes(self):
        return torch.randn(3, 3, 2, 4, 4, generator=torch.Generator().manual_seed(5))

    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_every_sampler_adds_the_papers_term_in_the_first_half(self, make_model, sampler, prediction):
        """lambda * sigma_t * (mode - predicted clean latents), added to the point after the step."""
        model, modes = make_model(prediction=prediction), self.modes()
        objective = Objective(ObjectiveConfig(prediction))
        centers = torch.stack([modes[0, 0], modes[1, 1], modes[2, 0], modes[2, 1]])  # image 4 of three modes: mode 1

        def added(i, time, point, output):
            times = time.float().expand(len(point))
            sigma = objective.levels(times, point)[1]
            return 0.5 * sigma * (centers - objective.clean(point, output, times)) if i < 2 else 0

        ours = Sampler(model, SamplingSettings(sampler, steps=4, guidance=3.0, mode_guidance=0.5), modes=modes)
        noise, scheduler = ours.noise(self.LABELS, self.INDICES), make_scheduler(sampler, prediction)
        scheduler.disable_corrector = [0, 1]  # of UniPC, as it would take back what is added
        plain = by_diffusers(model, scheduler, self.LABELS, noise, steps=4, guidance=3.0, added=added)
        made = ours.from_noise(noise, self.LABELS, self.INDICES)
        assert difference(made, (plain * 255).round().to(torch.uint8)) <= 1
        without = Sampler(model, SamplingSettings(sampler, steps=4, guidance=3.0)).from_noise(noise, self.LABELS, self.INDICES)
        assert difference(made, without) > 1

    def test_images_do_not_depend_on_the_batch_size(self, make_model):
        model, modes = make_model(), self.modes()
        whole, small = (
            sample_all(
                Sampler(model, SamplingSettings(steps=4, batch_size=size, mode_guidance=0.5), modes=modes),
                self.LABELS, self.INDICES,
            )
            for size in (4, 1)
        )  # fmt: skip
        assert difference(whole, small) <= 1


def test_weighted_sum_is_float32_under_autocast():
    coefficients = torch.tensor([100.0, -100.0, 1.0])
    terms = torch.stack([torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 1.001), torch.full((1, 1, 1, 1), 0.25)])
    with torch.autocast("cpu", torch.bfloat16):
        found = weighted_sum(coefficients, terms)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(0.15, abs=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 1001},
        {"batch_size": 0},
        {"guidance": -1.0},
        {"guidance": float("nan")},
        {"guidance_interval": (0.5, 0.2)},
        {"precision": "int8"},
        {"sampler": "euler"},
        {"mode_guidance": -0.1},
        {"influence_guidance": float("inf")},
    ],
)
def test_invalid_settings_raise_usage_error(wrong):
    with pytest.raises(UsageError):
        SamplingSettings(**wrong)


def test_no_labels_yield_no_images(make_model):
    nothing = torch.empty(0, dtype=torch.int64)
    assert list(Sampler(make_model(), SamplingSettings(steps=1)).images(nothing, nothing)) == []
