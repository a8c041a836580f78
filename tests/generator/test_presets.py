"""Settings: what is refused, presets at every size, and the way through JSON."""

import dataclasses
import json

import pytest

from ddkit.errors import BadFileError, UsageError
from ddkit.generator.config import (
    AutoencoderConfig,
    DenoiserConfig,
    GeneratorConfig,
    MinimaxConfig,
    ObjectiveConfig,
    OptimizerConfig,
    default_mode_guidance,
    default_sampling,
)
from ddkit.generator.presets import MINIMAX_PRESET, PRESETS, preset
from ddkit.generator.training.plan import SETTINGS
from ddkit.runtime.records import differences, override, read_record


@pytest.mark.parametrize(
    ("kind", "wrong", "named"),
    [
        (AutoencoderConfig, {"channels": (12,)}, "channels"),
        (AutoencoderConfig, {"latent_channels": 0}, "latent_channels"),
        (DenoiserConfig, {"architecture": "uvitt"}, "Did you mean 'uvit'"),
        (DenoiserConfig, {"depth": 4}, "odd"),
        (DenoiserConfig, {"hidden_size": 100, "num_heads": 3}, "heads"),
        (ObjectiveConfig, {"prediction": "velocity"}, "prediction"),
        (ObjectiveConfig, {"label_dropout": 1.0}, "label_dropout"),
    ],
)
def test_invalid_setting_raises_usage_error_that_names_it(kind, wrong, named):
    with pytest.raises(UsageError, match=named):
        kind(**wrong)


def test_batch_that_does_not_split_evenly_raises_usage_error():
    with pytest.raises(UsageError, match="4 equal parts"):
        OptimizerConfig(steps=1, batch_size=6, learning_rate=1e-3, accumulation=4)


def test_learning_rate_rises_then_holds_then_falls_as_one_over_the_root():
    optimizer = OptimizerConfig(steps=1, batch_size=1, learning_rate=0.1, warmup_steps=10, decay_after_steps=100)
    assert optimizer.rate(0) == pytest.approx(0.01)
    assert optimizer.rate(9) == optimizer.rate(99) == pytest.approx(0.1)
    assert optimizer.rate(399) == pytest.approx(0.05)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("image_size", [32, 64, 96, 128, 160, 224, 256])
def test_every_preset_fits_every_usual_size(name, image_size):
    config = preset(name).config(image_size)
    channels, side, _ = config.autoencoder.latent_shape(image_size)
    assert config.denoiser.patch_size(side) * config.denoiser.tokens_per_side == side
    assert channels == config.autoencoder.latent_channels


def test_fine_tuning_preset_is_the_same_for_every_size():
    assert preset("minimax-paper").config(30) == preset("minimax-paper").config(32)


def test_image_size_that_does_not_fit_raises_usage_error_with_a_remedy():
    with pytest.raises(UsageError, match="multiple of 4.*--image-size 32, or choose another preset"):
        preset("demo").config(30)
    with pytest.raises(UsageError, match="multiple of 16.*--image-size 192"):
        preset("tiny").config(200)


def test_larger_images_are_not_cut_into_coarser_patches():
    """What the transformer of a preset sees at 256 px is no coarser, in latents a patch, than at 32 px."""
    for name in ("tiny", "small", "dit"):
        patches = {}
        for size in (32, 256):
            config = preset(name).config(size)
            patches[size] = config.denoiser.patch_size(config.autoencoder.latent_shape(size)[1])
        assert patches[256] <= patches[32]


def test_unknown_preset_raises_usage_error_that_offers_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'tiny'"):
        preset("tinny")


@pytest.mark.parametrize("name", PRESETS)
def test_configuration_survives_json(name):
    config = preset(name).config(32)
    assert read_record(GeneratorConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_unknown_and_missing_keys_raise_bad_file_error_that_names_them():
    value = dataclasses.asdict(preset("demo").config(32))
    value["objective"]["wieght"] = 1
    with pytest.raises(BadFileError, match="objective: unknown fields wieght"):
        read_record(GeneratorConfig, value)
    del value["objective"]["wieght"], value["denoiser"]
    with pytest.raises(BadFileError, match="fields missing: denoiser"):
        read_record(GeneratorConfig, value)


def test_differences_are_listed_with_both_values():
    config = preset("demo").config(32)
    objective = dataclasses.replace(config.objective, prediction="epsilon")
    other = dataclasses.replace(config, objective=objective, seed=7)
    assert differences(dataclasses.asdict(config), dataclasses.asdict(other)) == [
        f"objective.prediction: epsilon, not {config.objective.prediction}",
        "seed: 7, not 0",
    ]


def test_override_changes_nested_settings_and_keeps_the_rest():
    config = preset("demo").config(32)
    changed = override(config, {"denoiser_optimizer.steps": 7, "objective.prediction": "v", "seed": 3})
    assert differences(dataclasses.asdict(config), dataclasses.asdict(changed)) == [
        f"denoiser_optimizer.steps: 7, not {config.denoiser_optimizer.steps}", "objective.prediction: v, not flow",
        "seed: 3, not 0",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "named"), [("sede", "Did you mean 'seed'"), ("objective.predict", "ObjectiveConfig has no")])
def test_override_of_an_unknown_setting_raises_usage_error(name, named):
    with pytest.raises(UsageError, match=named):
        override(preset("demo").config(32), {name: 1})


def test_every_named_setting_of_a_training_exists():
    config = preset(MINIMAX_PRESET).config(32)
    for path in SETTINGS.values():
        value = config
        for name in path.split("."):
            value = getattr(value, name)


@pytest.mark.parametrize(
    ("prediction", "given", "guidance", "mode_guidance"),
    [
        ("flow", {}, 1.0, default_mode_guidance("flow")),
        ("epsilon", {}, 3.0, 0.0),
        ("v", {}, 3.0, 0.0),
        ("flow", {"guidance": 2.0}, 2.0, 0.0),
        ("flow", {"guidance_interval": (0.2, 0.8)}, 3.0, 0.0),
        ("flow", {"mode_guidance": 0.0}, 3.0, 0.0),
        ("epsilon", {"mode_guidance": 0.1}, 1.0, 0.1),
        ("flow", {"guidance": 2.0, "mode_guidance": 0.1}, 2.0, 0.1),
    ],
)
def test_modes_guide_samples_unless_guidance_is_chosen(prediction, given, guidance, mode_guidance):
    settings = default_sampling(prediction, steps=7, **given)
    assert (settings.guidance, settings.mode_guidance, settings.steps) == (guidance, mode_guidance, 7)


def test_class_map_may_be_a_dictionary_or_pairs():
    pairs = (("bear", "brown bear"), ("ox", 345), ("sky", None))
    for given in (pairs, dict(pairs), [list(pair) for pair in pairs]):
        assert MinimaxConfig("runs/own", class_map=given).class_map == pairs
