"""Stages: their files show what is done, and what is to come once an earlier stage is."""

import dataclasses
import functools

import pytest
import torch
from PIL import Image

from ddkit.data.class_names import CLASS_NAMES
from ddkit.data.prepare import prepare
from ddkit.data.store import dataset_spec, load_dataset
from ddkit.distill.generate import FromReal, generate
from ddkit.distill.settings import PRESETS
from ddkit.entering.entry import Plan, plan_entry
from ddkit.entering.plan import Outline
from ddkit.entering.recipe import Recipe, SetRecipe
from ddkit.entering.stages import PACK, Workplace
from ddkit.errors import UsageError
from ddkit.evaluation.evaluate import EvaluationSettings
from ddkit.evaluation.job import JobSettings, evaluate_files
from ddkit.evaluation.test_sets import as_test_set
from ddkit.results import Result, append, read
from ddkit.runtime.files import sha256_of, write_json

STAGES = ("prepare", "random real images", "refine", "evaluate submission", "evaluate baseline", "report")
DEVIATIONS = (
    "dataset glyphs, the challenge has cifar100 and tinyimagenet",
    "1 round instead of 3",
    "E = 5 instead of 1000",
)


@pytest.fixture
def place(letters, tmp_path):
    """An entry that refines, evaluates with E = 5 and one round, and has real images in the place of both its sets."""
    for name in ("submission", "baseline"):
        generate("glyphs", 10, FromReal("random", 0, "cpu"), tmp_path / name / "glyphs.pt")
    recipe = Recipe((SetRecipe("glyphs", refine=PRESETS["track1"]),), epochs_setting=5, rounds=1)
    return Workplace(tmp_path, recipe, "cpu", lambda name, earlier: 0.0, lambda text: None)


def record(place, accuracy=0.5, **changes):
    """Append the record of the evaluation that the entry prescribes, with changes."""
    values = {
        "dataset": "glyphs", "images": 100, "images_per_class": (10, 10), "accuracies": (accuracy,), "name": "submission",
        "track": 1, "sha256": sha256_of(place.submission("glyphs")), "source": "submission/glyphs.pt", "epochs_setting": 5,
        "deviations": DEVIATIONS,
        "test_sha256": as_test_set(load_dataset("glyphs", "test"), dataset_spec("glyphs")).sha256,
    }  # fmt: skip
    append(Result(**(values | changes)), place.results_file)


def test_an_evaluation_is_to_come_if_its_set_is_to_be_refined_and_that_of_the_baseline_is_not(place):
    record(place)
    stages = place.stages({name if name == "report" else f"{name} glyphs": 1.0 for name in STAGES})
    assert [stage.name for stage in stages if stage.is_done()] == [
        f"{name} glyphs" for name in STAGES if name not in ("refine", "report")
    ]
    states = Plan(place.recipe, None, stages, ()).states()
    to_come = [state.name for state in states if state.status == "to come"]
    assert to_come == ["refine glyphs", "evaluate submission glyphs", "report"]


def test_on_track_2_a_bundle_and_its_evaluations_are_to_come_if_any_generator_is_to_be_trained(tmp_path):
    recipe = Recipe(tuple(SetRecipe(name, preset="tiny") for name in ("cifar100", "glyphs")), track=2)
    place = Workplace(tmp_path, recipe, "cpu", lambda name, earlier: 0.0, lambda text: None)
    names = [f"{verb} {name}" for verb in ("prepare", "train", "evaluate") for name in recipe.datasets] + [PACK, "report"]
    stages = [
        dataclasses.replace(stage, is_done=functools.partial(bool, stage.name != "train glyphs"))
        for stage in place.stages(dict.fromkeys(names, 1.0))
    ]
    states = Plan(recipe, None, tuple(stages), ()).states()
    to_come = [state.name for state in states if state.status == "to come"]
    assert to_come == ["train glyphs", PACK, "evaluate cifar100", "evaluate glyphs", "report"]


def test_an_entry_keeps_its_presets_where_others_would_be_chosen_now(tmp_path):
    """As on a GPU with more or less free memory than when it began."""
    begun, now = (Recipe((SetRecipe("glyphs", preset=preset),), track=2) for preset in ("small", "mid"))
    outline = Outline(begun, 3600.0, {})
    state = {"asked": begun.to_json(), "outline": dataclasses.asdict(outline), "recipe": dataclasses.asdict(begun)}
    write_json(tmp_path / "runs" / "entry.json", state)
    assert plan_entry(now, tmp_path, seconds=3600.0).recipe == begun
    with pytest.raises(UsageError, match=r"other settings \(seed\)"):
        plan_entry(dataclasses.replace(now, seed=1), tmp_path, seconds=3600.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bfloat16", "deviations": (*DEVIATIONS, "bfloat16 instead of float32")},
        {"network": "resnet18", "deviations": (*DEVIATIONS, "network resnet18 instead of convnet")},
        {"augment": False, "deviations": (*DEVIATIONS, "no augmentation")},
        {"deviations": ("dataset glyphs, the challenge has cifar100 and tinyimagenet", "converted from ZCA", *DEVIATIONS[1:])},
        {"deviations": (*DEVIATIONS[:2], "E = 7 instead of 1000"), "epochs_setting": 7},
        {"seed": 1},
        {"test_sha256": "ab" * 32},
    ],
)
def test_a_result_under_other_settings_is_not_the_evaluation_of_the_entry(place, changes):
    (stage,) = place.stages({"evaluate submission glyphs": 1.0})
    record(place, 0.9, **changes)
    assert not stage.is_done() and place.exact_recipe().accuracies == {}
    record(place, 0.5)
    record(place, 0.9, **changes)
    assert stage.is_done() and place.exact_recipe().accuracies == {"glyphs": 0.5}


@pytest.mark.slow
def test_an_evaluation_on_own_test_images_is_done_where_no_official_one_can_be_had(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 10), ("test", 1)):
        for name in CLASS_NAMES["cifar100"]:
            folder = tmp_path / "own" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    prepare("cifar100", tmp_path / "own")
    generate("cifar100", 10, FromReal("random", 0, "cpu"), tmp_path / "submission" / "cifar100.pt")
    recipe, events = Recipe((SetRecipe("cifar100", refine=PRESETS["track1"]),), epochs_setting=0, rounds=1), []
    place = Workplace(tmp_path, recipe, "cpu", lambda name, earlier: 0.0, events.append)
    stage, packing = place.stages({"evaluate submission cifar100": 1.0, PACK: 1.0})
    packing.run(lambda report: None)
    assert events[-1] == "The challenge also wants a set for tinyimagenet; submission.zip has none."
    settings = EvaluationSettings(rounds=1, epochs_setting=0, device="cpu")
    evaluate_files([place.submission("cifar100")], JobSettings(settings, results=place.results_file))
    (found,) = read(place.results_file).results
    assert "100 test images instead of 10,000" in found.deviations
    assert stage.is_done() and place.exact_recipe().accuracies == {"cifar100": found.mean} and not place.lacks_official()
