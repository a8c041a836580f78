"""`ddkit enter` as a person runs it: the plan, what it refuses, and the demo that is an entry, too."""

import json
import os
from dataclasses import asdict

import pytest
from click.testing import CliRunner

from ddkit.cli import main
from ddkit.cli.demo import _recipe
from ddkit.distill.estimate import RefineSpeed
from ddkit.distill.settings import RefineSettings
from ddkit.entering.plan import Speeds, draft, outline_at
from ddkit.entering.recipe import Recipe, SetRecipe, read_recipe, write_recipe
from ddkit.entering.stages import Workplace
from ddkit.runtime.files import exclusive, write_json

pytestmark = pytest.mark.usefixtures("work", "short_measurements")

PLANNED = ("--time", "20m", "--datasets", "glyphs", "--epochs-setting", "2", "--rounds", "1", "--dry-run")


SPEEDS = Speeds(RefineSpeed({"dm": 1.0, "random networks": 1.0, "pool": 1.0}, 0.1, 0.1), 0.1, 0.001, (100.0, 100.0), 50.0)


def ddkit(*words):
    return CliRunner().invoke(main, ["enter", *words])


@pytest.mark.slow
def test_dry_run_prints_every_stage_and_writes_nothing(work, few_letters):
    done = ddkit(*PLANNED, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    plan = json.loads(done.output)
    names = ["prepare", "random real images", "refine", "evaluate submission", "evaluate baseline"]
    assert [stage["name"] for stage in plan["stages"]] == [f"{name} glyphs" for name in names] + ["check and pack", "report"]
    assert [stage["status"] for stage in plan["stages"]] == ["done"] + ["to come"] * 6  # the letters are prepared
    assert plan["stages"][2]["expected"] > 600 and plan["seconds"] == 1200
    assert not list(work.iterdir())


def test_dry_run_into_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(work):
    (work / "file").write_text("")
    done = ddkit(*PLANNED, "--folder", "file/entry")
    assert done.exit_code == 3 and "file/entry cannot be made: you may not write to" in " ".join(done.output.split())


@pytest.mark.slow
def test_dry_run_on_track_2_trains_and_bundles(work):
    done = ddkit(*PLANNED, "--track", "2", "--time", "20h", "--time-budget", "5s", "--json", "--quiet")
    assert done.exit_code == 0, done.output
    stages = {stage["name"]: stage["expected"] for stage in json.loads(done.output)["stages"]}
    assert list(stages) == ["prepare glyphs", "train glyphs", "check and pack", "evaluate glyphs", "report"]
    assert stages["train glyphs"] > 600 and stages["evaluate glyphs"] > 5 and not list(work.iterdir())


def test_dry_run_of_an_entry_that_was_begun_shows_a_table_for_people(work):
    recipe = draft(["glyphs"], epochs_setting=2, rounds=1)
    outline = outline_at({"glyphs": SPEEDS}, recipe, 1200.0)
    state = {"asked": recipe.to_json(), "outline": asdict(outline), "recipe": asdict(outline.recipe)}
    write_json(work / "ddkit-entry" / "runs" / "entry.json", state)
    done = ddkit(*PLANNED)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "refine glyphs to come about" in said and "of 20 min." in said


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "--time is missing. Say how long everything may take"),
        (["--time", "8h", "--datasets", "cifar100,cifar10"], 2, "Unknown dataset 'cifar10'. Did you mean 'cifar100'?"),
        (["--time", "8h", "--datasets", "glyphs,glyphs"], 2, "An entry takes each dataset once"),
        (["--time", "8h", "--time-budget", "1m"], 2, "A time budget needs track 2."),
        (["--recipe", "nowhere.toml"], 3, "nowhere.toml: No such file or directory."),
        (["--recipe", "a.toml", "--time", "8h", "--seed", "3"], 2, "The recipe decides what --time, --seed would."),
    ],
)
def test_enter_refuses_in_one_message(words, status, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = ddkit(*words)
    assert done.exit_code == status, done.output
    assert said in " ".join(done.output.split()) and "Traceback" not in done.output
    assert not list(tmp_path.glob("ddkit-entry/*"))


def test_damaged_state_is_named_with_the_folder_of_the_entry(work):
    (work / "entry" / "runs").mkdir(parents=True)
    (work / "entry" / "runs" / "entry.json").write_text("{")
    done = ddkit("--time", "20m", "--datasets", "glyphs", "--folder", "entry")
    assert done.exit_code == 3 and "In entry: runs/entry.json is not JSON" in " ".join(done.output.split())


def test_folder_in_which_another_process_works_is_named(work):
    with exclusive(work / "entry", "makes an entry", elsewhere="--folder"):
        done = ddkit("--time", "20m", "--datasets", "glyphs", "--folder", "entry")
    said = " ".join(done.output.split())
    assert done.exit_code == 2 and "In entry: Another process makes an entry in" in said and "entry." in said


def test_a_relative_cache_folder_lies_where_the_command_was_typed(work, letters, own_cache, monkeypatch):
    monkeypatch.setenv("DDKIT_CACHE", os.path.relpath(own_cache))
    recipe = Recipe((SetRecipe(letters, "12" * 32, refine=RefineSettings(), refine_steps=1),))
    write_recipe(recipe, work / "other.toml")
    (work / "entry" / "runs").mkdir(parents=True)
    (work / "entry" / "runs" / "entry.json").write_text("{")  # which ends what does not find the prepared letters
    done = ddkit("--recipe", "other.toml", "--folder", "entry")
    assert done.exit_code == 2 and "other training images of 'glyphs'" in " ".join(done.output.split())


def test_the_demo_is_an_entry_with_a_recipe_of_its_own(work):
    recipe = _recipe(5)
    assert recipe.datasets == ("glyphs",) and recipe.sets[0].preset and recipe.sets[0].refine.seed == recipe.seed == 5
    write_recipe(recipe, work / "demo.toml")
    assert read_recipe(work / "demo.toml") == recipe
    outline = outline_at({"glyphs": SPEEDS}, recipe, None)
    place = Workplace(work, outline.recipe, "cpu", lambda name, earlier: 0.0, print)
    verbs = [stage.name.removesuffix(" glyphs") for stage in place.stages(outline.expected)]
    assert verbs == [
        "prepare", "random real images", "train", "generate", "refine", "evaluate submission", "evaluate generated",
        "evaluate baseline", "check and pack", "report",
    ]  # fmt: skip
