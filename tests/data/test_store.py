"""Opening what is prepared: memory-mapped, exact, and clear about what is missing or damaged."""

import hashlib
import json
import os
import sys

import processes
import pytest
import safetensors.torch
import torch

from ddkit.challenge import CIFAR100
from ddkit.data import glyphs
from ddkit.data.prepare import open_dataset, prepare
from ddkit.data.store import (
    class_titles,
    dataset_spec,
    find_classes,
    list_prepared,
    load_dataset,
    store_facts,
    store_folder,
    train_sha256,
)
from ddkit.errors import BadDataError, MissingDataError, UsageError


@pytest.fixture
def pets(write_tree, photos):
    """A small prepared dataset."""
    prepare("pets", write_tree(photos))
    return store_folder("pets")


def test_loaded_split_has_images_labels_and_names(pets, colors):
    train, test = load_dataset("pets", "train"), load_dataset("pets", "test")
    assert (len(train), len(test), train.class_names) == (6, 4, ("cat", "dog"))
    assert repr(train).startswith("ImageSet(6 images of ") and repr(train).endswith(" pixels, 2 classes)")
    assert (train.images.dtype, train.labels.dtype) == (torch.uint8, torch.int64)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert colors(train.images) == [(0, 0, 7), (0, 1, 7), (0, 2, 7), (100, 0, 7), (100, 1, 7), (100, 2, 7)]


def test_files_are_plain_safetensors_and_their_hash_is_kept(pets):
    tensors = safetensors.torch.load_file(pets / "test.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"images": (4, 3, 8, 8), "labels": (4,)}
    assert train_sha256("pets") == hashlib.sha256((pets / "train.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_opening_a_large_store_reads_almost_nothing(tmp_path, pets):
    """A store of 192 MiB is opened, and only the pixels that are looked at take memory."""
    facts = json.loads((pets / "meta.json").read_text())
    facts["image_size"], facts["splits"]["train"]["images"] = 1024, 64
    (pets / "meta.json").write_text(json.dumps(facts))
    tensors = {"images": torch.zeros(64, 3, 1024, 1024, dtype=torch.uint8), "labels": torch.zeros(64).long()}
    safetensors.torch.save_file(tensors, pets / "train.safetensors")
    program = (
        "import torch, ddkit.data.store as store\n"
        "def resident():\n"
        "    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS'))\n"
        "store.load_dataset('pets', 'train').images[0].sum()\n"  # what is loaded only once
        "before = resident()\n"
        "images = store.load_dataset('pets', 'train').images\n"
        "int(images[3].sum())\n"
        "print(images.shape[0], (resident() - before) // 1024)\n"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the memory in use from /proc")
    finished = processes.run("-c", program)
    assert finished.returncode == 0, finished.stderr
    images, mebibytes = map(int, finished.stdout.split())
    assert images == 64 and mebibytes < 48


def test_numbers_are_measured_on_the_training_split_or_built_in(pets):
    spec = dataset_spec("pets")
    # Red is 0 or 100 equally often, green 0, 1, 2, blue always 7.
    assert spec.mean == (round(50 / 255, 4), round(1 / 255, 4), round(7 / 255, 4))
    assert spec.std == (round(50 / 255, 4), round((2 / 3) ** 0.5 / 255, 4), 1.0)
    assert (spec.name, spec.num_classes, spec.image_size, spec.in_challenge) == ("pets", 2, 8, False)
    assert dataset_spec("cifar100") is CIFAR100


def test_built_in_datasets_have_class_names_before_they_are_prepared():
    assert (class_titles("cifar100")[0], class_titles("cifar100")[99]) == ("apple", "worm")
    assert class_titles("tinyimagenet")[0] == "n01443537"
    assert class_titles("glyphs") == tuple("AEHKLOSTXZ")


def test_prepared_dataset_is_listed(pets):
    assert list_prepared() == ("pets",)
    facts = store_facts("pets")
    assert facts.splits["train"].per_class == (3, 3)
    assert facts.source["kind"] == "image folder" and facts.class_names == ("cat", "dog")
    assert class_titles("pets") == ("cat", "dog")


def test_missing_dataset_names_the_command_that_gets_it():
    with pytest.raises(MissingDataError, match="'cifar100' is not prepared") as caught:
        load_dataset("cifar100", "train")
    assert "ddkit data prepare cifar100" in caught.value.remedy


@pytest.mark.parametrize(("name", "offered"), [("pest", "pets"), ("tinyimagnet", "tinyimagenet"), ("CIFAR100", "cifar100")])
def test_misspelt_name_offers_the_nearest(pets, name, offered):
    for ask in (dataset_spec, lambda name: load_dataset(name, "train")):
        with pytest.raises(UsageError) as caught:
            ask(name)
        assert f"Did you mean '{offered}'?" in caught.value.remedy


@pytest.mark.parametrize("name", ["", "../pets", "a/b", ".hidden", "x" * 65])
def test_impossible_name_is_refused(name):
    with pytest.raises(UsageError, match="cannot be a dataset's name"):
        load_dataset(name, "train")


def test_unknown_split_is_refused(pets):
    with pytest.raises(UsageError, match="no split 'val'"):
        load_dataset("pets", "val")


def damage_version(folder):
    facts = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**facts, "format": 99}))


def damage_fields(folder):
    facts = json.loads((folder / "meta.json").read_text())
    del facts["class_names"]
    (folder / "meta.json").write_text(json.dumps(facts))


def exchange_splits(folder):
    (folder / "train.safetensors").write_bytes((folder / "test.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_version, "format cannot be 99"),
        (damage_fields, "meta.json does not have the expected contents"),
        (exchange_splits, r"holds \(4, 3, 8, 8\), meta.json says \(6, 3, 8, 8\)"),
        (lambda folder: (folder / "train.safetensors").unlink(), "damaged: train.safetensors"),
        (lambda folder: (folder / "train.safetensors").write_bytes(b"short"), "damaged: train.safetensors"),
        (lambda folder: os.truncate(folder / "train.safetensors", 1000), "damaged: train.safetensors"),
        (lambda folder: (folder / "meta.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "not a JSON object"),
    ],
)
def test_damaged_store_names_the_command_that_mends_it(pets, damage, message):
    damage(pets)
    with pytest.raises(BadDataError, match=message) as caught:
        load_dataset("pets", "train")
    assert "ddkit data prepare pets --from PATH --force" in caught.value.remedy


def test_glyphs_are_drawn_on_first_use(monkeypatch):
    for split in glyphs.PER_CLASS:
        monkeypatch.setitem(glyphs.PER_CLASS, split, 2)
    assert list_prepared() == ()
    test = open_dataset("glyphs", "test")
    assert tuple(test.images.shape) == (20, 3, 32, 32) and test.labels.bincount().tolist() == [2] * 10
    assert list_prepared() == ("glyphs",)


def test_classes_are_found_by_name_title_and_number(write_tree, picture):
    annotations = b"v0.JPEG\tn01\nv1.JPEG\tn02\n"
    files = {f"train/{wnid}/images/{wnid}_0.JPEG": picture() for wnid in ("n01", "n02")}
    files |= {"val/val_annotations.txt": annotations, "words.txt": b"n01\tGoldfish, carp\nn02\tsea slug\n"}
    files |= {"val/images/v0.JPEG": picture(), "val/images/v1.JPEG": picture()}
    prepare("fish", write_tree(files))
    assert class_titles("fish") == ("Goldfish", "sea slug")
    assert find_classes("fish", ["sea slug", "goldfish", "n02", "0"]) == [1, 0, 1, 0]
    with pytest.raises(UsageError, match="no class 'goldfsh'") as caught:
        find_classes("fish", ["goldfsh"])
    assert "Did you mean 'Goldfish'?" in caught.value.remedy
