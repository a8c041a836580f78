"""Published sets are converted to the challenge's normalization, and say so."""

import functools

import pytest
import torch
from PIL import Image

from ddkit.challenge import CIFAR100, GLYPHS
from ddkit.data.images import normalize
from ddkit.data.prepare import prepare
from ddkit.data.store import dataset_spec, load_dataset
from ddkit.errors import InvalidSubmissionError, MissingDataError, UsageError
from ddkit.evaluation.published import Conversion, open_published

MEAN, STD = ((torch.tensor(values).view(3, 1, 1)) for values in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))


@pytest.fixture(scope="module")
def pixels(glyph_store):
    """Twelve real images of each letter, (120, 3, 32, 32) uint8, with labels in no order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDKIT_CACHE", str(glyph_store))
        real = load_dataset("glyphs", "train")
        rows = torch.cat([(real.labels == label).nonzero().flatten()[:12] for label in range(10)])
        rows = rows[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
        return real.images[rows].clone(), real.labels[rows].clone()


@pytest.fixture
def save(tmp_path):
    def save(images, labels, name="glyphs.pt"):
        torch.save([images, labels], tmp_path / name)
        return tmp_path / name

    return save


def whiten(pixels, train):
    """kornia's ZCAWhitening(eps=0.1), whose matrix is the inverse root of the covariance plus epsilon."""
    flat = train.flatten(1)
    mean = flat.mean(0)
    variances, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / (len(flat) - 1))
    matrix = (vectors * (variances.clamp(min=0) + 0.1).rsqrt()) @ vectors.T
    return ((pixels.flatten(1) - mean) @ matrix).view(pixels.shape)


WAYS = {
    "pixels": lambda x: x,
    "in [0, 1]": lambda x: x / 255,
    "in [0, 255]": lambda x: x.float(),
    "in [-1, 1]": lambda x: x / 127.5 - 1,
    "CIFAR-10's constants": lambda x: (x / 255 - MEAN) / STD,
    "the challenge's": lambda x: normalize(x, GLYPHS),
}


@pytest.mark.parametrize("way", WAYS)
def test_open_published_of_each_normalization_gives_the_challenges(pixels, save, way):
    images, labels = pixels
    found = open_published(save(WAYS[way](images), labels))
    assert torch.allclose(found.images, normalize(images, GLYPHS), atol=1e-4) and torch.equal(found.labels, labels)
    assert "a list of images and labels" in found.converted
    assert ("normalized again" in found.converted) == (way not in ("pixels", "the challenge's"))
    assert ("CIFAR-10" in found.converted) == (way == "CIFAR-10's constants")
    assert found.provenance["kind"] == "published" and len(found.notes) >= 2


@pytest.mark.parametrize("given", ["cifar10", "0.4914,0.4822,0.4465/0.2023,0.1994,0.2010"])
def test_given_normalization_is_converted(pixels, save, given):
    images, labels = pixels
    noisy = (images / 255 - MEAN) / STD + 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    found = open_published(save(noisy, labels), conversion=Conversion(normalization=given))
    assert torch.allclose(found.images, normalize(images, GLYPHS), atol=0.1)
    assert "as --normalization says" in " ".join(found.notes)


def test_reduction_of_soft_labels_is_a_part_of_the_conversion(pixels, save):
    images, labels = pixels
    soft = torch.nn.functional.one_hot(labels, 10) * 0.5 + 0.05
    found = open_published(save(normalize(images, GLYPHS), soft), conversion=Conversion(argmax=True))
    assert torch.equal(found.labels, labels) and found.converted.endswith("soft labels reduced to their largest class")


def test_another_rounding_of_the_right_constants_is_named_so(pixels, save):
    images, labels = pixels
    mean = torch.tensor(GLYPHS.mean).view(3, 1, 1) + 0.0002
    found = open_published(save((images / 255 - mean) / torch.tensor(GLYPHS.std).view(3, 1, 1), labels))
    assert "normalized again from another rounding of glyphs's constants" in found.converted


@pytest.mark.parametrize("given", ["cifar11", "0.5,0.5/0.2,0.2", "0.5,0.5,0.5/0.2,0,0.2", "-,-,-/1,1,1"])
def test_unknown_normalization_is_refused(given):
    with pytest.raises(UsageError, match="is not a way to normalize"):
        Conversion(normalization=given)


def test_contradicting_conversions_are_refused():
    with pytest.raises(UsageError, match="exclude each other"):
        Conversion(zca=True, normalization="unit")


@pytest.fixture
def small_letters(pixels, tmp_path):
    """The training split of a dataset `small`, the middle 24 pixels of the same letters, whose covariance is smaller."""
    images, labels = pixels
    for row, (image, label) in enumerate(zip(images[..., 4:28, 4:28], labels.tolist(), strict=True)):
        for split in ("train", "test"):
            path = tmp_path / "pictures" / split / str(label) / f"{row:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    prepare("small", tmp_path / "pictures")
    return load_dataset("small", "train")


@pytest.mark.slow
def test_zca_is_undone_when_told_to(small_letters, save):
    images, labels, spec = small_letters.images, small_letters.labels, dataset_spec("small")
    save = functools.partial(save, name="small.pt")
    found = open_published(save(whiten(images / 255, images / 255), labels), conversion=Conversion(zca=True))
    assert torch.allclose(found.images, normalize(images, spec), atol=1e-2)
    assert "ZCA whitening of strength 0.1 undone" in found.converted
    assert not any("warning" in note for note in found.notes)
    assert "0.0% of the values are then outside" in " ".join(found.notes)
    plain = open_published(save(normalize(images, spec), labels), conversion=Conversion(zca=True))
    assert any("do not look whitened" in note for note in plain.notes)
    with pytest.raises(InvalidSubmissionError, match="never whitened"):
        open_published(save(images, labels), conversion=Conversion(zca=True))
    with pytest.raises(InvalidSubmissionError, match="8-bit pixels.*Leave --normalization out"):
        open_published(save(images, labels), conversion=Conversion(normalization="unit"))


def test_bare_tensor_is_converted_class_by_class(pixels, tmp_path):
    images, labels = pixels
    path = tmp_path / "glyphs.pt"
    torch.save((images / 255)[labels.argsort(stable=True)], path)
    found = open_published(path, conversion=Conversion(normalization="unit"))
    assert found.labels.tolist() == sorted([*range(10)] * 12)


@pytest.mark.slow
def test_equal_classes_are_checked_in_their_order_and_unequal_ones_are_not(letters, pixels, save):
    """The order is compared with that of the letters, which are prepared."""
    images, labels = pixels
    open_published(save(images, labels)).check(())
    swapped = open_published(save(images, (labels + 1) % 10))
    with pytest.raises(InvalidSubmissionError, match="sorted by class.*--ignore L"):
        swapped.check(())
    unequal = open_published(save(images[:117], (labels[:117] + 1) % 10))
    unequal.check(())


def test_dataset_comes_from_the_name_or_the_option(pixels, save, tmp_path):
    images, labels = pixels
    path = save(images, labels, "res_DM_ConvNet_10ipc.pt")
    with pytest.raises(UsageError, match="--dataset"):
        open_published(path)
    assert open_published(path, "glyphs").spec == GLYPHS
    with pytest.raises(UsageError, match="not named after"):
        open_published(tmp_path)
    with pytest.raises(MissingDataError):
        open_published(tmp_path / "missing.pt", "glyphs")
    with pytest.raises(UsageError, match="Unknown dataset 'cifar-1000'"):
        open_published(path, "cifar-1000")
    assert open_published(save(images[:3], labels[:3], "set.pt"), "cifar100").spec == CIFAR100
