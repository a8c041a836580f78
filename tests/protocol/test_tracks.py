"""What is official, and generators as scripts on the clock."""

import textwrap

import pytest
import torch

from ddkit.challenge import CIFAR100, GLYPHS, TINYIMAGENET, TRACKS
from ddkit.errors import ComputeError, InvalidSubmission
from ddkit.protocol.tracks import (
    Conditions,
    deviations,
    generate_within,
    hash_of_folder,
    images_per_class,
    script_entry,
)

OFFICIAL = {
    1: Conditions(3, 1000, (10, 10), 10_000, "convnet", True, "float32"),
    2: Conditions(3, 100, (17, 40), 10_000, "convnet", True, "float32", 600.0),
}


@pytest.mark.parametrize("track", [1, 2])
@pytest.mark.parametrize("spec", [CIFAR100, TINYIMAGENET])
def test_what_the_protocol_prescribes_is_official(track, spec):
    assert deviations(TRACKS[track], spec, OFFICIAL[track]) == ()


@pytest.mark.parametrize("change, said", [
    ({"rounds": 8}, "8 rounds instead of 3"),
    ({"epochs_setting": 50}, "E = 50 instead of 1000"),
    ({"images_per_class": (9, 10)}, "9 to 10 images a class instead of 10"),
    ({"images_per_class": (1, 1)}, "1 images a class instead of 10"),
    ({"test_images": 100}, "100 test images instead of 10,000"),
    ({"network": "resnet18"}, "network resnet18 instead of convnet"),
    ({"augment": False}, "no augmentation"),
    ({"precision": "bfloat16"}, "bfloat16 instead of float32"),
    ({"time_budget": 600.0}, "a time budget of 600 s"),
])  # fmt: skip
def test_everything_else_is_said(change, said):
    conditions = Conditions(**{**vars(OFFICIAL[1]), **change})
    assert deviations(TRACKS[1], CIFAR100, conditions) == (said,)


def test_track_2_is_about_generating():
    fixed = Conditions(**{**vars(OFFICIAL[2]), "time_budget": None})
    assert deviations(TRACKS[2], CIFAR100, fixed) == ("images not generated within 600 s for each round",)


def test_practice_images_are_never_official():
    assert "the challenge has cifar100 and tinyimagenet" in deviations(TRACKS[1], GLYPHS, OFFICIAL[1])[0]


def test_images_are_counted_for_every_class():
    assert images_per_class(torch.tensor([0, 0, 2]), 4) == (0, 2)


def script(folder, body):
    """A stand-alone generator; `arguments` holds what it was called with."""
    path = folder / "generate.py"
    path.write_text(
        "import argparse, sys, time\nimport torch\nparser = argparse.ArgumentParser()\n"
        "for name, kind in (('dataset', str), ('out', str), ('time-budget', float), ('seed', int), ('device', str)):\n"
        "    parser.add_argument(f'--{name}', type=kind)\n"
        "arguments = parser.parse_args()\n" + textwrap.dedent(body)
    )
    return path


SAVES = """
print("chatter")
images = torch.full((3, 3, 32, 32), float(arguments.seed))
torch.save({"images": images, "labels": torch.tensor([0, 1, 1])}, arguments.out)
"""


def test_a_script_is_run_with_dataset_budget_and_seed(tmp_path, capfd):
    heard = []
    entry = script_entry(script(tmp_path, SAVES), "cifar100", progress=heard.append)
    made = generate_within(entry, 7, 60.0)
    assert made.images.unique().tolist() == [7.0] and made.labels.tolist() == [0, 1, 1]
    assert 0 < made.seconds < 60
    assert all(report.total == 60.0 and report.unit == "s" for report in heard)
    output = capfd.readouterr()
    assert output.out == "" and "chatter" in output.err  # standard output is for our own result


def test_a_script_that_overruns_is_stopped(tmp_path):
    entry = script_entry(script(tmp_path, "time.sleep(60)"), "cifar100")
    with pytest.raises(InvalidSubmission, match="still running"):
        generate_within(entry, 0, 0.5)


@pytest.mark.parametrize("body, error, said", [
    ("sys.exit(4)", ComputeError, "status 4"),
    ("pass", InvalidSubmission, "no readable file"),
    ("open(arguments.out, 'wb').write(b'x' * 100)", InvalidSubmission, "no readable file"),
    ("torch.save(torch.zeros(3), arguments.out)", InvalidSubmission, "'images' and 'labels'"),
])  # fmt: skip
def test_a_script_that_fails_is_named_with_the_reason(tmp_path, body, error, said):
    with pytest.raises(error, match=said):
        generate_within(script_entry(script(tmp_path, body), "cifar100"), 0, 60.0)


def test_a_script_cannot_smuggle_in_code(tmp_path):
    body = """
    class Smuggled:
        def __reduce__(self):
            return (open, (arguments.out + ".executed", "w"))
    torch.save({"images": Smuggled(), "labels": 0}, arguments.out)
    """
    with pytest.raises(InvalidSubmission):
        generate_within(script_entry(script(tmp_path, body), "cifar100"), 0, 60.0)


def test_an_entrys_hash_changes_with_any_of_its_files(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"1")
    first = hash_of_folder(tmp_path)
    assert hash_of_folder(tmp_path) == first
    (tmp_path / "model" / "weights").write_bytes(b"2")
    second = hash_of_folder(tmp_path)
    (tmp_path / "model" / "weights").rename(tmp_path / "model" / "weight")
    assert len({first, second, hash_of_folder(tmp_path)}) == 3
