from __future__ import annotations

import pytest
import torch

from ddkit.data.store import ImageSet
from ddkit.errors import UsageError
from ddkit.metrics.quality import measure

CLASSES = 3


class Pixels:
    """Stands in for a trained network where only the metrics' wiring matters: the pixels are the features."""

    def __call__(self, images, progress=None):
        return images.float().flatten(1)


def real_set(count: int, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 120, (count, 3, 2, 2), generator=generator) + labels.view(-1, 1, 1, 1) * 60
    return ImageSet(images.to(torch.uint8), labels, ("a", "b", "c"))


def test_real_images_measure_like_real_images():
    dataset, other = real_set(600), real_set(90, seed=1)
    quality = measure(other.images, other.labels, dataset, Pixels())
    assert quality.images == 90
    assert quality.metrics.density == pytest.approx(quality.real.density, abs=0.25)
    assert quality.metrics.coverage == pytest.approx(quality.real.coverage, abs=0.15)
    assert quality.metrics.diversity == pytest.approx(quality.real.diversity, rel=0.1)
    assert quality.metrics.nearest == pytest.approx(1, abs=0.15)
    assert quality.real.nearest == 1


def test_half_of_a_class_is_as_near_to_real_images_as_these_to_each_other():
    dataset = real_set(600)
    other = real_set(300, seed=1)  # a hundred of a class of two hundred: as many real ones stand in
    assert measure(other.images, other.labels, dataset, Pixels()).metrics.nearest == pytest.approx(1, abs=0.05)


def test_copies_are_found_with_their_originals():
    dataset = real_set(600)
    quality = measure(dataset.images, dataset.labels, dataset, Pixels())  # half of them stand in for a perfect set
    assert (quality.distances < 1e-3).all(), "also those of images that stand in"
    assert quality.neighbors.tolist() == list(range(600))


def test_one_picture_for_each_class_has_no_diversity_and_covers_little():
    dataset = real_set(600)
    first = torch.tensor([0, 1, 2])
    quality = measure(dataset.images[first].repeat_interleave(20, 0), first.repeat_interleave(20), dataset, Pixels())
    assert quality.metrics.diversity == pytest.approx(0, abs=1e-4)
    assert quality.metrics.coverage < quality.real.coverage / 3
    assert quality.metrics.frechet > quality.real.frechet


def test_one_image_a_class_has_no_diversity_to_measure():
    dataset = real_set(300)
    assert measure(dataset.images[:3], dataset.labels[:3], dataset, Pixels()).metrics.diversity is None


def test_a_single_image_is_refused():
    dataset = real_set(60)
    with pytest.raises(UsageError, match="two images"):
        measure(dataset.images[:1], dataset.labels[:1], dataset, Pixels())


def test_a_tiny_dataset_is_refused():
    dataset = real_set(12)
    with pytest.raises(UsageError, match="too few real images"):
        measure(dataset.images, dataset.labels, dataset, Pixels())


def test_a_single_image_of_each_class_is_refused():
    pictures = real_set(36).images
    dataset = ImageSet(pictures[:12], torch.arange(12), tuple("abcdefghijkl"))
    with pytest.raises(UsageError, match="too few real images"):
        measure(pictures[12:24], torch.arange(12), dataset, Pixels())
