"""An image folder of larger pictures, four classes of them, from preparing to a score by a network made for them."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ddkit.cli import main

CLASSES = 4
DOGS_AND_CATS = ("n02085620", "n02094433", "n02123045", "n02123394")


@pytest.fixture
def pictures(tmp_path):
    """<split>/<class>/<image>: each class a color of its own, four to train on and one to test on, none of them square."""
    for split, count in (("train", 4), ("val", 1)):
        for label in range(CLASSES):
            folder = tmp_path / "pictures" / split / f"breed-{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                picture = Image.new("HSV", (150, 140), (25 * label, 160 + 20 * i, 200)).convert("RGB")
                picture.save(folder / f"{i}.jpg")
    return tmp_path / "pictures"


@pytest.fixture
def dogs_and_cats(tmp_path, tinyimagenet_zip):
    """As many real photographs of four of TinyImageNet's classes."""
    inside = "tiny-imagenet-200"
    with zipfile.ZipFile(tinyimagenet_zip) as archive:
        annotations = archive.read(f"{inside}/val/val_annotations.txt").decode().splitlines()
        names = sorted(archive.namelist())
        for wnid in DOGS_AND_CATS:
            train = [name for name in names if name.startswith(f"{inside}/train/{wnid}/images/") and name.endswith(".JPEG")]
            val = [f"{inside}/val/images/{row.split()[0]}" for row in annotations if row.split()[1] == wnid]
            for split, chosen in (("train", train[:4]), ("val", val[:1])):
                folder = tmp_path / "photographs" / split / wnid
                folder.mkdir(parents=True)
                for name in chosen:
                    (folder / Path(name).name).write_bytes(archive.read(name))
    return tmp_path / "photographs"


@pytest.fixture
def one_thread(tmp_path, monkeypatch):
    """Threads would only wait for each other. Commands run in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prepare(folder, size):
    prepared = ddkit("data", "prepare", "breeds", "--from", str(folder), "--image-size", str(size))
    assert prepared["image_size"] == size and len(prepared["class_names"]) == CLASSES


def evaluate(made, size):
    assert torch.load(made["tensor"], weights_only=True).shape == (CLASSES, 3, size, size)
    words = ("--network", "resnet_ap10", "--epochs-setting", "0", "--rounds", "1")
    (result,) = ddkit("evaluate", made["tensor"], *words)["results"]
    assert result["network"] == "resnet_ap10" and result["dataset"] == "breeds" and not result["official"]
    assert result["accuracies"][0] in [correct / CLASSES for correct in range(CLASSES + 1)]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_folder_of_larger_pictures_goes_all_the_way_to_a_score(pictures):
    prepare(pictures, 128)
    trained = ddkit("train", "--dataset", "breeds", "--preset", "demo", "--batch-size", "4", "--time", "1s",
                    "--no-compile", "--track-every", "0")  # fmt: skip
    assert trained["steps"] >= 1
    tuned = ddkit("train", "--method", "minimax", "--dataset", "breeds", "--batch-size", "4", "--steps", "2")
    assert tuned["steps"] == 2
    evaluate(ddkit("generate", "--dataset", "breeds", "--ipc", "1", "--sampling-steps", "2", "--model", tuned["folder"]), 128)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_photographs_of_256_pixels_are_prepared_and_evaluated(dogs_and_cats):
    prepare(dogs_and_cats, 256)
    evaluate(ddkit("generate", "--dataset", "breeds", "--ipc", "1", "--from-real", "first"), 256)


def test_size_that_a_preset_cannot_make_is_refused_before_long_work(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ddkit("data", "prepare", "breeds", "--from", "pictures", "--image-size", "136")
    refused = CliRunner().invoke(main, ["train", "--dataset", "breeds", "--preset", "tiny"])
    told = " ".join(refused.output.split())
    assert refused.exit_code == 2 and "Traceback" not in told
    assert "cannot encode images of 136 pixels: their side must be a multiple of 16." in told
    assert "Prepare the dataset with --image-size 128, or choose another preset." in told
    assert not (tmp_path / "runs").exists()


def ddkit(*words):
    """What a command prints with --json."""
    done = CliRunner().invoke(main, [*words, "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)
