"""Inputs as people have them, from public reports: each is prepared, with the right labels, or refused with the reason."""

import os
import shutil
import sys
import tarfile
from collections import Counter

import processes
import pytest
from click.testing import CliRunner

from ddkit.cli import main
from ddkit.data.class_names import CLASS_NAMES
from ddkit.data.store import load_dataset, store_facts

WNIDS = ("n01443537", "n01629819", "n02124075")


def prepared(source, *words, name="mine"):
    """What the command says, and (class, images) of both splits. Raises AssertionError unless it succeeds."""
    done = CliRunner().invoke(main, ["data", "prepare", name, "--from", str(source), *words])
    assert done.exit_code == 0, done.output
    counts = []
    for split in ("train", "test"):
        images = load_dataset(name, split)
        counts.append(dict(Counter(images.class_names[label] for label in images.labels.tolist())))
    return " ".join(done.stderr.split()), *counts


@pytest.mark.parametrize("name", ["01-tiny-val-sorted-annotations-kept", "02-tiny-val-sorted-test-left"])
def test_sorted_validation_images_of_tinyimagenet_are_the_test_split(case, name):
    _, train, test = prepared(case(name))
    assert (train, test) == (dict.fromkeys(WNIDS, 4), dict.fromkeys(WNIDS, 2))
    assert store_facts("mine").listed_order == ("n01629819", "n02124075", "n01443537")


@pytest.mark.parametrize("name", ["i-blank-last-line", "j-bom", "m-words-latin1"])
def test_annotations_and_words_in_any_text_are_read(case, name):
    _, train, test = prepared(case("04-tiny-annotations-text") / name)
    assert (train, test) == (dict.fromkeys(WNIDS, 4), dict.fromkeys(WNIDS, 2))
    titles = store_facts("mine").class_titles
    assert titles[0] == "goldfish" and titles[1] == ("salamandre été" if name.startswith("m") else "European fire salamander")


def test_folder_that_torchvision_makes_is_cifar100(case, tmp_path):
    archive = case("05-torchvision-root") / "cifar-100-python.tar.gz"
    shutil.copy(archive, tmp_path)
    for unpacked in (False, True):
        if unpacked:
            with tarfile.open(archive) as content:
                content.extractall(tmp_path, filter="data")
        _, train, test = prepared(tmp_path, "--force", name="cifar100")
        assert tuple(train) == tuple(test) == CLASS_NAMES["cifar100"]


def test_zip_from_kaggle_is_cifar100(case):
    _, train, test = prepared(case("06-kaggle-cifar100-zip") / "kaggle-cifar100.zip", name="cifar100")
    assert tuple(train) == tuple(test) == CLASS_NAMES["cifar100"]


@pytest.mark.parametrize("name", ["z-dot.zip", "z-dottop.zip"])
def test_zip_with_names_that_begin_with_a_dot_is_read(case, name):
    _, train, test = prepared(case("07-zip-dot-slash") / name)
    assert (train, test) == ({"ant": 3, "bee": 3}, {"ant": 2, "bee": 2})


@pytest.mark.parametrize("name", ["k1.zip", "k2.zip"])
def test_layout_two_folders_deep_is_found(case, name):
    _, train, test = prepared(case("09-nested-top") / name)
    assert (train, test) == (dict.fromkeys(WNIDS, 4), dict.fromkeys(WNIDS, 2))


def test_tgz_of_an_image_folder_is_read(case):
    _, train, test = prepared(case("10-imagenette-tgz") / "imagenette2-160.tgz", "--image-size", "64")
    assert train == {"n01440764": 3, "n02102040": 3, "n02979186": 3} and test == dict.fromkeys(train, 2)


@pytest.mark.slow
@pytest.mark.parametrize("locked", ["whole cache", "lock file"])
def test_prepared_dataset_in_a_cache_of_another_user_is_used(letters, own_cache, locked):
    """Root may write anywhere unless it gives up its capabilities, as no ordinary user may."""
    code = "from ddkit.cli import main\nmain(['data', 'prepare', 'glyphs'])"
    lock = own_cache / ".glyphs.lock"
    lock.touch()
    if os.geteuid() == 0:
        if sys.platform != "linux":
            pytest.skip("giving up the rights of root needs Linux")
        code = f"import ctypes, struct\nctypes.CDLL(None).capset(struct.pack('Ii', 0x20080522, 0), bytes(24))\n{code}"
        for path in (own_cache, *own_cache.rglob("*")):
            os.chown(path, 65534, 65534)
    lock.chmod(0o444)
    own_cache.chmod(0o777 if locked == "lock file" else 0o555)
    try:
        done = processes.run("-c", code)
    finally:
        own_cache.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert "prepared already" in done.stderr and "6,000" not in done.stderr


def test_parquet_files_of_a_hugging_face_dataset_are_read(case):
    pytest.importorskip("pyarrow", reason="needs the extra ddkit[parquet]")
    _, train, test = prepared(case("15-hf-parquet") / "hf")
    assert (train, test) == ({"0": 4, "1": 4, "2": 4}, {"0": 2, "1": 2, "2": 2})


def test_labeled_val_and_test_are_named_and_can_be_chosen(case):
    folder = case("18-val-and-test")
    said, _, test = prepared(folder)
    assert "labeled images in test and in val; 'test' became the test split" in said and "--test-split val" in said
    assert test == dict.fromkeys(WNIDS, 1)
    said, _, test = prepared(folder, "--test-split", "val", "--force")
    assert "became the test split" not in said
    assert test == dict.fromkeys(WNIDS, 2)
