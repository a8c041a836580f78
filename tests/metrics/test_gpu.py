"""Metrics on a pretended GPU: the numbers of a CPU, everything on one device, and few waits of the host."""

import pytest
import torch

from ddkit.challenge import DatasetSpec
from ddkit.data.store import ImageSet
from ddkit.metrics.coverage import density_and_coverage, nearest, within_class_diversity
from ddkit.metrics.features import FeatureSettings, convnet_features
from ddkit.metrics.frechet import frechet_distance
from ddkit.metrics.quality import measure

SPEC = DatasetSpec("blobs", 4, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
# In float32 on every device, as processors may be faster in bfloat16 and then choose it.
SETTINGS = FeatureSettings(images=60, epochs=2, batch_size=30, precision="float32")


@pytest.fixture
def real():
    """600 images of four classes, each with a brightness of its own."""
    labels = torch.arange(600) % 4
    noise = torch.randint(0, 60, (600, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return ImageSet((noise + 45 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, tuple("abcd"))


def waits_of(gpu, run):
    gpu.reset()
    found = run()
    return found, gpu.waits_in_all


@pytest.mark.slow
def test_feature_network_is_trained_on_the_gpu_asked_for_and_its_features_are_those_of_a_cpu(real, gpu, second_gpu):
    features = convnet_features(real, SPEC, SETTINGS, device=second_gpu)
    again = convnet_features(real, SPEC, SETTINGS)  # from the cache, on the CPU
    torch.testing.assert_close(features(real.images), again(real.images), atol=1e-4, rtol=1e-4)
    ours, theirs = (each.with_confidence(real.images[:300], real.labels[:300]) for each in (features, again))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert features(real.images[:0]).shape == (0, features.num_features)


@pytest.mark.slow
def test_training_the_feature_network_waits_once_an_epoch(real, gpu, second_gpu):
    def train(epochs):
        return convnet_features(real, SPEC, FeatureSettings(60, epochs, 30, seed=epochs), device=second_gpu)

    train(1)  # measures engines
    few, many = (waits_of(gpu, lambda epochs=epochs: train(epochs))[1] for epochs in (2, 7))
    assert many - few == 5, gpu.waits


@pytest.mark.slow
def test_features_wait_once_whatever_the_number_of_images(real, gpu, second_gpu):
    features = convnet_features(real, SPEC, SETTINGS, device=second_gpu)
    features(real.images)  # fills caches
    for count in (10, 250, 600):
        assert waits_of(gpu, lambda count=count: features(real.images[:count]))[1] == 1
    # Features, and confidences.
    assert waits_of(gpu, lambda: features.with_confidence(real.images, real.labels))[1] == 2


def test_metrics_of_features_on_a_gpu_are_those_of_a_cpu(gpu, second_gpu):
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(600, 6, generator=generator), torch.randn(40, 6, generator=generator)
    labels = torch.arange(40) % 4
    there = [tensor.to(second_gpu) for tensor in (real, generated, labels)]
    assert frechet_distance(*there[:2]) == pytest.approx(frechet_distance(real, generated))
    found, waits = waits_of(gpu, lambda: density_and_coverage(*there[:2]))
    assert found == density_and_coverage(real, generated)
    assert waits == 2
    assert within_class_diversity(*there[1:]) == pytest.approx(within_class_diversity(generated, labels))
    for ours, wanted in zip(nearest(there[1], there[0]), nearest(generated, real), strict=True):
        torch.testing.assert_close(ours.cpu(), wanted)


@pytest.mark.slow
def test_quality_of_a_set_measured_on_a_gpu_is_that_of_a_cpu(real, gpu, second_gpu):
    images, labels = real.images[::15], real.labels[::15]
    ours, theirs = (
        measure(images, labels, real, convnet_features(real, SPEC, SETTINGS, device=device)) for device in (second_gpu, "cpu")
    )
    assert ours.metrics.frechet == pytest.approx(theirs.metrics.frechet, rel=1e-3)
    assert torch.equal(ours.neighbors, theirs.neighbors)
