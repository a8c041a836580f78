"""The same image for the same (seed, class, index), guidance, and agreement with diffusers' own loop."""

import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from ddkit.errors import UsageError
from ddkit.generator.compiling import can_compile
from ddkit.generator.model_folder import LatentClassPipeline
from ddkit.generator.objective import BETA_SCHEDULES
from ddkit.generator.samplers import SAMPLERS, make_scheduler
from ddkit.generator.sampling import Sampler, SamplingSettings, class_ordered, sample, sample_all


def difference(first, second):
    return (first.int() - second.int()).abs().max().item()


def test_class_order():
    labels, indices = class_ordered(2, 3, start=5)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert indices.tolist() == [5, 6, 5, 6, 5, 6]


@pytest.mark.parametrize("architecture", ["uvit", "unet", "dit"])
def test_images_do_not_depend_on_batch_size_order_or_company(make_model, architecture):
    model = make_model(architecture)
    labels, indices = class_ordered(3, 3)
    whole = sample_all(Sampler(model, SamplingSettings(steps=3, batch_size=9)), labels, indices)
    small = sample_all(Sampler(model, SamplingSettings(steps=3, batch_size=4)), labels, indices)
    assert difference(whole, small) <= 1
    backwards = Sampler(model, SamplingSettings(steps=3, batch_size=2))(labels.flip(0), indices.flip(0))
    assert difference(whole.flip(0), backwards.images) <= 1
    assert torch.equal(backwards.labels, labels.flip(0))


def test_images_do_not_depend_on_how_many_cores_share_a_batch(make_model):
    model, config = make_model(), SamplingSettings(steps=3, batch_size=9)
    asked = class_ordered(3, 3)
    alone = sample_all(Sampler(model, config), *asked)
    torch.set_num_threads(2)  # put back by the fixture that set one
    assert difference(alone, sample_all(Sampler(model, config), *asked)) <= 1


def test_compiled_it_makes_the_same_and_a_last_batch_may_be_short(make_model):
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
def test_half_precision_makes_nearly_the_same(make_model, ideal):
    model, asked = make_model(prediction="epsilon" if ideal else "flow"), class_ordered(2, 3)
    if ideal:  # whose large sums cancel, as a trained network's do
        model = dataclasses.replace(model, denoiser=IdealDenoiser(model.denoiser))
    full = sample_all(Sampler(model, SamplingSettings(steps=20, batch_size=6)), *asked)
    half = sample_all(Sampler(model, SamplingSettings(steps=20, batch_size=6, precision="bfloat16")), *asked)
    off = (full.int() - half.int()).abs().float()
    assert 0 < off.mean() < 1


def test_seed_class_and_index_each_make_another_image(make_model):
    model = make_model()
    sampler = Sampler(model, SamplingSettings(steps=2, batch_size=4))
    images = sampler(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])).images
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 16, 16)
    other = Sampler(model, SamplingSettings(steps=2, batch_size=4, seed=1))(torch.tensor([0]), torch.tensor([0])).images
    distinct = torch.cat([images, other]).flatten(1).unique(dim=0)
    assert len(distinct) == 4


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["flow", "v"])
def test_it_agrees_with_diffusers_own_loop(make_model, sampler, prediction):
    model = make_model(prediction=prediction)
    pipeline = LatentClassPipeline(model.autoencoder, make_scheduler(sampler, prediction), model.denoiser)
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.tensor([0, 1, 2, 2])
    plain = pipeline(
        labels, guidance_scale=3.0, num_inference_steps=4, output_type="pt", generator=torch.Generator().manual_seed(7)
    ).images

    ours = Sampler(model, SamplingSettings(sampler, steps=4, guidance=3.0, batch_size=4))
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(7))
    assert difference(ours.from_noise(noise, labels), (plain * 255).round().to(torch.uint8)) <= 1


class TestGuidance:
    def images(self, model, **config):
        return Sampler(model, SamplingSettings(steps=3, batch_size=3, **config))(torch.arange(3), torch.zeros(3, dtype=int))

    def test_nought_ignores_the_class_and_one_is_the_class_alone(self, make_model):
        model = make_model()
        null = torch.full((3,), 3)
        sampler = Sampler(model, SamplingSettings(steps=3, batch_size=3, guidance=0.0))
        noise = sampler._noise(torch.arange(3), torch.zeros(3, dtype=int))
        free = Sampler(model, SamplingSettings(steps=3, batch_size=3, guidance=1.0))
        assert difference(sampler.from_noise(noise, torch.arange(3)), free.from_noise(noise, null)) <= 1

    def test_an_empty_interval_is_no_guidance(self, make_model):
        model = make_model()
        none = self.images(model, guidance=1.0).images
        assert difference(self.images(model, guidance=9.0).images, none) > 1
        assert torch.equal(self.images(model, guidance=9.0, guidance_interval=(0.001, 0.002)).images, none)


def test_batches_come_one_by_one_and_are_counted(make_model):
    reports = []
    batches = sample(Sampler(make_model(), SamplingSettings(steps=1, batch_size=4)), *class_ordered(3, 3),
                     progress=reports.append)  # fmt: skip
    assert [len(batch.labels) for batch in batches] == [4, 4, 1]
    assert [report.done for report in reports] == [4, 8, 9]


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
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(UsageError):
        SamplingSettings(**wrong)


def test_classes_the_model_lacks_are_refused(make_model):
    with pytest.raises(UsageError, match="classes 0 to 2"):
        Sampler(make_model(), SamplingSettings(steps=1))(torch.tensor([3]), torch.tensor([0]))


def test_no_images_are_no_error(make_model):
    nothing = torch.empty(0, dtype=torch.int64)
    assert Sampler(make_model(), SamplingSettings(steps=1))(nothing, nothing).images.shape == (0, 3, 16, 16)
