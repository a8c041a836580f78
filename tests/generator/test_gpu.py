"""The generator on a pretended GPU: no mixed devices, few waits of the host, and defaults for the device."""

import dataclasses
import itertools
import threading

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from ddkit.challenge import DatasetSpec
from ddkit.data.store import ImageSet
from ddkit.errors import ComputeError, UsageError
from ddkit.generator.config import PREDICTIONS, SAMPLERS, MinimaxConfig, SamplingSettings
from ddkit.generator.influence import find_influence
from ddkit.generator.model_folder import save_model
from ddkit.generator.sampling import Sampler, class_ordered, resolve_settings
from ddkit.generator.training.estimate import estimate
from ddkit.generator.training.latents import cached_latents
from ddkit.generator.training.plan import plan_training, require_memory
from ddkit.generator.training.tracking import track_frechet
from ddkit.generator.training.train import TrainingData, TrainingRequest, train
from ddkit.generator.uvit import UViT
from ddkit.network.autotune import choose_plan, prescribed_plans, remembered_plans
from ddkit.network.networks import build_network

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
    """Waits of each step, from trainings of 3 and of 6 steps; both begin with the first step."""
    few, many = (
        waits_of(gpu, lambda name=name, config=config: train(data, TrainingRequest(config, folder / name, device="cuda")))
        for name, config in zip(("few", "many"), configs, strict=True)
    )
    return (many - few) / 3


@pytest.mark.parametrize("precision, prediction", [("float32", "flow"), ("bfloat16", "v"), ("bfloat16", "epsilon")])
@pytest.mark.slow
def test_denoiser_step_never_waits(gpu, data, config, tmp_path, precision, prediction):
    config = dataclasses.replace(config, precision=precision)
    configs = [with_steps(config, denoiser=steps, prediction=prediction) for steps in (3, 6)]
    assert waits_a_step(gpu, data, tmp_path, configs) == 0


@pytest.mark.slow
def test_autoencoder_step_never_waits(gpu, data, config, tmp_path):
    configs = [with_steps(config, autoencoder=steps) for steps in (3, 6)]
    assert waits_a_step(gpu, data, tmp_path, configs) == 0


@pytest.mark.slow
def test_minimax_step_waits_once(gpu, data, config, make_model, tmp_path):
    save_model(make_model(), tmp_path / "start")
    minimax = MinimaxConfig(str(tmp_path / "start"), memory_size=3)
    configs = [dataclasses.replace(with_steps(config, denoiser=steps), minimax=minimax) for steps in (3, 6)]
    assert waits_a_step(gpu, data, tmp_path, configs) == 1


def test_encoding_the_training_set_waits_once_a_batch(gpu, second_gpu, data, make_model, tmp_path):
    autoencoder, pixels = make_model().autoencoder.to(second_gpu), data.images.images.repeat(3, 1, 1, 1)

    def encode(count):
        images = ImageSet(pixels[:count], torch.zeros(count, dtype=torch.int64), ("any",))
        cached_latents(tmp_path / f"{count}.safetensors", autoencoder, images, 4, flips=True, identity=f"{count}")

    assert waits_of(gpu, lambda: encode(768)) - waits_of(gpu, lambda: encode(256)) == 2, gpu.waits


@pytest.mark.slow
def test_training_data_that_do_not_fit_on_the_gpu_stay_in_main_memory(gpu, data, config, tmp_path):
    weights = []
    for free in (70 * 2**30, 1000):
        gpu.memory = [(free, 80 * 2**30)]
        model = train(data, TrainingRequest(with_steps(config, denoiser=2), tmp_path / str(free), device="cuda"))
        weights.append([*model.denoiser.parameters(), *model.autoencoder.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*weights, strict=True))


@pytest.mark.slow
def test_training_resumes_on_another_device(gpu, second_gpu, data, config, tmp_path):
    for steps, device in ((2, "cuda"), (4, "cpu"), (6, "cuda"), (8, second_gpu)):
        model = train(data, TrainingRequest(with_steps(config, denoiser=steps), tmp_path, device=device))
    assert model.facts.steps == 8


@pytest.mark.slow
def test_fine_tuning_resumes_on_another_device(gpu, second_gpu, data, config, make_model, tmp_path):
    save_model(make_model(), tmp_path / "start")
    minimax = MinimaxConfig(str(tmp_path / "start"), memory_size=3)
    for steps, device in ((2, "cuda"), (4, "cpu"), (6, second_gpu)):
        tuned = dataclasses.replace(with_steps(config, denoiser=steps), minimax=minimax)
        model = train(data, TrainingRequest(tuned, tmp_path / "run", device=device))
    assert model.facts.steps == 6


@pytest.mark.slow
def test_training_begun_in_float16_continues_on_a_cpu_in_the_precision_that_is_advised(gpu, data, config, tmp_path):
    half = dataclasses.replace(with_steps(config, denoiser=2), precision="float16")
    train(data, TrainingRequest(half, tmp_path, device="cuda"))
    longer = with_steps(half, denoiser=4)
    with pytest.raises(UsageError, match="float16 needs a GPU") as caught:
        train(data, TrainingRequest(longer, tmp_path, device="cpu"))
    assert "--precision bfloat16 or float32" in caught.value.remedy
    for precision, device, steps in (("float32", "cpu", 4), ("float16", "cuda", 6)):
        request = TrainingRequest(
            dataclasses.replace(with_steps(half, denoiser=steps), precision=precision), tmp_path, device=device
        )
        assert train(data, request).facts.steps == steps


@pytest.mark.slow
def test_tracked_training_scores_on_the_gpu_asked_for(gpu, second_gpu, data, config, tmp_path):
    tracking = track_frechet(data.images, lambda: lambda images: images.float().mean((2, 3)), every_steps=2, images=20,
                             sampling=SamplingSettings(steps=2), device=second_gpu)  # fmt: skip
    model = train(data, TrainingRequest(with_steps(config, denoiser=4), tmp_path, device=second_gpu), tracking=tracking)
    assert model.facts.metrics.keys() == {"frechet"}


@pytest.mark.parametrize("architecture, prediction, sampler", [
    *(("uvit", "flow", sampler) for sampler in SAMPLERS),
    *(pytest.param(*of, marks=pytest.mark.slow) for of in (("uvit", "epsilon", "dpm++"), ("dit", "v", "ddim"))),
])  # fmt: skip
def test_sampling_waits_once_a_batch(gpu, second_gpu, make_model, architecture, prediction, sampler):
    """For the images, which come back."""
    settings = SamplingSettings(sampler, steps=6, batch_size=4, guidance_interval=(0.2, 0.8), precision="float32")
    labels, indices = class_ordered(8, 3)
    on_cpu = torch.cat([*Sampler(make_model(architecture, prediction), settings).images(labels, indices)])
    ours = Sampler(make_model(architecture, prediction), settings, second_gpu)
    made = []
    assert waits_of(gpu, lambda: made.extend(ours.images(labels, indices))) == 6, gpu.waits
    assert (torch.cat(made).int() - on_cpu.int()).abs().max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_mode_guided_sampling_waits_once_a_batch(gpu, second_gpu, make_model, prediction):
    modes = torch.randn(3, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    settings = SamplingSettings("ddim", steps=4, batch_size=4, mode_guidance=0.1, precision="float32")
    labels, indices = class_ordered(4, 3)
    on_cpu = torch.cat([*Sampler(make_model(prediction=prediction), settings, modes=modes).images(labels, indices)])
    ours = Sampler(make_model(prediction=prediction), settings, second_gpu, modes=modes)
    made = [*ours.images(labels, indices)]
    assert waits_of(gpu, lambda: [*ours.images(labels, indices)]) == 3, gpu.waits
    assert (torch.cat(made).int() - on_cpu.int()).abs().max() <= 1


def influence_data(classes=3):
    """60 images, and what is known of their dataset."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 3, 16, 16), generator=generator, dtype=torch.uint8)
    names = tuple(map(str, range(classes)))
    spec = DatasetSpec("noise", classes, 16, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    return ImageSet(pixels, torch.arange(60) % classes, names), spec


def influence_of(device, name, *, classes=3, epochs=2):
    return find_influence(*influence_data(classes), dataset_sha256=name, epochs=epochs, device=device)


@pytest.mark.slow
def test_influence_guided_sampling_waits_once_a_batch(gpu, second_gpu, make_model):
    settings = SamplingSettings("ddim", steps=4, batch_size=4, influence_guidance=0.1, precision="float32")
    labels, indices = class_ordered(4, 3)
    here, there = influence_of("cpu", "once"), influence_of(second_gpu, "once")  # by the same networks
    on_cpu = torch.cat([*Sampler(make_model(), settings, influence=here).images(labels, indices)])
    ours = Sampler(make_model(), settings, second_gpu, influence=there)
    made = [*ours.images(labels, indices)]
    assert waits_of(gpu, lambda: [*ours.images(labels, indices)]) == 3, gpu.waits
    assert (torch.cat(made).int() - on_cpu.int()).abs().max() <= 1


@pytest.mark.slow
def test_preparing_influence_waits_once_an_epoch_and_a_checkpoint_for_any_number_of_classes(gpu, second_gpu):
    influence_of(second_gpu, "first")  # measures engines
    names = iter(("2 epochs", "4 epochs", "20 classes"))
    two, four, of_more_classes = (
        waits_of(gpu, lambda changes=changes: influence_of(second_gpu, next(names), **changes))
        for changes in ({"epochs": 2}, {"epochs": 4}, {"epochs": 4, "classes": 20})
    )
    assert four - two == 2 + 1 and of_more_classes == four, gpu.waits
    assert waits_of(gpu, lambda: influence_of(second_gpu, "first")) == 0  # from the cache


@pytest.mark.slow
def test_influence_found_on_a_gpu_is_that_of_a_cpu_whatever_engine_trains(gpu, second_gpu):
    choose_plan(build_network("convnet", 3, 16, seed=0).to(second_gpu), "float32", 60)
    keys = remembered_plans(torch.device(second_gpu))
    images, expected = influence_data()[0], influence_of("cpu", "on the CPU")
    unit = images.images.float() / 255
    for kind, channels_last in itertools.product(("plain", "cuda_graph"), (False, True)):
        with prescribed_plans({key: {"kind": kind, "channels_last": channels_last} for key in keys}):
            influence_of(second_gpu, f"{kind}, {channels_last}")
        found = influence_of("cpu", f"{kind}, {channels_last}")  # from the cache
        torch.testing.assert_close(found(unit, images.labels), expected(unit, images.labels), atol=1e-3, rtol=1e-3)


def test_speed_of_a_training_on_a_gpu_is_that_of_whole_batches(gpu, config):
    """For each smaller one a GPU would prepare anew, which takes it longer than the batch."""
    sizes = set()

    def note(module, args):
        if isinstance(module, UViT):
            sizes.add(len(args[0]))

    with register_module_forward_pre_hook(note):
        estimate(config, 16, 3, CUDA, seconds=1e-9)
    assert sizes == {1, 2, config.denoiser_optimizer.batch_size}  # by the first two the memory is found


def test_noise_of_the_next_batch_is_drawn_while_a_batch_is_sampled(gpu, make_model, monkeypatch):
    sampler = Sampler(make_model(), SamplingSettings(steps=1, batch_size=4), CUDA)
    drawn = threading.Event()
    noise, guided = sampler.noise, sampler._guided

    def noise_of(labels, indices):
        found = noise(labels, indices)
        if indices.max() == 7:  # of the second batch
            drawn.set()
        return found

    def wait_for_noise(*arguments):
        assert drawn.wait(60), "the noise was not drawn meanwhile"
        return guided(*arguments)

    monkeypatch.setattr(sampler, "noise", noise_of)
    monkeypatch.setattr(sampler, "_guided", wait_for_noise)
    assert [len(images) for images in sampler.images(torch.zeros(8, dtype=torch.int64), torch.arange(8))] == [4, 4]


def test_sampling_defaults_suit_the_device(gpu, monkeypatch):
    settings = resolve_settings(SamplingSettings(), CUDA)
    assert (settings.precision, settings.batch_size) == ("bfloat16", 1024)
    gpu.capability = (7, 5)
    assert resolve_settings(SamplingSettings(), CUDA).precision == "float32"
    for flags, precision in ((("avx2", "avx512f"), "float32"), (("avx512f", "avx512_bf16"), "bfloat16")):
        monkeypatch.setattr("ddkit.runtime.device.cpu_flags", lambda flags=flags: frozenset(flags))
        settings = resolve_settings(SamplingSettings(), torch.device("cpu"))
        assert (settings.precision, settings.batch_size) == (precision, 256)
    assert resolve_settings(SamplingSettings(precision="float32", batch_size=7), CUDA).batch_size == 7


def test_batch_on_a_gpu_decodes_in_pieces_of_one_size(gpu, make_model, monkeypatch):
    sampler = Sampler(make_model(), SamplingSettings(steps=1), CUDA)
    decoded = []
    decoder = sampler._decoder
    monkeypatch.setattr(sampler, "_decoder", lambda latents: (decoded.append(len(latents)), decoder(latents))[1])
    labels, indices = class_ordered(400, 3)
    assert sum(map(len, sampler.images(labels, indices))) == 1200
    assert set(decoded[:4]) == {256} and sum(decoded) == 1200


def test_out_of_memory_says_what_to_try(gpu, data, config, tmp_path):
    optimizer = dataclasses.replace(config.denoiser_optimizer, batch_size=120)
    config = dataclasses.replace(with_steps(config, denoiser=1), denoiser_optimizer=optimizer)
    few = dataclasses.replace(
        data, images=ImageSet(*(rows[:12] for rows in (data.images.images, data.images.labels)), tuple("abc"))
    )
    gpu.largest_tensor = 50_000
    for images, stage, said in (
        (few, "denoiser", "Try --accumulation 2, a smaller --batch-size, or a smaller --preset."),
        (data, "autoencoder", "The preset decides its size: choose a smaller --preset, or another --device."),
    ):
        with pytest.raises(ComputeError, match=f"Out of memory during {stage} training .* on cuda") as caught:
            train(images, TrainingRequest(config, tmp_path / stage, device="cuda"))
        assert caught.value.remedy == said


@pytest.mark.parametrize("size", [None, 64])
def test_sampling_takes_smaller_batches_where_memory_is_short(gpu, make_model, caplog, size):
    labels, indices = class_ordered(30, 3)
    settings = SamplingSettings(steps=2, precision="float32", batch_size=size)
    plenty = torch.cat([*Sampler(make_model(), settings, CUDA).images(labels, indices)])
    gpu.largest_tensor = 50_000
    short = [*Sampler(make_model(), settings, CUDA).images(labels, indices)]
    assert (torch.cat(short).int() - plenty.int()).abs().max() <= 1
    assert "images at a time from now on" in caplog.text and gpu.released
    gpu.largest_tensor = None
    sampler = Sampler(make_model(), settings, CUDA)
    gpu.largest_tensor = 50
    with pytest.raises(ComputeError, match="Out of memory while sampling one image at a time. Close other programs"):
        list(sampler.images(labels, indices))
    with pytest.raises(ComputeError, match="The generator does not fit into the memory of cuda"):
        Sampler(make_model(), settings, CUDA)


class TestPlan:
    @pytest.mark.slow
    def test_gpu_takes_the_largest_preset_that_fits_and_bfloat16(self, gpu, tmp_path):
        data = TrainingData("any", ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), tuple("abcd")), "")
        request = plan_training(data, {}, runs=tmp_path, device="cuda")
        assert (request.preset, request.config.precision) == ("small", "bfloat16")
        preset, precision = request.choices
        assert preset.startswith("Preset small: ") and "GiB of free memory" in preset
        assert precision.startswith("Precision bfloat16: ")
        given = plan_training(data, {"precision": "float32"}, preset_name="tiny", runs=tmp_path, device="cuda")
        assert (given.preset, given.config.precision, given.choices) == ("tiny", "float32", ())

    @pytest.mark.slow
    def test_gpu_with_little_memory_takes_a_smaller_preset(self, gpu, tmp_path):
        data = TrainingData("any", ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), tuple("abcd")), "")
        gpu.memory = [(2**29, 2**32)]
        request = plan_training(data, {}, runs=tmp_path, device="cuda")
        assert request.preset in ("mid", "tiny") and f"Preset {request.preset}: " in request.choices[0]

    @pytest.mark.slow
    def test_gpu_that_another_process_has_filled_is_one_message(self, gpu, tmp_path):
        data = TrainingData("any", ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), tuple("abcd")), "")
        gpu.memory = [(2**26, 80 * 2**30)]
        request = plan_training(data, {}, preset_name="tiny", runs=tmp_path, device="cuda")
        with pytest.raises(ComputeError, match="cuda:0 has 0.1 GiB free") as caught:
            require_memory(data, request)
        assert caught.value.remedy and not any(tmp_path.iterdir())

    @pytest.mark.slow
    def test_larger_gpu_is_named_where_the_first_is_too_small(self, gpu, tmp_path):
        data = TrainingData("any", ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), tuple("abcd")), "")
        gpu.memory = [(2**27, 2**32), (70 * 2**30, 80 * 2**30)]
        request = plan_training(data, {"batch_size": 4096}, preset_name="tiny", runs=tmp_path, device="cuda")
        with pytest.raises(ComputeError, match="Try --device cuda:1, which has 80.0 GiB."):
            require_memory(data, request)
        require_memory(data, dataclasses.replace(request, device="cuda:1"))

    @pytest.mark.slow
    def test_processes_on_gpus_of_different_memory_choose_the_same(self, gpu, tmp_path, monkeypatch):
        data = TrainingData("any", ImageSet(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), tuple("abcd")), "")
        gpu.memory = [(70 * 2**30, 80 * 2**30), (2**29, 2**29)]
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        found = []
        for rank in "01":
            monkeypatch.setenv("LOCAL_RANK", rank)
            found.append(plan_training(data, {}, runs=tmp_path, device="cuda"))
        assert found[0] == found[1] and found[0].preset != "small"
        assert "the smallest of 2 GPUs has 0.5 GiB of memory" in found[0].choices[0]

    def test_machine_without_a_gpu_keeps_the_default(self, data, tmp_path, monkeypatch):
        monkeypatch.setattr("ddkit.runtime.device.cpu_flags", frozenset)
        request = plan_training(data, {}, runs=tmp_path, device="cpu")
        assert (request.preset, request.config.precision) == ("tiny", "float32")
        assert request.choices == ("Preset tiny: the default for training without a GPU.",)
