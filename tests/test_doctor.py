"""The examination of the machine: a line a part, with a remedy where something is slow or broken."""

import re
import shutil

import pytest
import torch
from PIL import Image

from ddkit.challenge import CIFAR100
from ddkit.data.class_names import CLASS_NAMES
from ddkit.data.images import normalize
from ddkit.data.prepare import prepare
from ddkit.doctor import _compiler, _engine, _processor, diagnose, examine_datasets
from ddkit.runtime.container import available_cpus
from ddkit.runtime.progress import span_text

PARTS = {"Python", "libraries", "processor", "threads", "compiler", "evaluation engine", "memory", "this folder", "cache"}


def statuses(lines):
    return {line.what: line.status for line in lines}


@pytest.mark.slow
def test_diagnose_names_every_part_once_with_a_status():
    lines = diagnose()
    found = statuses(lines)
    assert found.keys() >= PARTS | {"dataset cifar100", "dataset tinyimagenet"} and len(found) == len(lines)
    assert set(found.values()) <= {"ok", "slow", "broken"}
    assert all(line.remedy for line in lines if line.status != "ok")
    assert found["libraries"] == "ok" and found["dataset cifar100"] == "slow"
    (dataset,) = (line for line in lines if line.what == "dataset cifar100")
    assert "ddkit data prepare cifar100" in dataset.remedy


def test_diagnose_without_a_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (line,) = _compiler()
    assert line.status == "slow" and "no-such-compiler" in line.finding and "g++" in line.remedy


def test_prepared_datasets_are_listed_with_their_counts(letters):
    (line,) = (line for line in examine_datasets() if line.what == "dataset glyphs")
    assert line.status == "ok" and "5,000 train images" in line.finding


def test_datasets_after_a_damaged_one_are_listed(own_cache):
    for name in ("apples", "pears"):
        (own_cache / name).mkdir(parents=True)
        (own_cache / name / "meta.json").write_text("{")
    lines = {line.what: line for line in examine_datasets()}
    assert lines.keys() == {"dataset cifar100", "dataset tinyimagenet", "dataset apples", "dataset pears"}
    assert lines["dataset pears"].status == "broken" and "data prepare pears" in lines["dataset pears"].remedy
    assert re.search(r"is damaged: .+[^.]\.$", lines["dataset pears"].finding)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_diagnose_measures_the_engine_in_images_a_second():
    (line,) = _engine()
    kind, speed, score = re.fullmatch(
        r'"(.+)", ([\d,]+) images/s: an official cifar100 score takes about (.+)', line.finding
    ).groups()
    speed = int(speed.replace(",", ""))
    rounded = torch.linspace(-0.5, 0.5, 101).tolist()
    assert kind != "plain" and score in {span_text(3_003_000 / (speed + rest)) for rest in rounded}
    if speed > 300:
        assert (line.status, line.remedy) == ("ok", "")
    elif speed < 300:
        assert line.status == "slow" and ("Other processes" in line.remedy) != ("Use more CPUs" in line.remedy)


@pytest.mark.skipif(available_cpus() < 2, reason="needs two CPUs")
def test_diagnose_warns_of_unused_cpus(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (line,) = (line for line in _processor() if line.what == "threads")
    finally:
        torch.set_num_threads(before)
    assert line.status == "slow" and "OMP_NUM_THREADS=1 leaves CPUs unused" in line.remedy


def test_a_dataset_of_the_challenge_without_all_its_training_images_is_called_incomplete(tmp_path):
    for split in ("train", "test"):
        for index, name in enumerate(CLASS_NAMES["cifar100"]):
            path = tmp_path / "pictures" / split / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32), (index, 0, split == "test")).save(path)
    prepare("cifar100", tmp_path / "pictures")
    (line,) = (line for line in examine_datasets() if line.what == "dataset cifar100")
    assert line.status == "slow" and "100 train images" in line.finding and "50,000" in line.finding
    assert line.remedy.endswith("ddkit data prepare cifar100 --from PATH --force")


def test_a_dataset_of_the_challenge_with_test_images_only_is_called_incomplete(tmp_path):
    images = normalize(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), CIFAR100)
    torch.save({"images_val": images, "labels_val": torch.arange(100)}, tmp_path / "cifar100_test.pt")
    prepare("cifar100", tmp_path / "cifar100_test.pt")
    (line,) = (line for line in examine_datasets() if line.what == "dataset cifar100")
    assert line.status == "slow" and line.finding == "100 test images; the complete dataset has 50,000 train images"
    assert line.remedy == "No set can be made without them: ddkit data prepare cifar100"
