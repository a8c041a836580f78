"""Which test sets count as the challenge's: the real ones, however decoded and ordered, and no others."""

import pytest
import torch

from ddkit.challenge import CIFAR100, DATASETS, TEST_IMAGES, TINYIMAGENET
from ddkit.data.images import normalize
from ddkit.data.store import load_dataset
from ddkit.evaluation.test_sets import TestSet


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(spec):
    pixels = torch.randint(0, 256, (TEST_IMAGES, *spec.image_shape), dtype=torch.uint8, generator=seeded())
    return pixels, torch.arange(TEST_IMAGES) % spec.num_classes


@pytest.mark.slow
@pytest.mark.parametrize("spec, form", [(CIFAR100, torch.clone), (CIFAR100, lambda pixels: normalize(pixels, CIFAR100)),
                                        (TINYIMAGENET, torch.clone)])  # fmt: skip
def test_noise_with_reversed_labels_is_not_official(spec, form):
    pixels, labels = noise(spec)
    assert not TestSet(form(pixels), spec.num_classes - 1 - labels, spec).is_official


def test_a_test_set_of_another_size_is_not_official():
    pixels, labels = noise(CIFAR100)
    assert not TestSet(pixels[:100], labels[:100], CIFAR100).is_official


@pytest.fixture
def real(request):
    """real("cifar100", "test"): a split of the real dataset, which is prepared once for all tests, and its spec."""

    def find(name, split):
        request.getfixturevalue(f"{name}_store")
        images = load_dataset(name, split)
        return images.images, images.labels, DATASETS[name]

    return find


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
    moves = torch.randint(-steps, steps + 1, pixels.shape, dtype=torch.int16, generator=seeded())
    return (pixels.short() + moves).clamp(0, 255).to(torch.uint8)


def reversed_order(pixels, labels):
    return pixels.flip(0), labels.flip(0)


def shuffled_order(pixels, labels):
    order = torch.randperm(len(labels), generator=seeded())
    return pixels[order], labels[order]


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
    def test_the_real_images_are_official_in_any_order(self, real, name, order):
        pixels, labels, spec = real(name, "test")
        assert TestSet(*order(pixels, labels), spec).is_official

    @pytest.mark.parametrize("name, steps", [("cifar100", 0), ("cifar100", 1), ("tinyimagenet", 1)])
    def test_a_reference_of_floats_is_official_from_the_same_pixels_or_another_decoders(self, real, name, steps):
        pixels, labels, spec = real(name, "test")
        assert TestSet(normalize(stepped(pixels, steps), spec), labels, spec).is_official

    @pytest.mark.parametrize("name, change", on_both({
        "noise of one step": lambda pixels: stepped(pixels, 1),
        "one step brighter": lambda pixels: (pixels.short() + 1).clamp(0, 255).to(torch.uint8),
        "as libjpeg's fast transform decodes":
            lambda pixels: stepped((pixels.short() - torch.ShortTensor([1, 0, 1]).view(3, 1, 1)).clamp(0, 255), 1),
    }, {"as libjpeg's fast transform decodes"}))  # fmt: skip
    def test_pixels_that_differ_by_a_step_are_official(self, real, name, change):
        pixels, labels, spec = real(name, "test")
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
    def test_wrong_labels_are_not_official(self, real, change):
        pixels, labels, spec = real("cifar100", "test")
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
    def test_changed_images_are_not_official(self, real, name, change):
        pixels, labels, spec = real(name, "test")
        assert not TestSet(change(pixels), labels, spec).is_official

    @pytest.mark.parametrize("mean, std", [
        ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
        ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ])  # fmt: skip
    def test_floats_of_other_constants_are_not_official(self, real, mean, std):
        pixels, labels, spec = real("cifar100", "test")
        unit = pixels.float() / 255
        floats = (unit - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        assert not TestSet(floats, labels, spec).is_official


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar100", "tinyimagenet"])
def test_training_images_are_not_official_even_one_of_them(real, name):
    pixels, labels, spec = real(name, "test")
    per_class = len(labels) // spec.num_classes
    training = real(name, "train")[0].unflatten(0, (spec.num_classes, -1))[:, :per_class].flatten(0, 1)
    assert not TestSet(training, torch.arange(spec.num_classes).repeat_interleave(per_class), spec).is_official
    for row in (labels == 0).nonzero().flatten()[:2].tolist():
        assert not TestSet(replaced(pixels, row, training[0]), labels, spec).is_official
