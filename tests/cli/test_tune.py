"""`ddkit tune`, as a person calls it."""

import json
import shutil
import zipfile
from dataclasses import replace

import pytest
from click.testing import CliRunner

from ddkit.cli import main
from ddkit.generator.config import default_mode_guidance
from ddkit.generator.model_facts import model_hash
from ddkit.packing.tune import Trial, _append
from ddkit.runtime.device import describe_device, resolve_device


def run(*words, status=0):
    done = CliRunner().invoke(main, ["tune", *map(str, words)])
    assert done.exit_code == status, done.output
    return done.stdout, " ".join(done.stderr.split())


@pytest.mark.slow
def test_a_trial_is_run_kept_and_drawn(colors, colors_model, work, own_cache, forked_scripts):
    words = (colors, "--model", colors_model, "--steps", 3, "--guidance", 1, "--images", 4, "--keep", 1, "--time-budget", "10m",
             "--epochs-setting", 0, "--rounds", 1, "--device", "cpu", "--json")  # fmt: skip
    output, said = run(*words)
    data = json.loads(output)
    (trial,) = data["trials"]
    assert data["best"] == trial and (trial["steps"], trial["guidance"], trial["budget"]) == (3, 1.0, 600.0)
    assert trial["images"][0] > 0 and 0 < trial["seconds"][0] <= 600 and 0 <= trial["mean"] <= 1
    assert "Trying 1 candidate for" in said and "in 1 stage:" in said
    assert f"Best: 3 steps, guidance 1, mode guidance {default_mode_guidance('flow'):g}, 4 images a class" in said
    assert f"next: ddkit pack --track 2 --tuned --model colors={colors_model}" in said
    assert (work / "runs" / "tune" / "colors.png").stat().st_size > 0
    assert not (own_cache / "_features").exists(), "a classifier was trained that nothing needs"
    kept = (work / "runs" / "tune" / "colors.jsonl").read_text()

    again, _ = run(*words)  # at once, from what was kept
    assert json.loads(again) == data and (work / "runs" / "tune" / "colors.jsonl").read_text() == kept

    # Another model has only trials that an earlier version judged on the test images: that must not cost the search its zip.
    shutil.copytree(colors_model, work / "runs" / "cifar100")
    (work / "runs" / "tune" / "cifar100.jsonl").write_text(json.dumps({**json.loads(kept), "judged_on": "test images"}) + "\n")
    packed, said = run(*words, "--pack")
    assert "cifar100 is left out" in said
    assert json.loads(packed) == data and "next: ddkit evaluate --track 2 track2.zip" in said
    with zipfile.ZipFile("track2.zip") as archive:
        assert json.loads(archive.read("models/colors/entry.json"))["steps"] == 3
    assert "Without ddkit, the bundle made 8 colors images, 4 to 4 of each class" in said
    (record,) = (work / "runs" / "packed.jsonl").read_text().splitlines()
    assert json.loads(record)["path"] == "track2.zip"


@pytest.mark.slow
def test_a_search_halves_its_candidates_and_repeats_nothing(colors, colors_model, work, forked_scripts):
    words = (colors, "--model", colors_model, "--steps", 2, "--guidance", 1, "--keep", 0.5, "--mode-guidance", 0.2,
             "--time-budget", "10m", "--rounds", 1, "--device", "cpu", "--precision", "bfloat16", "--json")  # fmt: skip
    words += ("--epochs-setting", 1)
    # All but one trial were made before: in the first stage one candidate is the best there can be, and one the worst.
    known = Trial(colors, model_hash(colors_model), "dpm++", 2, 1.0, 600.0, 0, 0, describe_device(resolve_device("cpu")), (2,),
                  (9.0,), (0.5,), 1, "bfloat16", 0.5, 0.2)  # fmt: skip
    for images, accuracy, epochs in ((1, 0.5, 0), (2, 1.0, 0), (3, 0.0, 0), (1, 0.5, 1)):
        made = {"images_per_class": images, "images": (2 * images,), "accuracies": (accuracy,), "epochs_setting": epochs}
        _append(replace(known, **made), work / "runs" / "tune" / "colors.jsonl")
    words += ("--images", 1, "--images", 2, "--images", 3)
    output, said = run(*words)
    assert "Trying 3 candidates" in said and "in 2 stages" in said
    assert [trial["images_per_class"] for trial in json.loads(output)["trials"]] == [1, 2]
    kept = [json.loads(line) for line in (work / "runs" / "tune" / "colors.jsonl").read_text().splitlines()]
    assert [trial["epochs_setting"] for trial in kept] == [0, 0, 0, 1, 1]
    assert all(trial["images"] == [2 * trial["images_per_class"]] and trial["precision"] == "bfloat16" for trial in kept)
    assert {(trial["keep"], trial["mode_guidance"]) for trial in kept} == {(0.5, 0.2)}
    again, _ = run(*words)
    assert json.loads(again) == json.loads(output)
    assert len((work / "runs" / "tune" / "colors.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("words, status, said", [
    (["colors", "--steps", "0"], 2, "--steps"),
    (["colors", "--images", "few"], 2, "not a number of images"),
    (["colors", "--images", "²"], 2, "not a number of images"),
    (["colors", "--track", "1"], 2, "--track"),
    (["colours"], 2, "Did you mean 'colors'?"),
    (["colors"], 3, "ddkit train"),
])  # fmt: skip
def test_tune_with_wrong_options_or_without_a_model_fails(colors, work, words, status, said):
    _, errors = run(*words, status=status)
    assert said in errors
