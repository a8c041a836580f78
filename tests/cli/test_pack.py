"""`ddkit pack` for both tracks, as a person calls it."""

import json
import zipfile

import pytest
import torch
from click.testing import CliRunner

from ddkit.cli import main
from ddkit.generator.config import default_mode_guidance
from ddkit.packing.tune import Trial


def run(*words, status=0):
    done = CliRunner().invoke(main, ["pack", *map(str, words)])
    assert done.exit_code == status, done.output
    assert "Traceback" not in done.output
    return done.stdout, " ".join(done.stderr.split())


@pytest.mark.slow
def test_track_2_bundles_proves_and_reports(colors, colors_model, work):
    output, said = run("--track", 2, "--model", f"{colors}={colors_model}", "--sampling-steps", 2, "--half", "--json",
                       "--proof-budget", "10m", "--proof-images", 6)  # fmt: skip
    data = json.loads(output)
    assert data["path"] == "track2.zip" and data["bytes"] == (work / "track2.zip").stat().st_size
    (proof,) = data["proofs"]
    assert (proof["dataset"], proof["images"], proof["images_per_class"]) == (colors, 6, [3, 3])
    assert 0 < proof["seconds"] < proof["budget"] == 600
    assert "There is no model for cifar100" in said and "weights as float16 change the pixels of 32 images by" in said
    with zipfile.ZipFile("track2.zip") as archive:
        assert json.loads(archive.read("models/colors/entry.json"))["mode_guidance"] == default_mode_guidance("flow") > 0
    assert "next: ddkit evaluate --track 2 track2.zip" in said
    (record,) = [json.loads(line) for line in (work / "runs" / "packed.jsonl").read_text().splitlines()]
    assert (record["name"], record["sha256"]) == ("track2", data["sha256"])


def test_track_2_refuses_an_empty_name_before_it_packs(colors, colors_model, work, own_cache):
    _, said = run("--track", 2, "--model", f"{colors}={colors_model}", "--name", " ", status=2)
    assert "' ' cannot be a name" in said and not (own_cache / "_features").exists()


def test_track_2_refuses_a_test_of_fewer_images_than_classes(colors, colors_model, work):
    _, said = run("--track", 2, "--model", f"{colors}={colors_model}", "--proof-images", 1, status=2)
    assert "--proof-images 1 is less than an image of each of the 2 classes of colors." in said
    assert "Give --proof-images 2 or more." in said and not (work / "track2.zip").exists()


@pytest.mark.slow
def test_practice_is_packed_and_not_for_upload(letters, work):
    done = CliRunner().invoke(main, ["generate", "--dataset", letters, "--from-real", "first"])
    assert done.exit_code == 0, done.output
    output, said = run("--json")
    assert "For practice only" in said and "Upload" not in said
    assert "F021" in [finding["code"] for finding in json.loads(output)["findings"]]
    images = torch.load("submission/glyphs.pt", weights_only=True)
    images[3] = images[3].mean()
    torch.save(images, "submission/glyphs.pt")
    _, said = run()
    assert "warning C001" in said, "what was found is told, though it is packed"


def test_pack_tuned_takes_the_best_settings_of_the_search(colors, colors_model, work):
    from ddkit.generator.model_facts import model_hash
    from ddkit.packing.tune import _append

    words = ("--track", 2, "--model", f"{colors}={colors_model}", "--no-proof", "--tuned")
    _, said = run(*words, status=3)
    assert "ddkit tune colors" in said
    for steps, accuracy in ((4, 0.5), (8, 0.75), (16, 0.25)):
        trial = Trial(colors, model_hash(colors_model), "ddim", steps, 1.5, 60.0, 20, 0, "", (9,), (59.0,), (accuracy,),
                      None, "float32", 1.0, 0.0)  # fmt: skip
        _append(trial, work / "runs" / "tune" / "colors.jsonl")
    _, said = run(*words)
    assert "The bundle was not tested" in said
    assert "8 steps, guidance 1.5, no mode guidance, precision float32, 100 % kept" in said
    with zipfile.ZipFile("track2.zip") as archive:
        entry = json.loads(archive.read("models/colors/entry.json"))
        assert "models/colors/modes.safetensors" not in archive.namelist()
    assert (entry["sampler"], entry["steps"], entry["guidance"], entry["mode_guidance"]) == ("ddim", 8, 1.5, 0.0)


@pytest.mark.parametrize("words, status, said", [
    (["--track", "2"], 3, "ddkit train"),
    (["--track", "2", "--model", "runs/colors"], 2, "DATASET=FOLDER"),
    (["--track", "2", "--strict"], 2, "--strict applies to track 1 only"),
    (["--half"], 2, "--half applies to track 2 only"),
    (["--track", "2", "--no-proof", "--proof-budget", "9s", "--fresh-venv"], 2,
     "--proof-budget, --fresh-venv have no effect with --no-proof"),
    (["--track", "2", "--tuned", "--guidance", "2"], 2, "--tuned sets the sampler"),
    (["--track", "2", "--tuned", "--precision", "float32"], 2, "--tuned sets the sampler"),
    (["--track", "2", "--tuned", "--mode-guidance", "1"], 2, "--tuned sets the sampler"),
    ([], 3, "There is no folder submission"),
])  # fmt: skip
def test_pack_with_wrong_options_or_missing_files_fails(work, words, status, said):
    _, errors = run(*words, status=status)
    assert said in errors
    assert not list(work.glob("*.zip"))


@pytest.fixture
def practice(work):
    """A submission folder with ten images of each letter."""
    (work / "submission").mkdir()
    torch.save(torch.randn(100, 3, 32, 32), work / "submission" / "glyphs.pt")
    return work


def test_each_zip_is_recorded_under_its_name_and_found_by_its_hash(practice):
    run("--name", "first try")
    run("--name", "first try")
    torch.save(torch.randn(100, 3, 32, 32), "submission/glyphs.pt")
    _, said = run("--name", "first try", status=2)
    assert "'first try' was given to other files" in said and "first try-2" in said
    run("--out", "second.zip")
    torch.save(torch.randn(100, 3, 32, 32), "submission/glyphs.pt")
    _, said = run("--out", "second.zip")
    assert "recorded as 'second-2'" in said
    records = [json.loads(line) for line in (practice / "runs" / "packed.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records] == ["first try", "second", "second-2"]
    checked = CliRunner().invoke(main, ["check", "submission.zip"])
    assert "glyphs.pt was packed on" in checked.stdout and "as 'first try' into submission.zip" in checked.stdout
    data = json.loads(CliRunner().invoke(main, ["check", "second.zip", "--json"]).stdout)
    assert {known["file"]: [each["name"] for each in known["packed"]] for known in data["recorded"]} == {
        "second.zip": ["second-2"], "glyphs.pt": ["second-2"],
    }  # fmt: skip


def test_refused_name_leaves_the_earlier_zip_unchanged(practice):
    run("--name", "best")
    before = (practice / "submission.zip").read_bytes()
    torch.save(torch.randn(100, 3, 32, 32), "submission/glyphs.pt")
    run("--name", "best", status=2)
    assert (practice / "submission.zip").read_bytes() == before


def test_check_without_records_says_nothing_of_them(practice):
    shown = CliRunner().invoke(main, ["check", "submission"]).stdout
    assert "records" not in shown and "evaluated" not in shown
