"""Sets made on a pretended GPU: those of a CPU, everything on one device, and few waits of the host."""

import pytest
import torch

from ddkit.data.images import denormalize
from ddkit.data.store import dataset_spec
from ddkit.distill.generate import FromModel, FromReal, generate
from ddkit.generator.config import SamplingSettings
from ddkit.sets.select import FEATURE_METHODS, ImageFeatures, choose_in_class

SAMPLING = SamplingSettings(steps=2, batch_size=4, precision="float32")


@pytest.fixture
def make(colors, tmp_path):
    """Pixels of the set that a call of `generate` writes, in [0, 255]."""

    def run(source):
        tensor = generate(colors, 2, source, tmp_path / "set.pt", replace=True).tensor
        return denormalize(torch.load(tensor, weights_only=True), dataset_spec(colors)) * 255

    return run


@pytest.mark.slow
@pytest.mark.parametrize("select", ["random", "most-confident", "herding"])
def test_set_chosen_from_candidates_on_a_gpu_is_that_of_a_cpu(make, model_folder, gpu, second_gpu, select):
    on_gpu, on_cpu = (
        make(FromModel(model_folder, SAMPLING, device, candidates=5, select=select)) for device in (second_gpu, "cpu")
    )
    assert (on_gpu - on_cpu).abs().max() < 1.1


@pytest.mark.slow
def test_choice_among_candidates_waits_once_a_batch_and_twice_a_class(make, model_folder, gpu, second_gpu):
    def waits(candidates):
        gpu.reset()
        make(FromModel(model_folder, SAMPLING, second_gpu, candidates=candidates, select="median"))
        return gpu.waits_in_all

    first = waits(4)  # loads the networks
    assert waits(12) - waits(4) == 2 * 2, gpu.waits  # two more batches of each of two classes
    assert waits(4) <= first
    assert sum(count for (kind, _), count in gpu.waits.items() if kind == "copy to the CPU") == 2 * (1 + 2)


@pytest.mark.slow
def test_real_images_are_chosen_on_a_gpu_as_on_a_cpu(make, gpu, second_gpu):
    on_gpu, on_cpu = (make(FromReal("k-center", device=device)) for device in (second_gpu, "cpu"))
    assert torch.equal(on_gpu, on_cpu)


@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_choice_by_features_on_a_gpu_is_that_of_a_cpu_and_waits_for_the_features_alone(gpu, second_gpu, method):
    generator = torch.Generator().manual_seed(0)
    features = ImageFeatures(torch.rand(30, 8, generator=generator), torch.rand(30, generator=generator))
    there = ImageFeatures(features.features.to(second_gpu), features.confidence.to(second_gpu))
    gpu.reset()
    found = choose_in_class(method, 30, 5, seed=0, label=0, features=there)
    assert torch.equal(found, choose_in_class(method, 30, 5, seed=0, label=0, features=features))
    assert gpu.waits_in_all == 2
