"""Plans: the time is used, split and refused as it should be, on machines of made-up speeds."""

import dataclasses
import functools
import json

import pytest
import torch

from ddkit.challenge import CIFAR100
from ddkit.data.images import normalize
from ddkit.data.prepare import prepare
from ddkit.distill.estimate import RefineSpeed
from ddkit.distill.settings import RefineLimits, RefineSettings
from ddkit.entering.plan import MARGIN, Outline, Speeds, draft, make_outline, outline_at, refine_limit
from ddkit.entering.recipe import Recipe, SetRecipe
from ddkit.errors import MissingDataError, UsageError
from ddkit.generator.config import BundleSettings, SamplingSettings
from ddkit.generator.training.plan import TrainingData, plan_training, require_time
from ddkit.runtime.progress import time_option
from ddkit.runtime.records import read_record

BOTH = ("cifar100", "tinyimagenet")
FAST = RefineSpeed({"dm": 1.0, "random networks": 2.0, "pool": 3.0}, 1.0, 1.0)
SPEEDS = {name: Speeds(FAST, 1.0, 0.001, (100.0, 100.0), 50.0) for name in BOTH}


def test_expected_seconds_of_all_stages_use_the_time_with_its_margin():
    plan = outline_at(SPEEDS, draft(BOTH, epochs_setting=50, rounds=1), 8 * 3600, spent=60)
    fixed = sum(seconds for name, seconds in plan.expected.items() if name not in plan.flexible)
    flexible = sum(plan.expected[name] for name in plan.flexible)
    assert 60 + MARGIN * fixed + flexible == pytest.approx(8 * 3600)
    assert set(plan.flexible) == {"refine cifar100", "refine tinyimagenet"}


def test_the_datasets_get_equal_parts_of_the_time():
    plan = outline_at(SPEEDS, draft(BOTH, epochs_setting=50, rounds=1), 8 * 3600)
    assert plan.expected["refine cifar100"] == plan.expected["refine tinyimagenet"] > 3600


def test_too_little_time_is_refused_with_the_least_that_suffices():
    recipe = draft(("cifar100",), epochs_setting=20, rounds=1)
    with pytest.raises(UsageError, match=r"Give --time (\d+)m or more") as refused:
        outline_at(SPEEDS, recipe, 100)
    assert "2m" not in refused.value.message  # what 100 s would be rounded up to
    least = 60 * int(refused.value.remedy.split("--time ")[1].split("m")[0])
    assert outline_at(SPEEDS, recipe, least).expected["refine cifar100"] > 0
    with pytest.raises(UsageError, match="too short"):
        outline_at(SPEEDS, recipe, least - 61)


@pytest.mark.slow
def test_every_time_from_the_least_that_a_refusal_names_is_accepted_and_no_shorter_one():
    speeds = {"cifar100": Speeds(RefineSpeed({"dm": 15.0, "random networks": 15.0, "pool": 15.0}, 0.8, 5.0), 0.8, 0.0005)}
    times, refused = range(120, 4800, 60), {}
    for seconds in times:
        try:
            outline_at(speeds, draft(("cifar100",)), seconds, spent=60)
        except UsageError as error:
            refused[seconds] = 60 * int(error.remedy.split("--time ")[1].split("m")[0])
    (least,) = set(refused.values())
    assert list(refused) == list(range(times.start, least, 60)) and least in times


def test_the_evaluation_is_official_if_half_of_the_time_suffices_for_it():
    official = outline_at(SPEEDS, draft(("cifar100",)), 8 * 3600).recipe
    assert (official.epochs_setting, official.rounds) == (1000, 3)
    short = outline_at(SPEEDS, draft(("cifar100",)), 1800)
    assert (short.recipe.epochs_setting, short.recipe.rounds) == (200, 1)
    assert any("not official: an official one would take 51m." in note for note in short.notes)
    letters = outline_at({"glyphs": SPEEDS["cifar100"]}, draft(("glyphs",)), 1800)
    assert any("; the challenge's E = 1000 and 3 rounds would take" in note for note in letters.notes)
    assert not any("official" in note for note in letters.notes)


@pytest.mark.parametrize(("hours", "asked", "chosen"), [
    (8, {"rounds": 2}, (1000, 2)), (0.5, {"rounds": 2}, (200, 2)),
    (8, {"epochs_setting": 900}, (900, 3)), (0.7, {"epochs_setting": 900}, (900, 1)),
])  # fmt: skip
def test_only_what_was_not_asked_for_is_chosen(hours, asked, chosen):
    recipe = outline_at(SPEEDS, draft(("cifar100",), **asked), hours * 3600).recipe
    assert (recipe.epochs_setting, recipe.rounds) == chosen


def test_random_real_images_are_evaluated_under_the_same_settings_if_half_of_the_time_suffices_for_them_too():
    """On two cores, as tools/results/speed.md has measured them, the submission's official evaluation takes six hours."""
    speeds = {"cifar100": Speeds(FAST, 1000 / 1229, 0.0005), "tinyimagenet": Speeds(FAST, 2000 / 314, 0.0022)}
    for hours, compared in ((24, False), (30, True)):
        plan = outline_at(speeds, draft(BOTH), hours * 3600)
        assert (plan.recipe.epochs_setting, plan.recipe.rounds) == (1000, 3)
        assert "evaluate submission cifar100" in plan.expected and ("evaluate baseline cifar100" in plan.expected) == compared
        command = "ddkit evaluate baseline/cifar100.pt baseline/tinyimagenet.pt --epochs-setting 1000 --rounds 3"
        assert any(command in note for note in plan.notes) != compared
    asked = outline_at(speeds, draft(BOTH, epochs_setting=1000, rounds=3), 10 * 3600)
    assert "evaluate submission cifar100" in asked.expected and "evaluate baseline cifar100" not in asked.expected


def test_validation_takes_a_part_of_a_short_refinement_only():
    for hours, epochs in ((0.5, 20), (8, 300)):
        plan = outline_at(SPEEDS, draft(("cifar100",), epochs_setting=20, rounds=1), 3600 * hours)
        assert plan.recipe.sets[0].refine.val_epochs >= epochs
        seconds = plan.expected["refine cifar100"]
        assert FAST.validations(plan.recipe.sets[0].refine, 1) <= seconds / 4


def test_a_refinement_fits_into_its_seconds_with_its_validations():
    settings = dataclasses.replace(draft(("cifar100",)).sets[0].refine, val_epochs=20)
    for seconds in (200.0, 2000.0, 20000.0):
        work = refine_limit(FAST, settings, seconds)
        steps, _ = FAST.within(RefineLimits(seconds=work), settings)
        assert work + FAST.validations(settings, steps) == pytest.approx(seconds, rel=0.05)
    assert refine_limit(FAST, settings, 1.0) == 0


def test_on_track_2_the_time_trains_generators():
    plan = outline_at(SPEEDS, draft(BOTH, track=2, epochs_setting=1, rounds=1, time_budget=10), 3600)
    assert set(plan.flexible) == {"train cifar100", "train tinyimagenet"} and plan.expected["train cifar100"] > 600
    assert "evaluate cifar100" in plan.expected and "random real images cifar100" not in plan.expected


def test_on_track_2_the_training_takes_as_long_as_a_training_must():
    recipe = draft(("cifar100",), track=2, epochs_setting=1, rounds=1, time_budget=10, device="cpu")
    for least in (5.0, 500.0):
        speeds = {"cifar100": dataclasses.replace(SPEEDS["cifar100"], least_training=least)}
        with pytest.raises(UsageError, match=f"{time_option(least)} for training") as refused:
            outline_at(speeds, recipe, 1)
        minutes = int(refused.value.remedy.split("--time ")[1].split("m")[0])
        assert outline_at(speeds, recipe, 60 * minutes).expected["train cifar100"] >= least


@pytest.mark.slow
def test_the_least_training_of_a_plan_is_what_training_itself_accepts(tmp_path, colors, short_measurements):
    recipe = Recipe((SetRecipe(colors, preset="tiny"),), track=2)
    least = make_outline(recipe, 10**6, device="cpu").speeds[colors].least_training
    request = functools.partial(plan_training, TrainingData.open(colors), {}, preset_name="tiny", device="cpu")
    require_time(TrainingData.open(colors), request(folder=tmp_path / "long", seconds=10 * least))
    with pytest.raises(UsageError, match="needs at least 100 steps"):
        require_time(TrainingData.open(colors), request(folder=tmp_path / "short", seconds=least / 10))


def test_a_bundle_takes_time_for_its_classifier_and_its_modes_and_one_of_few_images_is_evaluated_sooner():
    recipe = draft(("cifar100",), track=2, epochs_setting=9, rounds=1, time_budget=100, device="cpu")
    (each,) = recipe.sets

    def expected(**settings):
        changed = recipe.with_set(dataclasses.replace(each, bundle=BundleSettings(**settings)))
        return outline_at(SPEEDS, changed, 24 * 3600).expected

    half, all_, few = expected(), expected(keep=1.0), expected(images_per_class=2)
    assert all_["check and pack"] < half["check and pack"] == few["check and pack"]
    guided = expected(sampling=SamplingSettings(steps=10, guidance=1.0, mode_guidance=1.0))
    assert guided["check and pack"] > half["check and pack"]
    assert few["evaluate cifar100"] < half["evaluate cifar100"] < all_["evaluate cifar100"]


@pytest.mark.slow
def test_on_track_2_the_preset_fits_into_the_gpu(gpu):
    for free, preset in ((2**27, "tiny"), (70 * 2**30, "small")):
        gpu.memory = [(free, 80 * 2**30)]
        assert draft(("cifar100",), track=2).sets[0].preset == preset


def test_a_dataset_of_which_only_test_images_are_prepared_cannot_be_planned_with(tmp_path):
    images = normalize(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), CIFAR100)
    torch.save({"images_val": images, "labels_val": torch.arange(100)}, tmp_path / "cifar100_test.pt")
    prepare("cifar100", tmp_path / "cifar100_test.pt")
    with pytest.raises(MissingDataError, match="has no train split"):
        outline_at(SPEEDS, draft(("cifar100",), track=2, device="cpu"), 24 * 3600)


def test_an_outline_is_read_as_it_was_written():
    plan = outline_at(SPEEDS, draft(BOTH), 24 * 3600)
    assert read_record(Outline, json.loads(json.dumps(dataclasses.asdict(plan)))) == plan


@pytest.mark.slow
def test_a_recipe_with_lengths_is_planned_on_this_machine_and_takes_some_time(short_measurements):
    refinement = dataclasses.replace(draft(("glyphs",)).sets[0].refine, batch_real=2, precision="float32")
    letters = SetRecipe("glyphs", preset="demo", train_steps=2, refine_steps=2, refine=refinement)
    plan = make_outline(Recipe((letters,), epochs_setting=3, rounds=1), None, device="cpu")
    assert plan.expected["train glyphs"] > 0 and plan.expected["generate glyphs"] > 0 and plan.expected["refine glyphs"] > 0
    assert plan.expected["evaluate generated glyphs"] == plan.expected["evaluate submission glyphs"] > 0


def test_a_recipe_without_a_length_is_refused_where_no_time_decides():
    with pytest.raises(UsageError, match="does not say for how long the set of cifar100 is refined"):
        outline_at(SPEEDS, draft(("cifar100",)), None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"rounds": 0}, "rounds must be"), ({"time_budget": 5.0}, "needs track 2"), ({"epochs_setting": -1}, "epochs")],
)
def test_an_evaluation_that_makes_no_sense_is_refused_before_anything_is_measured(wrong, said):
    with pytest.raises(UsageError, match=said):
        make_outline(Recipe((SetRecipe("cifar100", refine=RefineSettings()),), **wrong), None, device="no device")


def test_draft_of_an_unknown_dataset_raises_usage_error():
    with pytest.raises(UsageError, match="Did you mean 'cifar100'"):
        draft(("cifar10",))
