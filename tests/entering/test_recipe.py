"""Recipes as TOML: what is written is read, and what cannot be used is refused in words."""

import dataclasses
import json
from pathlib import Path

import pytest

from ddkit.distill.settings import PoolSettings, RefineSettings
from ddkit.entering.recipe import Recipe, SetRecipe, read_recipe, write_recipe
from ddkit.errors import BadFileError, UsageError
from ddkit.generator.config import BundleSettings, SamplingSettings, default_mode_guidance

RECIPES = Path(__file__).resolve().parents[2] / "tools" / "recipes"
RECIPE = Recipe(
    (
        SetRecipe("cifar100", "ab" * 32, refine=RefineSettings(batch_real=8, pool=PoolSettings(size=3)), refine_steps=7),
        SetRecipe(
            "glyphs",
            preset="demo",
            train_steps=5,
            train_precision="bfloat16",
            refine=RefineSettings("dm", seed=2),
            refine_steps=0,
            sha256="cd" * 32,
        ),
    ),
    seed=2,
    epochs_setting=0,
    rounds=1,
    versions={"ddkit": "0.1.0"},
    engines={"AMD, 2 threads": {"kind": "winograd", "chunk": 8}},
    accuracies={"glyphs": 0.5},
)


def test_a_recipe_is_read_as_it_was_written(tmp_path):
    write_recipe(RECIPE, tmp_path / "recipe.toml")
    assert read_recipe(tmp_path / "recipe.toml") == RECIPE
    assert "ddkit enter --recipe recipe.toml" in (tmp_path / "recipe.toml").read_text().splitlines()[0]


def test_a_recipe_of_a_generator_is_read_with_the_settings_of_its_bundle(tmp_path):
    sampling = SamplingSettings(
        "ddim", steps=7, guidance=1.5, guidance_interval=(0.25, 0.75), mode_guidance=0.2, precision="bfloat16"
    )
    bundle = BundleSettings(sampling, images_per_class=20, keep=0.25)
    recipe = Recipe((SetRecipe("glyphs", preset="demo", train_steps=5, bundle=bundle),), track=2)
    assert json.loads(json.dumps(recipe.to_json())) == recipe.to_json()  # an entry that continues compares these
    write_recipe(recipe, tmp_path / "recipe.toml")
    assert read_recipe(tmp_path / "recipe.toml") == recipe


def test_a_recipe_of_a_generator_is_read_with_the_sampling_of_its_set(tmp_path):
    sampling = SamplingSettings(steps=7, guidance=1.5, guidance_interval=(0.25, 0.75), influence_guidance=0.05)
    recipe = Recipe((SetRecipe("glyphs", preset="demo", train_steps=5, sampling=sampling),))
    assert json.loads(json.dumps(recipe.to_json())) == recipe.to_json()
    write_recipe(recipe, tmp_path / "recipe.toml")
    assert read_recipe(tmp_path / "recipe.toml") == recipe
    silent = SetRecipe("glyphs", preset="demo", train_steps=5)
    assert silent.sampling_settings.mode_guidance == default_mode_guidance("flow")


def test_a_recipe_that_does_not_say_how_its_bundle_samples_takes_defaults(tmp_path):
    (tmp_path / "old.toml").write_text('track = 2\n[[sets]]\ndataset = "glyphs"\npreset = "demo"\ntrain_steps = 5\n')
    sampling = dataclasses.replace(BundleSettings().sampling, mode_guidance=default_mode_guidance("flow"))
    assert read_recipe(tmp_path / "old.toml").sets[0].bundle_settings == BundleSettings(sampling)
    with (tmp_path / "old.toml").open("a") as file:
        file.write("[sets.bundle.sampling]\nsteps = 4\n")
    sampling = dataclasses.replace(BundleSettings().sampling, steps=4)
    assert read_recipe(tmp_path / "old.toml").sets[0].bundle_settings == BundleSettings(sampling)


def test_recorded_recipes_can_be_read_and_have_all_lengths():
    found = {path.stem: read_recipe(path) for path in RECIPES.glob("*.toml")}
    assert len(found) > 1
    for recipe in found.values():
        for each in recipe.sets:
            assert each.train_steps if recipe.track == 2 else each.refine is not None and each.refine_steps
    assert found["cifar100-track2-44.38"].sets[0].bundle_settings.images_per_class == 250
    recorded = found["cifar100-33.89"].sets[0]
    assert (recorded.refine.pool.size, recorded.refine.precision, recorded.refine_steps) == (0, "float32", 1792)


def test_a_recipe_of_few_lines_takes_defaults(tmp_path):
    (tmp_path / "short.toml").write_text('[[sets]]\ndataset = "cifar100"\nrefine_steps = 10\n[sets.refine]\npool.size = 0\n')
    refine = RefineSettings(pool=PoolSettings(size=0))
    assert read_recipe(tmp_path / "short.toml") == Recipe((SetRecipe("cifar100", refine=refine, refine_steps=10),))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = 3\n", r"a recipe has one table \[\[sets\]\]"),
        ("sets = 3\n", r"a recipe has one table \[\[sets\]\]"),
        ('[[sets]]\ndataset = "cifar10"\n', "Did you mean 'cifar100'"),
        ("[[sets]]\nrefine_steps = 3\n", "sets: fields missing: dataset"),
        ('sed = 3\n[[sets]]\ndataset = "glyphs"\n', "unknown fields sed.*Did you mean 'seed'"),
        ('seed = "3"\n[[sets]]\ndataset = "glyphs"\n', 'seed cannot be "3"'),
        ('seed = 2020-01-01\n[[sets]]\ndataset = "glyphs"\n', 'seed cannot be "2020-01-01"'),
        ('seed = true\n[[sets]]\ndataset = "glyphs"\n', "seed cannot be true"),
        ('track = 3\n[[sets]]\ndataset = "glyphs"\n', "Unknown track 3"),
        ('track = 2\n[[sets]]\ndataset = "glyphs"\n', "needs a generator"),
        ('[[sets]]\ndataset = "glyphs"\npreset = "dem"\n', "Did you mean 'demo'"),
        ('[[sets]]\ndataset = "glyphs"\ntrain_precision = "bfloat"\n', "Unknown precision 'bfloat'. Did you mean 'bfloat16'"),
        ('[[sets]]\ndataset = "glyphs"\nrefine_steps = -1\n', "sets: refine_steps cannot be -1"),
        ('[[sets]]\ndataset = "glyphs"\nrefine = 3\n', "sets: refine cannot be 3"),
        ('[[sets]]\ndataset = "glyphs"\n[sets.refine]\nrate = 3\n', "Unknown setting 'rate'"),
        ('[[sets]]\ndataset = "glyphs"\n[sets.bundle]\nkept = 0.3\n', "sets: bundle: unknown fields kept.*Did you mean 'keep'"),
        ('[[sets]]\ndataset = "glyphs"\n[sets.bundle]\nkeep = 0\n', "keep must be above 0"),
        ('[[sets]]\ndataset = "glyphs"\n[sets.bundle.sampling]\nsteps = "9"\n', 'sampling: steps cannot be "9"'),
        ('[[sets]]\ndataset = "glyphs"\n[[sets]]\ndataset = "glyphs"\n', "takes each dataset once"),
    ],
)
def test_read_recipe_of_wrong_contents_raises_usage_error_that_names_the_file(tmp_path, text, said):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"(?i)wrong.toml: .*{said}"):
        read_recipe(path)


def test_read_recipe_of_what_is_not_toml_raises_bad_file_error(tmp_path):
    (tmp_path / "set.pt").write_bytes(b"PK\x03\x04\xff\xfe")
    for name in ("set.pt", "nowhere.toml"):
        with pytest.raises(BadFileError, match=name):
            read_recipe(tmp_path / name)


def test_a_set_of_track_1_that_nothing_makes_is_refused():
    with pytest.raises(UsageError, match="every set needs a generator or a refinement.*refine = {}"):
        Recipe((SetRecipe("glyphs"),))


def test_a_recipe_of_other_images_is_refused_and_one_without_a_hash_is_not(letters):
    drawn = SetRecipe(letters, "12" * 32, refine=RefineSettings())
    with pytest.raises(UsageError, match="other training images of 'glyphs' .*SHA-256 is 121212121212.*delete the line"):
        Recipe((drawn,)).require_datasets()
    Recipe((dataclasses.replace(drawn, dataset_sha256=""),)).require_datasets()
