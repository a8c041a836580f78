"""Whole entries on the letters: killed in real processes and continued, made again from a recipe, out of time and disk."""

import json
import os
import resource
import signal
import zipfile
from dataclasses import asdict
from pathlib import Path

import processes
import pytest
import torch
from click.testing import CliRunner

from ddkit.cli import main
from ddkit.distill.estimate import RefineSpeed
from ddkit.distill.generate import FromReal, generate
from ddkit.entering.entry import enter, plan_entry
from ddkit.entering.plan import MARGIN, Speeds, draft, outline_at
from ddkit.entering.recipe import Recipe, SetRecipe, read_recipe
from ddkit.errors import UsageError
from ddkit.evaluation.evaluate import EvaluationSettings
from ddkit.evaluation.job import JobSettings, evaluate_files
from ddkit.results import append, read
from ddkit.runtime.files import sha256_of, write_json

pytestmark = pytest.mark.slow

# As the demo, with fewer steps of everything.
TRAINED = """
seed = 3
epochs_setting = 1
rounds = 1
[[sets]]
dataset = "glyphs"
preset = "demo"
autoencoder_steps = 4
train_steps = 4
refine_steps = 3
[sets.refine]
batch_real = 2
val_epochs = 0
dm_steps = 1
precision = "float32"
pool.size = 2
pool.from_step = 2
"""
SAMPLED = TRAINED + "[sets.sampling]\nsteps = 2\nguidance = 3.0\n"
BUNDLED = """
track = 2
epochs_setting = 0
rounds = 1
time_budget = 900
[[sets]]
dataset = "colors"
preset = "demo"
autoencoder_steps = 3
train_steps = 3
train_precision = "float32"
[sets.bundle]
images_per_class = 2
keep = 1
[sets.bundle.sampling]
steps = 3
guidance = 1.5
precision = "float32"
"""
REAL = TRAINED.replace('preset = "demo"\nautoencoder_steps = 4\ntrain_steps = 4\n', "")


# `ddkit enter`, in a process that measures shortly.
ENTER = "import conftest, pytest, ddkit.cli; conftest.shorten_measurements(pytest.MonkeyPatch()); ddkit.cli.main()"


def finish(*words):
    """The command run to its end in this process, in the folder `work`: its status, its output and what it said."""
    done = CliRunner().invoke(main, ["enter", "--device", "cpu", *words])
    return done.exit_code, done.stdout, done.stderr


def stop_at(work, text, number, *words):
    """Run until a line of standard error holds the text, then send the signal. Returns the exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = processes.start("-c", ENTER, "enter", "--device", "cpu", *words, cwd=work, env=environment)
    for line in process.stderr:
        if text in line:
            break
    process.send_signal(number)
    process.communicate(timeout=600)
    return process.returncode


def begin(folder, recipe, seconds=None, **state):
    """An entry as it is once it has been planned, on a machine of made-up speeds. state: what else it has kept."""
    refining = RefineSpeed({"dm": 1.0, "random networks": 1.0, "pool": 1.0}, 0.1, 0.1)
    outline = outline_at({"glyphs": Speeds(refining, 0.1, 0.001, (100.0, 100.0), 50.0)}, recipe, seconds)
    kept = {"asked": recipe.to_json(), "outline": asdict(outline), "recipe": asdict(outline.recipe)}
    write_json(folder / "runs" / "entry.json", kept | state)
    return outline


class BrokenOff(Exception):
    pass


def break_off(folder, recipe, seconds, stage):
    """Continue an entry in this process until the stage begins, where it ends without a word, as a kill would end it."""

    def look(states):
        if (stage, "running") in [(state.name, state.status) for state in states]:
            raise BrokenOff

    with pytest.MonkeyPatch.context() as patch, pytest.raises(BrokenOff):
        patch.chdir(folder)
        enter(recipe, Path(), seconds=seconds, device="cpu", watch=look)


@pytest.fixture
def place(short_measurements, tmp_path, monkeypatch):
    """The working folder, with recipes of the letters."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have that are killed
    (tmp_path / "trained.toml").write_text(SAMPLED)
    (tmp_path / "real.toml").write_text(REAL)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def work(place, few_letters):
    """The working folder, where a few letters are prepared."""
    return place


@pytest.fixture
def work_with_letters(place, letters):
    """The same with as many as a check needs for sets that a generator made."""
    return place


def test_an_entry_killed_twice_is_ended_by_the_same_command_and_its_recipe_makes_it_again(work_with_letters):
    work = work_with_letters
    words = ("--recipe", "trained.toml", "--folder", "entry")
    assert stop_at(work, "train glyphs", signal.SIGKILL, *words) == -signal.SIGKILL
    assert stop_at(work, "evaluate submission", signal.SIGTERM, *words) == 130
    status, output, said = finish(*words, "--json")
    assert status == 0, said
    assert "Done already: prepare glyphs, random real images glyphs, train glyphs, generate glyphs, refine glyphs." in said
    found = json.loads(output)
    entry = work / "entry"
    assert found["unfinished"] == [] and {stage["status"] for stage in found["stages"]} == {"done"}
    for name in ("submission/glyphs.png", "submission.zip", "report.html", "recipe.toml"):
        assert f"entry/{name}" in found["files"] and (entry / name).stat().st_size > 100
    rows = {row["name"] for group in found["leaderboard"] for row in group["rows"] if "glyphs" in row["accuracy"]}
    assert rows == {"submission", "generated", "random real images"}

    again, _, said = finish(*words)
    assert again == 0 and "evaluate baseline glyphs." in said and "Training" not in said

    status, output, said = finish("--recipe", "entry/recipe.toml", "--folder", "again", "--json")
    assert status == 0, said
    assert "The set of glyphs is the same to the bit as the one that the recipe was made with." in " ".join(said.split())
    assert (work / "again/submission/glyphs.pt").read_bytes() == (entry / "submission/glyphs.pt").read_bytes()
    first, second = read_recipe(entry / "recipe.toml"), read_recipe(work / "again/recipe.toml")
    assert first.sets == second.sets and first.accuracies == second.accuracies
    assert (first.sets[0].refine_steps, first.sets[0].train_steps, first.seed) == (3, 4, 3)
    assert (first.sets[0].sampling.steps, first.sets[0].sampling.guidance) == (2, 3.0)
    trained = json.loads((entry / "runs/glyphs/config.json").read_text())["config"]
    assert first.sets[0].train_precision == trained["precision"]


def test_a_bundle_is_made_again_from_its_recipe_with_the_settings_that_it_samples_with(work, colors, forked_scripts):
    (work / "bundled.toml").write_text(BUNDLED)
    status, output, said = finish("--recipe", "bundled.toml", "--folder", "entry", "--json")
    assert status == 0, said
    assert "Without ddkit, the bundle made 2 images of colors in" in " ".join(said.split())
    assert "next:" not in said  # these colors have no official evaluation
    with zipfile.ZipFile(work / "entry/track2.zip") as bundle:
        facts = json.loads(bundle.read("models/colors/entry.json"))
    wanted = {"sampler": "dpm++", "steps": 3, "guidance": 1.5, "precision": "float32", "images_per_class": 2, "keep": 1}
    assert wanted.items() <= facts.items()
    trained = json.loads((work / "entry/runs/colors/config.json").read_text())["config"]
    assert trained["precision"] == "float32"
    made = read_recipe(work / "entry/recipe.toml")
    (result,) = read(work / "entry/runs/results.jsonl").results
    assert made.sets[0].bundle_settings.sampling.steps == 3 and made.sets[0].sha256 == result.sha256
    assert made.accuracies == {"colors": result.mean} and result.images == 4
    status, _, said = finish("--recipe", "bundled.toml", "--folder", "entry")
    assert status == 0 and "prepare colors, train colors, check and pack, evaluate colors." in " ".join(said.split()), said

    # What was evaluated, by its hash, is not evaluated again.
    append(result, work / "again/runs/results.jsonl")
    status, _, said = finish("--recipe", "entry/recipe.toml", "--folder", "again")
    assert status == 0 and "The bundle for colors is the same to the bit as the one that" in " ".join(said.split()), said
    assert (work / "again/track2.zip").read_bytes() == (work / "entry/track2.zip").read_bytes()
    assert read_recipe(work / "again/recipe.toml").sets == made.sets
    assert read(work / "again/runs/results.jsonl").results == (result,)


def test_a_disk_that_fills_up_stops_in_words_and_the_same_command_continues(work):
    words = ("--recipe", "real.toml", "--folder", "entry")
    begin(work / "entry", read_recipe(work / "real.toml"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The tensor of the set has 1.2 MB, the state of a refinement several times as much.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_500_000, before[1]))
    try:
        status, _, said = finish(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 3 and "state.pt: File too large." in " ".join(said.split()) and "Traceback" not in said
    status, _, said = finish(*words)
    assert status == 0 and "Done already: prepare glyphs, random real images glyphs." in said
    assert (work / "entry/submission.zip").is_file()


def edit_state(work, **changes):
    """Change what an entry has kept, as if the time had gone by in another way."""
    path = work / "entry/runs/entry.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_time_that_is_up_inside_a_stage_keeps_its_state_and_packs_what_there_is(work):
    recipe, seconds = draft(["glyphs"], epochs_setting=300, rounds=1, device="cpu"), 3 * 3600.0
    begin(work / "entry", recipe, seconds, limits={"refine glyphs": 0.5})
    break_off(work / "entry", recipe, seconds, "evaluate submission glyphs")
    edit_state(work, spent=1.1 * seconds - 4)
    words = ("--datasets", "glyphs", "--epochs-setting", "300", "--rounds", "1", "--folder", "entry", "--time", "3h")
    status, output, said = finish(*words, "--json")
    assert status == 0, said
    found = json.loads(output)
    assert found["unfinished"] == ["evaluate submission glyphs", "evaluate baseline glyphs"]
    assert "The time is up in the stage 'evaluate submission glyphs'; its state is kept." in " ".join(said.split())
    assert "with a longer --time to finish." in " ".join(said.split()) and "next:" not in said
    assert (work / "entry/submission.zip").is_file() and (work / "entry/report.html").is_file()
    assert list((work / "entry/runs/evaluations").glob("glyphs-*/round-0.pt"))


def test_time_that_was_lost_shortens_a_stage_that_had_begun(work):
    recipe, seconds = draft(["glyphs"], epochs_setting=0, rounds=1, device="cpu"), 3 * 3600.0
    outline = begin(work / "entry", recipe, seconds, limits={"refine glyphs": 9000.0})
    fixed = sum(seconds for name, seconds in outline.expected.items() if name not in outline.flexible)
    edit_state(work, spent=seconds - MARGIN * fixed)
    words = ("--datasets", "glyphs", "--epochs-setting", "0", "--rounds", "1", "--folder", "entry", "--time", "3h")
    status, output, said = finish(*words, "--json")
    assert status == 0, said
    assert json.loads(output)["unfinished"] == []
    assert torch.load(work / "entry/runs/glyphs-refine/state.pt", weights_only=True)["seconds"] < 60


def test_more_time_refines_further_and_other_settings_are_refused(work):
    words = ("--datasets", "glyphs", "--epochs-setting", "0", "--rounds", "1", "--folder", "entry")
    least = finish(*words, "--time", "1s")
    assert least[0] == 2 and "The time is too short: this entry needs" in " ".join(least[2].split())
    assert not (work / "entry/runs").exists()

    def refined():
        return torch.load(work / "entry/runs/glyphs-refine/state.pt", weights_only=True)["seconds"]

    recipe = draft(["glyphs"], epochs_setting=0, rounds=1, device="cpu")
    begin(work / "entry", recipe, 2 * 3600.0, limits={"refine glyphs": 0.3})
    status, _, said = finish(*words, "--time", "2h")
    assert status == 0, said
    before = refined()
    break_off(work / "entry", recipe, 3 * 3600.0, "refine glyphs")
    edit_state(work, limits={"refine glyphs": before + 0.3})
    status, _, said = finish(*words, "--time", "3h")
    assert status == 0, said
    assert refined() > before > 0
    other = finish(*words, "--time", "3h", "--seed", "1")
    assert other[0] == 2 and f"{work}/entry holds an entry with other settings (seed, sets)" in " ".join(other[2].split())
    real = finish("--recipe", "real.toml", "--folder", "entry")
    assert real[0] == 2 and "holds an entry with other settings" in " ".join(real[2].split())


def test_a_set_that_takes_the_place_of_an_evaluated_one_is_evaluated_too(work_with_letters):
    recipe = Recipe((SetRecipe("glyphs", preset="demo", autoencoder_steps=2, train_steps=2),), epochs_setting=0, rounds=1)
    entry = work_with_letters / "entry"
    earlier = entry / "submission/glyphs.pt"
    generate("glyphs", 10, FromReal("random", 0, "cpu"), earlier)
    settings = EvaluationSettings(rounds=1, epochs_setting=0, device="cpu")
    evaluate_files([earlier], JobSettings(settings, results=entry / "runs/results.jsonl"))
    before = sha256_of(earlier)
    begin(entry, recipe)
    made = enter(recipe, entry, device="cpu")
    now = sha256_of(earlier)
    assert now != before and now in {result.sha256 for result in made.leaderboard.results}


def test_a_recipe_of_other_images_is_refused_before_anything_is_made(work):
    (work / "real.toml").write_text(REAL.replace('"glyphs"', f'"glyphs"\ndataset_sha256 = "{"ab" * 32}"'))
    with pytest.raises(UsageError, match="other training images of 'glyphs'"):
        plan_entry(read_recipe(work / "real.toml"), work / "entry", device="cpu")


def test_a_recipe_of_another_version_warns_before_anything_is_made(work):
    (work / "old.toml").write_text(
        REAL.replace('"glyphs"', f'"glyphs"\ndataset_sha256 = "{"ab" * 32}"') + '[versions]\nddkit = "0.0.1"\n'
    )
    events = []
    with pytest.raises(UsageError, match="other training images of 'glyphs'"):
        enter(read_recipe(work / "old.toml"), work / "entry", device="cpu", on_event=events.append)
    assert events[0].startswith("warning: the recipe was made with other versions (ddkit 0.0.1, here")
