"""Hugging Face datasets as parquet files: columns, class names and splits."""

import builtins
import io
import json

import numpy as np
import pytest

from ddkit.data.class_names import CLASS_NAMES
from ddkit.data.prepare import prepare
from ddkit.data.store import load_dataset
from ddkit.errors import BadDataError, MissingDataError

pyarrow = pytest.importorskip("pyarrow", reason="needs the extra ddkit[parquet]")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra ddkit[parquet]")

NAMES = ("owl", "cat", "dog")
TRAIN, TEST = [2, 0, 1, 0], [1, 0, 2]


@pytest.fixture
def shard(picture):
    """shard([2, 0]) -> the bytes of a parquet file of two images, whose red is the label and whose green is the row."""

    def make(labels, *, names=None, image="image", label="label", plain=False, side=8, **other) -> bytes:
        data = [picture((max(0, value if isinstance(value, int) else 0), k, 7), side=side) for k, value in enumerate(labels)]
        images = data if plain else [{"bytes": item, "path": None} for item in data]
        table = pyarrow.table({image: images, label: labels, **other})
        if names:
            features = {label: {"names": list(names), "_type": "ClassLabel"}, image: {"_type": "Image"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        buffer = io.BytesIO()
        parquet.write_table(table, buffer, row_group_size=2)
        return buffer.getvalue()

    return make


@pytest.fixture
def shards(shard):
    return lambda **options: {
        "data/train-00000-of-00001.parquet": shard(TRAIN, **options),
        "data/validation-00000-of-00001.parquet": shard(TEST, **options),
    }


def colors_of(source, split="test"):
    """(class name, red, green) of each image."""
    from ddkit.data.decoding import read_image

    content = source.splits[split]
    pixels = [read_image(content.tree.read(name), 8)[:, 0, 0].tolist() for name in content.names]
    return [(source.class_names[label], *color[:2]) for label, color in zip(content.labels, pixels, strict=True)]


def check_named(source):
    assert (source.kind, source.class_names, source.numbered) == ("parquet files", ("cat", "dog", "owl"), False)
    assert colors_of(source) == [("cat", 1, 0), ("dog", 2, 2), ("owl", 0, 1)]
    assert colors_of(source, "train") == [("cat", 1, 2), ("dog", 2, 0), ("owl", 0, 1), ("owl", 0, 3)]


@pytest.mark.parametrize("name", ["hf", "hf.zip", "hf.tar.gz"])
def test_names_in_the_files_own_metadata_are_read(write_tree, shards, find, name):
    check_named(find(write_tree({f"hf/{path}": data for path, data in shards(names=NAMES).items()}, name)))


CARD = """---
license: mit
dataset_info:
{dash}features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': owl
          '1': cat
          '2': dog
---
# A card --- with dashes
"""
INFOS = {"other": {"features": {"text": {}}}, "default": {"features": {"label": {"names": list(NAMES)}}}}


@pytest.mark.parametrize(
    "files",
    [
        {"README.md": CARD.replace("{dash}", "  ").encode()},
        {"README.md": CARD.replace("{dash}", "- config_name: default\n  ").encode()},
        {"README.md": CARD.replace("{dash}", "  ").replace("\n", "\r\n").encode("utf-8-sig")},
        {"dataset_infos.json": json.dumps(INFOS).encode()},
        {"README.md": b"no card", "dataset_infos.json": json.dumps(INFOS).encode()},
        {"README.md": b"---\n: [\n---\n", "dataset_infos.json": json.dumps(INFOS).encode()},
    ],
)
def test_class_names_next_to_the_files_are_read(write_tree, shards, find, files):
    check_named(find(write_tree({**shards(), **files})))


@pytest.mark.parametrize(
    "paths",
    [
        ("data/train-00000-of-00001-1359597a978bc4fa.parquet", "data/valid-00000-of-00001-70d52db3c749a935.parquet"),
        ("default/train/0000.parquet", "default/validation/0000.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("train.parquet", "test.parquet"),
        ("parquet-train.parquet", "parquet-valid.parquet"),
        ("cifar100/train-00000-of-00001.parquet", "cifar100/test-00000-of-00001.parquet"),
        ("snapshots/0f3a/data/train-0.parquet", "snapshots/0f3a/data/test-0.parquet"),
    ],
)
def test_places_that_hubs_use_are_known(write_tree, shard, find, paths):
    train, test = paths
    check_named(find(write_tree({train: shard(TRAIN, names=NAMES), test: shard(TEST, names=NAMES)})))


def test_shards_are_read_in_order(write_tree, shard, find):
    files = {f"data/train-0000{k}-of-00002.parquet": shard(TRAIN[2 * k : 2 * k + 2], names=NAMES) for k in range(2)}
    source = find(write_tree({**files, "data/test-00000-of-00001.parquet": shard(TEST, names=NAMES)}))
    assert colors_of(source, "train") == [("cat", 1, 0), ("dog", 2, 0), ("owl", 0, 1), ("owl", 0, 1)]


@pytest.mark.parametrize("options", [{"image": "img", "label": "fine_label"}, {"plain": True}, {"label": "labels"}])
def test_columns_in_use_are_known(write_tree, shards, find, options):
    check_named(find(write_tree(shards(names=NAMES, **options))))


def test_fine_labels_are_taken_and_coarse_ones_left(write_tree, shard, find):
    files = {
        f"{split}.parquet": shard(labels, names=NAMES, label="fine_label", coarse_label=[0] * len(labels))
        for split, labels in (("train", TRAIN), ("test", TEST))
    }
    check_named(find(write_tree(files)))


def test_labels_that_are_names_are_read(write_tree, shard, find):
    files = {f"{split}.parquet": shard([NAMES[k] for k in labels]) for split, labels in (("train", TRAIN), ("test", TEST))}
    source = find(write_tree(files))
    assert (source.class_names, source.numbered) == (("cat", "dog", "owl"), False)
    assert [row for _, _, row in colors_of(source)] == [0, 2, 1]


def test_labels_without_names_are_numbers_in_their_order(write_tree, shard, find):
    labels = list(range(12))
    source = find(write_tree({"train.parquet": shard(labels), "test.parquet": shard(labels)}))
    assert source.numbered and source.class_names[:3] == ("00", "01", "02")
    assert [red for _, red, _ in colors_of(source)] == labels


def test_some_labels_of_minus_one_without_names_raise_bad_data_error(write_tree, shard, find):
    with pytest.raises(BadDataError, match="rows with the label -1, which has no class name"):
        find(write_tree({"train.parquet": shard([2, -1, 1, 0]), "test.parquet": shard(TEST)}))


def test_test_split_with_secret_labels_is_left_for_the_labeled_one(write_tree, shard, find):
    files = {"train.parquet": shard(TRAIN, names=NAMES), "valid.parquet": shard(TEST, names=NAMES)}
    check_named(find(write_tree({**files, "test.parquet": shard([-1, -1], names=NAMES)})))


def test_second_labeled_test_split_is_noted(write_tree, shard, find):
    files = {f"{split}.parquet": shard(TEST, names=NAMES) for split in ("train", "test", "validation")}
    (note,) = find(write_tree(files)).notes
    assert "test and in validation" in note and "--test-split validation" in note
    assert find(write_tree(files), test_split="validation").splits["test"].names[0].startswith("validation")


@pytest.mark.parametrize("names", [lambda names: names, lambda names: ["cra" if name == "crab" else name for name in names]])
def test_cifar100_has_the_official_order(write_tree, shard, names):
    labels = list(range(100))
    files = {
        f"cifar100/{split}-00000-of-00001.parquet": shard(
            labels[::-1], names=names(CLASS_NAMES["cifar100"]), image="img", label="fine_label", side=32
        )
        for split in ("train", "test")
    }
    prepare("cifar100", write_tree(files))
    test = load_dataset("cifar100", "test")
    assert test.class_names == CLASS_NAMES["cifar100"]
    assert test.images[:, 0, 0, 0].tolist() == test.labels.tolist() == labels


def test_tinyimagenet_has_the_official_order_whatever_the_numbers(write_tree, shard):
    shuffled = np.random.default_rng(0).permutation(CLASS_NAMES["tinyimagenet"]).tolist()
    files = {f"data/{s}-0.parquet": shard(list(range(200)), names=shuffled, side=64) for s in ("train", "valid")}
    prepare("tinyimagenet", write_tree(files))
    test = load_dataset("tinyimagenet", "test")
    assert test.class_names == CLASS_NAMES["tinyimagenet"]
    assert [shuffled[red] for red in test.images[:, 0, 0, 0].tolist()] == [test.class_names[label] for label in test.labels]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shard: {"train.parquet": b"PAR1 and no more"}, "train.parquet is damaged"),
        (lambda shard: {"test.parquet": None}, r"no labeled images in 'test' \(or 'val'\)"),
        (lambda shard: {"test.parquet": shard([0, 1], names=NAMES)}, "only one of the splits has the classes 2"),
        (lambda shard: {"test.parquet": shard([0, 1, 3], names=NAMES)}, "rows with the label 3, which has no class name"),
        (lambda shard: {"test.parquet": shard([0, None, 2], names=NAMES)}, "rows with the label None"),
        (lambda shard: {"test.parquet": shard([[1], [0], [2]])}, "test.parquet has no column of labels; it has image, label"),
        (lambda shard: {"test.parquet": shard(TEST, label="x")}, "test.parquet has no column of labels; it has image, x"),
        (lambda shard: {"test.parquet": shard(TEST, image="x")}, "test.parquet has no column of image files"),
    ],
)
def test_files_that_do_not_fit_are_refused(write_tree, shard, find, change, message):
    files = {"train.parquet": shard(TRAIN, names=NAMES), "test.parquet": shard(TEST, names=NAMES), **change(shard)}
    with pytest.raises(BadDataError, match=message):
        find(write_tree({name: data for name, data in files.items() if data is not None}))


def test_row_without_an_image_is_named(write_tree, shards, picture):
    files = shards(names=NAMES)
    table = pyarrow.table({"image": [picture(), picture(), None], "label": ["owl", "cat", "dog"]})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    path = write_tree({name: buffer.getvalue() for name in files})
    with pytest.raises(BadDataError, match=r"1 file cannot be used: data/train-00000-of-00001.parquet, row 0000002"):
        prepare("pets", path)


def test_missing_pyarrow_is_named_with_the_command_that_installs_it(write_tree, shards, find, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    path = write_tree(shards(names=NAMES))
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDataError, match="pyarrow, which reads them, is not installed") as caught:
        find(path)
    assert "pip install 'ddkit[parquet]'" in caught.value.remedy and caught.value.exit_code == 3
