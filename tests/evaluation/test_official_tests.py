"""Which test sets count as the challenge's: the real ones, however decoded and ordered, and no others."""

import functools
import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ddkit.challenge import CIFAR100, DATASETS, TEST_IMAGES, TINYIMAGENET
from ddkit.data.images import normalize
from ddkit.evaluation.test_sets import TestSet


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(spec):
    pixels = torch.randint(0, 256, (TEST_IMAGES, *spec.image_shape), dtype=torch.uint8, generator=seeded())
    return pixels, torch.arange(TEST_IMAGES) % spec.num_classes


def decoded(files):
    """(N, 3, S, S) uint8 of the files' images."""
    return torch.from_numpy(
        np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).transpose(2, 0, 1) for file in files])
    )


@pytest.mark.slow
@pytest.mark.parametrize("spec", [CIFAR100, TINYIMAGENET], ids=lambda spec: spec.name)
def test_noise_with_reversed_labels_is_not_official(spec):
    pixels, labels = noise(spec)
    assert not TestSet(pixels, spec.num_classes - 1 - labels, spec).is_official
    assert not TestSet(normalize(pixels, spec), labels, spec).is_official


def test_a_test_set_of_another_size_is_not_official():
    pixels, labels = noise(CIFAR100)
    assert not TestSet(pixels[:100], labels[:100], CIFAR100).is_official


@functools.cache
def read_tests(path, spec):
    """Pixels, labels and spec of a real test set, decoded by Pillow from the real archive."""
    with zipfile.ZipFile(path) as archive:
        if spec is CIFAR100:
            files = [file for file in archive.namelist() if file.split("/")[1] == "test" and not file.endswith("/")]
            classes = [file.split("/")[-2] for file in files]
        else:
            lines = archive.read("tiny-imagenet-200/val/val_annotations.txt").decode().splitlines()
            files = [f"tiny-imagenet-200/val/images/{line.split()[0]}" for line in lines]
            classes = [line.split()[1] for line in lines]
        names = sorted(set(classes))
        return decoded(map(archive.read, files)), torch.tensor([names.index(name) for name in classes]), spec


@functools.cache
def read_training(path, spec, per_class):
    """The first training images of each class, class by class."""
    by_class = {}
    with zipfile.ZipFile(path) as archive:
        for file in sorted(archive.namelist()):
            _, split, *rest = file.split("/")
            if split == "train" and file.endswith((".webp", ".JPEG")):
                by_class.setdefault(rest[0], []).append(file)
        return decoded(archive.read(file) for name in sorted(by_class) for file in by_class[name][:per_class])


@pytest.fixture
def archives(cifar100_zip, tinyimagenet_zip):
    return {"cifar100": cifar100_zip, "tinyimagenet": tinyimagenet_zip}


@pytest.fixture
def real_tests(archives):
    return {name: read_tests(path, DATASETS[name]) for name, path in archives.items()}


def exchanged(labels, first, second):
    """Labels of which two images of different classes got each other's."""
    changed = labels.clone()
    changed[first], changed[second] = labels[second], labels[first]
    assert not torch.equal(changed, labels)
    return changed


def replaced(pixels, row, image):
    changed = pixels.clone()
    changed[row] = image
    return changed


def stepped(pixels, steps):
    """Pixels that each moved by up to so many steps, as those of another JPEG decoder may."""
    moves = torch.randint(-steps, steps + 1, pixels.shape, generator=seeded())
    return (pixels.short() + moves).clamp(0, 255).to(torch.uint8)


def reversed_order(pixels, labels):
    return pixels.flip(0), labels.flip(0)


def shuffled_order(pixels, labels):
    order = torch.randperm(len(labels), generator=seeded())
    return pixels[order], labels[order]


BOTH = pytest.mark.parametrize("name", ["cifar100", "tinyimagenet"])


def on_both(changes, on_tinyimagenet):
    """Cases of all changes with CIFAR-100, and of some with TinyImageNet, whose pixels are four times as many."""
    names = [("cifar100", what) for what in changes] + [("tinyimagenet", what) for what in changes if what in on_tinyimagenet]
    return [pytest.param(name, changes[what], id=f"{what}-{name}") for name, what in names]


@pytest.mark.slow
class TestRealTestSets:
    @pytest.mark.parametrize("name, order", [
        ("cifar100", lambda pixels, labels: (pixels, labels)), ("cifar100", reversed_order),
        ("cifar100", shuffled_order), ("tinyimagenet", shuffled_order),
    ])  # fmt: skip
    def test_the_real_images_are_official_in_any_order(self, real_tests, name, order):
        pixels, labels, spec = real_tests[name]
        assert TestSet(*order(pixels, labels), spec).is_official

    @BOTH
    def test_a_reference_of_floats_is_official_from_the_same_pixels_or_another_decoders(self, real_tests, name):
        pixels, labels, spec = real_tests[name]
        assert TestSet(normalize(pixels, spec), labels, spec).is_official
        assert TestSet(normalize(stepped(pixels, 1), spec), labels, spec).is_official

    @pytest.mark.parametrize("name, change", on_both({
        "noise of one step": lambda pixels: stepped(pixels, 1),
        "one step brighter": lambda pixels: (pixels.short() + 1).clamp(0, 255).to(torch.uint8),
        "as libjpeg's fast transform decodes":
            lambda pixels: stepped((pixels.short() - torch.tensor([1, 0, 1]).view(3, 1, 1)).clamp(0, 255), 1),
    }, {"as libjpeg's fast transform decodes"}))  # fmt: skip
    def test_pixels_that_differ_by_a_step_are_official(self, real_tests, name, change):
        pixels, labels, spec = real_tests[name]
        assert TestSet(change(pixels), labels, spec).is_official

    @pytest.mark.parametrize("change", [
        lambda labels, classes: classes - 1 - labels,
        lambda labels, classes: (labels + 1) % classes,
        lambda labels, classes: labels[torch.randperm(len(labels), generator=seeded())],
        lambda labels, classes: exchanged(labels, 0, int((labels != labels[0]).nonzero()[0])),
        lambda labels, classes: torch.where(labels == 3, 4, torch.where(labels == 4, 3, labels)),
        lambda labels, classes: torch.randperm(classes, generator=seeded())[labels],
        lambda labels, classes: torch.where(torch.arange(len(labels)) == 5, (labels + 1) % classes, labels),
        lambda labels, classes: labels // 2,
    ], ids=["reversed", "rotated", "shuffled", "two images", "two classes", "another order of classes",
            "one image", "pairs of classes joined"])  # fmt: skip
    def test_wrong_labels_are_not_official(self, real_tests, change):
        pixels, labels, spec = real_tests["cifar100"]
        assert not TestSet(pixels, change(labels, spec.num_classes), spec).is_official

    @pytest.mark.parametrize("name, change", on_both({
        "mirrored": lambda pixels: pixels.flip(3),
        "upside down": lambda pixels: pixels.flip(2),
        "BGR": lambda pixels: pixels.flip(1),
        "transposed": lambda pixels: pixels.transpose(2, 3),
        "moved": lambda pixels: pixels.roll(1, dims=3),
        "noise of four steps": lambda pixels: stepped(pixels, 4),
        "two steps brighter": lambda pixels: (pixels.short() + 2).clamp(0, 255).to(torch.uint8),
        "16 levels": lambda pixels: pixels // 16 * 16,
        "a negative": lambda pixels: replaced(pixels, 7, 255 - pixels[7]),
        "an image twice": lambda pixels: replaced(pixels, 7, pixels[8]),
        "blurred": lambda pixels: torch.nn.functional.avg_pool2d(pixels.float(), 3, 1, 1).round().to(torch.uint8),
    }, {"mirrored", "two steps brighter", "an image twice"}))  # fmt: skip
    def test_changed_images_are_not_official(self, real_tests, name, change):
        pixels, labels, spec = real_tests[name]
        assert not TestSet(change(pixels), labels, spec).is_official

    @pytest.mark.parametrize("mean, std", [
        ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
        ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ])  # fmt: skip
    def test_floats_of_other_constants_are_not_official(self, real_tests, mean, std):
        pixels, labels, spec = real_tests["cifar100"]
        unit = pixels.float() / 255
        floats = (unit - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        assert not TestSet(floats, labels, spec).is_official


@pytest.mark.slow
@BOTH
def test_training_images_are_not_official_even_one_of_them(archives, real_tests, name):
    pixels, labels, spec = real_tests[name]
    per_class = len(labels) // spec.num_classes
    training = read_training(archives[name], spec, per_class)
    assert len(training) == len(labels)
    assert not TestSet(training, torch.arange(spec.num_classes).repeat_interleave(per_class), spec).is_official
    for row in (labels == 0).nonzero().flatten()[:2].tolist():
        assert not TestSet(replaced(pixels, row, training[0]), labels, spec).is_official
