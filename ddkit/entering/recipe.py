"""Recipes: everything that decides about an entry, as one TOML file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddkit import challenge
from ddkit.data.store import dataset_spec, is_prepared, train_sha256
from ddkit.distill.settings import RefineSettings
from ddkit.errors import BadFileError, UsageError, did_you_mean
from ddkit.generator.config import (
    BUNDLE_SAMPLING,
    PRECISIONS,
    BundleSettings,
    SamplingSettings,
    default_mode_guidance,
    default_sampling,
)
from ddkit.generator.presets import preset as preset_of
from ddkit.runtime.files import explain_os_error, write_text
from ddkit.runtime.records import Count, flatten, read_record

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

IPC = 10  # images per class on track 1
_HEADING = "# Made by ddkit. To make the same entry again: ddkit enter --recipe {name}\n\n"
_UNUSED_BY_RECIPES = ("seed", "batch_size", "compile")  # of `SamplingSettings`
_UNUSED_BY_BUNDLES = ("influence_guidance", *_UNUSED_BY_RECIPES)


@dataclass(frozen=True)
class SetRecipe:
    """How the set of one dataset is made on track 1, or its generator on track 2.

    dataset_sha256: of the prepared training split; "" accepts any. preset: of the generator whose images are refined or,
    on track 2, that is packed; "" takes random real images.
    autoencoder_steps, train_steps: lengths of the generator's training; None while a time decides, or for the preset's.
    train_precision: one of PRECISIONS, in which the generator trains; "" takes the one that suits the device.
    compile: as in `ddkit.generator.config.GeneratorConfig`. refine: None refines nothing, which needs a preset.
    refine_steps: None while a time decides. sampling: how the generator samples on track 1, and bundle: how it does on
    track 2; None takes this version's defaults, and names that their tables leave out those of `SamplingSettings`, without
    mode guidance. sha256: of the set's file that came out, or on track 2 of the bundle's files, as an evaluation records
    it; "" if it is not known.
    """

    dataset: str
    dataset_sha256: str = ""
    preset: str = ""
    autoencoder_steps: Count | None = None
    train_steps: Count | None = None
    train_precision: str = ""
    compile: bool | None = None
    refine: RefineSettings | None = None
    refine_steps: Count | None = None
    sampling: SamplingSettings | None = None
    bundle: BundleSettings | None = None
    sha256: str = ""

    def __post_init__(self) -> None:
        dataset_spec(self.dataset)  # raises UsageError for an unknown name
        if self.preset:
            preset_of(self.preset)
        if self.train_precision not in ("", *PRECISIONS):
            raise UsageError(f"Unknown precision '{self.train_precision}'.", did_you_mean(self.train_precision, PRECISIONS))

    @property
    def bundle_settings(self) -> BundleSettings:
        """How the generator of a preset samples on track 2."""
        return self.bundle or BundleSettings(
            dataclasses.replace(BUNDLE_SAMPLING, mode_guidance=default_mode_guidance(self._prediction))
        )

    @property
    def sampling_settings(self) -> SamplingSettings:
        """How the generator of a preset samples on track 1; the seed is the recipe's."""
        return self.sampling or default_sampling(self._prediction)

    @property
    def _prediction(self) -> str:
        return preset_of(self.preset).config(dataset_spec(self.dataset).image_size).objective.prediction


@dataclass(frozen=True)
class Recipe:
    """How an entry is made and scored.

    sets: one for each dataset. epochs_setting, rounds, time_budget: of the evaluation; None takes the track's.
    versions: of ddkit and of the libraries that made it, and the name of the device. engines: how networks were computed,
    as `ddkit.network.autotune.prescribed_plans` takes it. accuracies: what was scored, by dataset, fractions.
    """

    sets: tuple[SetRecipe, ...]
    track: int = 1
    seed: Count = 0
    epochs_setting: Count | None = None
    rounds: Count | None = None
    time_budget: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    accuracies: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        challenge.track(self.track)
        names = self.datasets
        if not names or len(set(names)) < len(names):
            raise UsageError(f"An entry takes each dataset once, not {', '.join(names) or 'none'}.")
        if self.track == 2 and not all(each.preset for each in self.sets):
            raise UsageError("On track 2 every dataset needs a generator.", "Add the name of its preset.")
        if self.track == 1 and not all(each.preset or each.refine is not None for each in self.sets):
            raise UsageError(
                "On track 1 every set needs a generator or a refinement.",
                "Add the name of a preset, or a table refine, which may be empty: refine = {}",
            )

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(each.dataset for each in self.sets)

    def set_of(self, dataset: str) -> SetRecipe:
        return next(each for each in self.sets if each.dataset == dataset)

    def with_set(self, changed: SetRecipe) -> Recipe:
        sets = tuple(changed if each.dataset == changed.dataset else each for each in self.sets)
        return dataclasses.replace(self, sets=sets)

    def require_datasets(self) -> None:
        """Raise UsageError where a prepared dataset has other training images than the recipe was made with."""
        for each in self.sets:
            if not each.dataset_sha256 or not is_prepared(each.dataset):
                continue
            if (found := train_sha256(each.dataset)) != each.dataset_sha256:
                raise UsageError(
                    f"The recipe was made with other training images of '{each.dataset}' than those that are prepared: "
                    f"their SHA-256 is {each.dataset_sha256[:12]}..., not {found[:12]}....",
                    f"Prepare the same images with ddkit data prepare {each.dataset} --from PATH --force, or delete the "
                    "line dataset_sha256 from the recipe to use those that are there.",
                )

    def to_json(self) -> dict[str, Any]:
        """Plain values, as TOML and JSON hold them; what is None or empty is left out."""
        values = {name: value for name, value in vars(self).items() if name != "sets" and value not in (None, {})}
        engines = {"engines": values.pop("engines")} if self.engines else {}  # last, as they are long
        return values | {"sets": [_set_to_json(each) for each in self.sets]} | engines

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from what `to_json` made of it. Raises UsageError for unknown names and wrong values."""
        sets = values.get("sets")
        if not isinstance(sets, list):
            raise UsageError("A recipe has one table [[sets]] for each dataset.")
        try:
            return read_record(cls, {**values, "sets": list(map(_completed, sets))})
        except BadFileError as error:
            raise UsageError(f"{error.message}.", error.remedy) from error


def read_recipe(path: Path) -> Recipe:
    """Read a recipe's TOML file. Raises BadFileError where it cannot be read, and UsageError for what it says."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise explain_os_error(error, path) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadFileError(f"{path} is not TOML: {error}.", "Name the recipe.toml of an entry.") from error
    try:
        return Recipe.from_json(values)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", error.remedy) from error


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as TOML, atomically. Raises BadFileError."""
    import tomli_w

    write_text(path, _HEADING.format(name=path.name) + tomli_w.dumps(recipe.to_json()))


def _set_to_json(each: SetRecipe) -> dict[str, Any]:
    values = {name: value for name, value in vars(each).items() if value not in (None, "")}
    if each.refine is not None:
        refine = dataclasses.asdict(each.refine)
        values["refine"] = {name: value for name, value in refine.items() if name not in each.refine.without_effect}
    if each.bundle is not None:
        bundle = {name: value for name, value in vars(each.bundle).items() if value is not None}
        values["bundle"] = bundle | {"sampling": _sampling_to_json(each.bundle.sampling, _UNUSED_BY_BUNDLES)}
    if each.sampling is not None:
        values["sampling"] = _sampling_to_json(each.sampling, _UNUSED_BY_RECIPES)
    return values


def _sampling_to_json(settings: SamplingSettings, unused: Container[str]) -> dict[str, Any]:
    values = {name: value for name, value in vars(settings).items() if name not in unused}
    return values | {"guidance_interval": list(settings.guidance_interval)}  # as JSON and TOML have it


def _completed(values: Any) -> Any:
    """A set's values with all settings of its refinement, checked as those on the command line are, and of its sampling."""
    if not isinstance(values, Mapping):
        return values
    found = dict(values)
    if isinstance(refine := found.get("refine"), Mapping):
        found["refine"] = dataclasses.asdict(RefineSettings().with_changes(flatten(refine)))
    if isinstance(sampling := found.get("sampling"), Mapping):
        found["sampling"] = {**dataclasses.asdict(SamplingSettings()), **sampling}
    bundle = found.get("bundle")
    if isinstance(bundle, Mapping) and isinstance(sampling := bundle.get("sampling", {}), Mapping):
        found["bundle"] = {**bundle, "sampling": {**dataclasses.asdict(BUNDLE_SAMPLING), **sampling}}
    return found
