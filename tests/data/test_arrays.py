"""Numpy arrays as sources: which of them hold what, and which order the classes come out in."""

import io
import tracemalloc

import numpy as np
import pytest

from ddkit.data.class_names import CLASS_NAMES
from ddkit.data.prepare import prepare
from ddkit.data.store import load_dataset
from ddkit.errors import BadDataError

TRAIN, TEST = [2, 0, 1, 0], [1, 0, 2]  # labels


def images(labels, first=0):
    """(N, 8, 8, 3) uint8; image k has the color (first + k, label, 7) but for a red pixel at the top right."""
    values = np.zeros((len(labels), 8, 8, 3), np.uint8)
    for k, label in enumerate(labels):
        values[k] = (first + k, label, 7)
    values[:, 0, 7] = (255, 0, 0)
    return values


def arrays(**changes):
    return {
        "x_train": images(TRAIN),
        "y_train": np.array(TRAIN),
        "x_test": images(TEST, 50),
        "y_test": np.array(TEST),
        **changes,
    }


@pytest.fixture
def save(tmp_path):
    def to(content, name="data.npz"):
        np.savez(tmp_path / name, **content)
        return tmp_path / name

    return to


def check(source):
    assert source.splits["train"].labels == (0, 0, 1, 2) and source.splits["test"].labels == (0, 1, 2)
    train, test = (np.concatenate(list(source.splits[split].blocks())) for split in ("train", "test"))
    assert train.shape == (4, 3, 8, 8)
    assert train[:, :, 4, 4].tolist() == [[1, 0, 7], [3, 0, 7], [2, 1, 7], [0, 2, 7]]
    assert test[:, :, 4, 4].tolist() == [[51, 0, 7], [50, 1, 7], [52, 2, 7]]
    assert (train[:, :, 0, 7] == [255, 0, 0]).all()


RENAMED = {
    "Keras": ("x_train", "y_train", "x_test", "y_test"),
    "capitals": ("X_train", "Y_train", "X_test", "Y_test"),
    "words": ("train_images", "train_labels", "test_images", "test_labels"),
    "validation": ("train_data", "train_targets", "val_data", "val_targets"),
    "reversed": ("images_training", "labels_training", "images_testing", "labels_testing"),
}


@pytest.mark.parametrize("names", RENAMED.values(), ids=RENAMED)
def test_arrays_are_distinguished_by_names_and_shapes(save, find, names):
    source = find(save(dict(zip(names, arrays().values(), strict=True))))
    check(source)
    assert (source.kind, source.class_names, source.numbered) == ("arrays", ("0", "1", "2"), True)


@pytest.mark.parametrize(
    "changed",
    [
        lambda x, y: (x.transpose(0, 3, 1, 2), y),
        lambda x, y: (x.transpose(0, 3, 1, 2).reshape(len(x), -1), y),
        lambda x, y: ((x / 255).astype(np.float32), y),
        lambda x, y: (x.astype(np.float64), y),
        lambda x, y: (x.astype(np.int32), y[:, None]),
        lambda x, y: (x, np.eye(3)[y]),
        lambda x, y: (x, y.astype(np.uint8)),
        lambda x, y: (x, y.astype(np.float32)),
    ],
)
def test_forms_in_use_are_read(save, find, changed):
    (x_train, y_train), (x_test, y_test) = changed(images(TRAIN), np.array(TRAIN)), changed(images(TEST, 50), np.array(TEST))
    check(find(save({"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test})))


def test_named_classes_are_sorted_with_their_labels(save, find):
    source = find(save(arrays(class_names=np.array(["owl", "cat", "dog"]))))
    assert (source.class_names, source.numbered) == (("cat", "dog", "owl"), False)
    assert source.splits["test"].labels == (0, 1, 2)
    test = np.concatenate(list(source.splits["test"].blocks()))
    assert test[:, 1, 4, 4].tolist() == [1, 2, 0], "labels in the file, of cat, dog and owl"


def test_fine_labels_are_taken_and_coarse_ones_left(save, find):
    content = arrays(train_coarse_labels=np.zeros(4, int), test_coarse_labels=np.zeros(3, int))
    content["train_fine_labels"], content["test_fine_labels"] = content.pop("y_train"), content.pop("y_test")
    check(find(save(content)))


def test_arrays_in_a_folder_and_in_a_zip_are_read(write_tree, save, find, tmp_path):
    files = {}
    for name, array in arrays().items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        files[f"data/{name}.npy"] = buffer.getvalue()
    check(find(write_tree(files, "folder")))
    check(find(write_tree(files, "arrays.tar.gz")))
    check(find(write_tree({"cifar.npz": save(arrays()).read_bytes(), "README.md": b""}, "outer.zip")))
    np.savez_compressed(tmp_path / "small.npz", **arrays())
    check(find(tmp_path / "small.npz"))


def test_one_npz_for_each_split_is_read(save, find, tmp_path):
    (tmp_path / "both").mkdir()
    save({"images": images(TRAIN), "labels": np.array(TRAIN)}, "both/train.npz")
    save({"images": images(TEST, 50), "labels": np.array(TEST)}, "both/test.npz")
    check(find(tmp_path / "both"))


def test_objects_in_an_npz_for_each_split_are_left_out(save, find, tmp_path):
    (tmp_path / "both").mkdir()
    objects = np.array([object()] * 2)
    save({"info": objects, "images": images(TRAIN), "labels": np.array(TRAIN)}, "both/train.npz")
    save({"images": images(TEST, 50), "labels": np.array(TEST), "info": objects}, "both/test.npz")
    check(find(tmp_path / "both"))


def test_other_arrays_are_not_taken_for_labels_or_class_names(save, find):
    others = {"train_boxes": np.array([[1, 0, 4, 4]] * 4), "test_filenames": np.array(["b.png", "a.png", "c.png"])}
    check(find(save({**others, **arrays(train_features=np.zeros((4, 512)))})))


def test_numbered_classes_of_cifar100_are_the_official_ones(save, caplog):
    labels = np.arange(100)[::-1]
    values = np.zeros((100, 32, 32, 3), np.uint8)
    values[:, :, :, 0] = labels[:, None, None]
    prepare("cifar100", save({"x_train": values, "y_train": labels, "x_test": values, "y_test": labels}))
    train = load_dataset("cifar100", "train")
    assert train.class_names == CLASS_NAMES["cifar100"]
    assert train.images[:, 0, 0, 0].tolist() == train.labels.tolist() == list(range(100))
    assert "the numbers are taken for those of CIFAR-100" in caplog.text


def test_numbered_classes_of_tinyimagenet_are_refused(save):
    """Its classes are numbered by sorted names in some copies, and by wnids.txt in others."""
    values, labels = np.zeros((200, 64, 64, 3), np.uint8), np.arange(200)
    with pytest.raises(BadDataError, match="tinyimagenet is numbered in more than one way"):
        prepare("tinyimagenet", save({"x_train": values, "y_train": labels, "x_test": values, "y_test": labels}))


def test_pixels_take_a_few_times_their_own_memory(save, find):
    pixels, labels = np.zeros((2000, 32, 32, 3), np.uint8), np.arange(2000) % 10
    path = save({"x_train": pixels, "y_train": labels, "x_test": pixels[:10], "y_test": labels[:10]})
    tracemalloc.start()
    find(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 5 * pixels.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_test": None}, "no labeled images in 'test'"),
        ({"y_train": None}, "no labeled images in 'train'"),
        ({"y_test": np.array([0, 1])}, "x_test has 3 images and y_test 2 labels"),
        ({"y_test": np.array([0, 1, 10**12])}, "the labels go up to 1,000,000,000,000, and there are 4 training images"),
        ({"y_test": np.array([0, 1, -1])}, "'test' has labels beyond its 3 class names"),
        ({"x_train": np.zeros((4, 8, 9, 3), np.uint8)}, "which is not of square RGB images"),
        ({"x_train": np.random.default_rng(0).normal(size=(4, 8, 8, 3))}, "x_train does not hold 8-bit images"),
        ({"x_train": np.array([object()] * 4)}, "no labeled images in 'train'"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(save, find, change, message):
    with pytest.raises(BadDataError, match=message):
        find(save({name: array for name, array in arrays(**change).items() if array is not None}))
