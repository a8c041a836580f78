"""Sets in the layouts of others' code, as files that torch.save wrote and as folders of images."""

import argparse
import os
from collections import OrderedDict

import pytest
import torch
from PIL import Image

from ddkit.challenge import CIFAR100, GLYPHS
from ddkit.errors import BadFileError, InvalidSubmissionError, UsageError
from ddkit.sets.published import holds_containers, is_published_folder, labels_next_to, read_published

LABELS = torch.tensor([7, 0, 3, 3, 9, 1, 3])  # in no order, with classes that have none, one and three images


@pytest.fixture
def images():
    return torch.randn(len(LABELS), 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def save(tmp_path):
    def save(value, name="set.pt", **options):
        torch.save(value, tmp_path / name, **options)
        return tmp_path / name

    return save


LAYOUTS = {
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "labels as a column": lambda x, y: [x, y[:, None]],
    "labels as a list of ints": lambda x, y: (x, y.tolist()),
    "labels as uint8": lambda x, y: [x, y.to(torch.uint8)],
    "labels as floats": lambda x, y: [x, y.float()],
    "one-hot labels": lambda x, y: [x, torch.nn.functional.one_hot(y, 10)],
    "parameters": lambda x, y: [torch.nn.Parameter(x), y],
    "list of pairs": lambda x, y: [[image, int(label)] for image, label in zip(x, y, strict=True)],
    "list of pairs of tensors": lambda x, y: list(zip(x, y, strict=True)),
    "dict": lambda x, y: {"images": x, "labels": y},
    "dict of other names": lambda x, y: {"lr": 0.01, "X_syn": x, "y-syn": y, "args": argparse.Namespace(ipc=1)},
    "ordered dict": lambda x, y: OrderedDict(data=x, targets=y),
    "dataset condensation": lambda x, y: {"data": [[x, y], [x + 1, y]], "accs_all_exps": {"ConvNet": [0.1]}},
    "channels last": lambda x, y: [x.permute(0, 2, 3, 1).contiguous(), y],
    "a view": lambda x, y: [torch.cat([x, x])[: len(x)], y],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_published_of_each_layout_gives_images_and_labels(save, images, layout):
    path = save(LAYOUTS[layout](images, LABELS))
    read = read_published(path, GLYPHS)
    assert torch.equal(read.images, images.detach()) and read.images.is_contiguous()
    assert torch.equal(read.labels, LABELS) and read.labels.dtype == torch.int64
    assert holds_containers(path)


def test_read_published_of_half_precision_gives_float32(save, images):
    read = read_published(save([images.half(), LABELS]), GLYPHS)
    assert torch.equal(read.images, images.half().float())


def test_read_published_of_pixels_keeps_uint8(save, images):
    pixels = images.clamp(0, 1).mul(255).to(torch.uint8)
    for stored in (pixels, pixels.long()):
        assert torch.equal(read_published(save([stored, LABELS]), GLYPHS).images, pixels)


@pytest.mark.parametrize("kind", [list, dict])
def test_read_published_of_a_tensor_for_each_class_labels_them(save, kind):
    counts = [1, 2, 3, 1, 1, 1, 1, 1, 1, 4]
    classes = {label: torch.full((count, 3, 32, 32), float(label)) for label, count in enumerate(counts)}
    read = read_published(save(classes if kind is dict else list(classes.values())), GLYPHS)
    assert torch.equal(read.images[:, 0, 0, 0].long(), read.labels)
    assert torch.bincount(read.labels).tolist() == counts


def test_read_published_of_two_files_takes_the_labels_next_to_the_images(save, images):
    path = save(images, "images_best.pt")
    save(LABELS, "labels_best.pt")
    read = read_published(path, GLYPHS)
    assert torch.equal(read.labels, LABELS) and "labels_best.pt" in read.layout and not read.one_file
    assert labels_next_to(path) == path.with_name("labels_best.pt")


def test_one_tensor_without_labels_is_taken_class_by_class(save):
    path = save(torch.zeros(20, 3, 32, 32))
    assert not holds_containers(path) and labels_next_to(path) is None and not is_published_folder(path.parent)
    assert read_published(save(torch.zeros(20, 3, 32, 32)), GLYPHS).labels.tolist() == sorted([*range(10)] * 2)
    with pytest.raises(InvalidSubmissionError, match="21 images without labels"):
        read_published(save(torch.zeros(21, 3, 32, 32)), GLYPHS)


def test_soft_labels_are_refused_or_reduced_when_told_to(save, images):
    soft = torch.full((len(LABELS), 10), 0.05).scatter_(1, LABELS[:, None], 0.55)
    path = save([images, soft])
    with pytest.raises(InvalidSubmissionError, match="soft labels.*--argmax"):
        read_published(path, GLYPHS)
    read = read_published(path, GLYPHS, argmax=True)
    assert torch.equal(read.labels, LABELS) and "reduced to their largest class" in " ".join(read.notes)


@pytest.mark.parametrize(
    "layout", [lambda x, y: [x, y], lambda x, y: {"images": x, "labels": y}, lambda x, y: [(x, y), (x, y)]]
)
def test_labels_count_as_reduced_if_they_were_soft_in_any_layout(save, images, layout):
    one_hot = torch.nn.functional.one_hot(LABELS, 10).float()
    soft = read_published(save(layout(images, 0.5 * one_hot + 0.05)), GLYPHS, argmax=True)
    hard = [read_published(save(layout(images, labels)), GLYPHS, argmax=True) for labels in (one_hot, LABELS)]
    assert soft.reduced and not any(read.reduced for read in hard)
    assert all(torch.equal(read.labels, LABELS) for read in (soft, *hard))


def test_soft_labels_in_a_file_of_their_own_count_as_reduced(save, images):
    path = save(images, "images_best.pt")
    save(torch.nn.functional.one_hot(LABELS, 10) * 0.5 + 0.05, "labels_best.pt")
    read = read_published(path, GLYPHS, argmax=True)
    assert read.reduced and not read.one_file and torch.equal(read.labels, LABELS)


@pytest.mark.parametrize("value, said", [
    (lambda x, y: [x, y[:-1]], "7 images and 6 labels"),
    (lambda x, y: [x, y + 1], "run from 1 to 10"),
    (lambda x, y: [x, y - 1], "run from -1 to 8"),
    (lambda x, y: [x, y + 0.5], "fractions"),
    (lambda x, y: [x, torch.rand(7, 1000)], "1000 values for each image"),
    (lambda x, y: [x[:, :, :16, :16].clone(), y], r"the shape \(7, 3, 16, 16\)"),
    (lambda x, y: [x.fill_(torch.nan), y], "NaN"),
    (lambda x, y: [torch.zeros(1, 3, 32, 32).expand(7, 3, 32, 32), y], "expanded"),
    (lambda x, y: {"network.weight": x}, "state dict"),
    (lambda x, y: {"pictures": 3}, "no images with labels"),
    (lambda x, y: [], "no images with labels"),
    (lambda x, y: [[x[0], 1], [x[0, :2].clone(), 2]], "differ in shape"),
    (lambda x, y: {3: x, 12: x}, "run from 3 to 12"),
    (lambda x, y: [x, [2**70] * 7], "run from 9223372036854775807 to"),
    (lambda x, y: [[image, 10] for image in x], "run from 10 to 10; the classes of glyphs are 0 to 9"),
    (lambda x, y: [[image, -(2**70)] for image in x], "run from -9223372036854775808 to"),
    (lambda x, y: {2**70: x}, "run from 9223372036854775807 to"),
])  # fmt: skip
def test_read_published_of_what_does_not_fit_raises_and_says_what_it_is(save, images, value, said):
    with pytest.raises(InvalidSubmissionError, match=said):
        read_published(save(value(images, LABELS)), GLYPHS)


def test_read_published_of_one_hot_labels_of_truth_values_reads_their_classes(save, images):
    read = read_published(save([images, torch.nn.functional.one_hot(LABELS, 10).bool()]), GLYPHS)
    assert torch.equal(read.labels, LABELS) and not read.reduced


def test_read_published_of_soft_labels_that_are_nan_raises(save, images):
    with pytest.raises(InvalidSubmissionError, match="soft labels hold values that are NaN"):
        read_published(save([images, torch.full((7, 10), torch.nan)]), GLYPHS, argmax=True)


def test_read_published_with_damaged_labels_in_a_second_file_names_that_file(save, images):
    path, labels = save(images, "images_best.pt"), save(LABELS, "labels_best.pt")
    labels.write_bytes(labels.read_bytes()[:200])
    with pytest.raises(InvalidSubmissionError, match=r"/labels_best\.pt: The file is damaged"):
        read_published(path, GLYPHS)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_read_published_of_a_pipe_raises_usage_error_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "set.pt")
    with pytest.raises(UsageError, match="is a pipe or a device"):
        read_published(tmp_path / "set.pt", GLYPHS)


class Harmful:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (self.witness,)


def test_read_published_of_a_file_with_code_runs_nothing_and_refuses(save, images, tmp_path):
    path = save([images, LABELS, Harmful(str(tmp_path / "witness"))][:2] + [Harmful(str(tmp_path / "witness"))])
    with pytest.raises(InvalidSubmissionError, match="not executed"):
        read_published(path, GLYPHS)
    assert not (tmp_path / "witness").exists()


def test_read_published_of_an_old_or_damaged_file_raises(save, images, tmp_path):
    path = save([images, LABELS], _use_new_zipfile_serialization=False)
    with pytest.raises(InvalidSubmissionError, match=r"before PyTorch 1\.6"):
        read_published(path, GLYPHS)
    whole = save([images, LABELS]).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidSubmissionError, match="damaged"):
        read_published(path, GLYPHS)
    with pytest.raises(BadFileError):
        read_published(tmp_path / "missing.pt", GLYPHS)


def folder_of(path, names, side=32):
    for shade, name in enumerate(names):
        (path / name).mkdir(parents=True)
        for k in range(1 + shade % 3):
            Image.new("RGB", (side, side), (shade, k, 0)).save(path / name / f"{k}.png")
    return path


@pytest.mark.parametrize("names", [
    ["A", "E", "H"], ["a", "e", "h"], ["0", "1", "2"], ["new000", "new001", "new002"], ["train/A", "train/E", "train/H"],
])  # fmt: skip
def test_read_published_of_a_folder_labels_images_by_class(tmp_path, names):
    read = read_published(folder_of(tmp_path / "set", names), GLYPHS)
    assert read.labels.tolist() == [0, 1, 1, 2, 2, 2]
    assert read.images.dtype == torch.uint8 and torch.equal(read.images[:, 0, 0, 0].long(), read.labels)


def test_read_published_of_a_folder_knows_class_names_with_spaces(tmp_path):
    read = read_published(folder_of(tmp_path / "set", ["Aquarium fish", "sweet-pepper"]), CIFAR100)
    assert read.labels.tolist() == [1, 83, 83]


def test_read_published_of_a_folder_with_a_class_named_like_a_split_takes_it_as_a_class(tmp_path):
    read = read_published(folder_of(tmp_path / "set", ["tractor", "train"]), CIFAR100)
    assert read.labels.tolist() == [89, 90, 90]


@pytest.mark.parametrize("names, side, said", [
    (["A", "B"], 32, "'B' is not a class of glyphs"), (["8", "9", "10"], 32, "not a class"), (["A"], 28, "28 x 28 pixels"),
    ([], 32, "no folders of classes"),
])  # fmt: skip
def test_read_published_of_a_folder_that_does_not_fit_raises(tmp_path, names, side, said):
    (tmp_path / "set").mkdir()
    with pytest.raises(InvalidSubmissionError, match=said):
        read_published(folder_of(tmp_path / "set", names, side), GLYPHS)


def test_read_published_of_a_folder_with_a_damaged_image_names_it(tmp_path):
    path = folder_of(tmp_path / "set", ["A", "E"])
    (path / "E" / "0.png").write_bytes(b"no image")
    with pytest.raises(InvalidSubmissionError, match=r"E/0\.png cannot be read"):
        read_published(path, GLYPHS)
