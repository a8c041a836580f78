"""Which training is asked for: a preset, what is said beside it, and what the training that goes on has been told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddkit.errors import MissingModelError, UsageError
from ddkit.generator.model_folder import has_model
from ddkit.generator.presets import MINIMAX_PRESET, GeneratorConfig, preset
from ddkit.generator.pretrained import Start, start_from
from ddkit.generator.training.run_folder import Recorded, recorded
from ddkit.generator.training.tracking import NAMES
from ddkit.generator.training.train import TrainingData

DEFAULT_PRESET = "tiny"
METHODS = ("diffusion", "minimax")
_OF_MINIMAX = ("init", "full", "lambda_r", "lambda_d", "memory_size", "epochs", "class_map")
# What fine-tuning takes from its start, each with the option that would decide it otherwise.
_FROM_START = {"prediction": "prediction", "architecture": "architecture", "pretrained_autoencoder": "autoencoder"}


@dataclass(frozen=True)
class TrainingOptions:
    """What is said of a training; None leaves a setting to the training that goes on, else to the preset.

    method: one of METHODS; fine-tuning by minimax diffusion is also what `init`, its preset and a folder that holds
    one imply. steps to accumulation: of the denoiser's OptimiserConfig. init to class_map: of MinimaxConfig. min_snr:
    min_snr_gamma of ObjectiveConfig, 0 for None there.
    track_every, features: as in `Plan`. The others: of GeneratorConfig, its objective and its denoiser.
    """

    preset: str | None = None
    method: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    accumulation: int | None = None
    ema_width: float | None = None
    ema_decay: float | None = None
    label_dropout: float | None = None
    min_snr: float | None = None
    prediction: str | None = None
    architecture: str | None = None
    flips: bool | None = None
    precision: str | None = None
    compile: bool | None = None
    pretrained_autoencoder: str | None = None
    seed: int | None = None
    track_every: int | None = None
    features: str | None = None
    init: str | None = None
    full: bool | None = None
    lambda_r: float | None = None
    lambda_d: float | None = None
    memory_size: int | None = None
    epochs: int | None = None
    class_map: tuple[tuple[str, str | int | None], ...] | None = None

    def tunes(self, begun: GeneratorConfig | None = None) -> bool:
        """Whether a generator is to be fine-tuned. begun: the settings of the training that is to go on.

        Raises UsageError where --method says otherwise than the rest.
        """
        implied = self.preset == MINIMAX_PRESET or self.init is not None or bool(begun and begun.minimax)
        if self.method == "diffusion" and implied:
            raise UsageError(
                "--method diffusion starts from nothing.",
                f"It does not go with --init, --preset {MINIMAX_PRESET} or a folder that holds a fine-tuning.",
            )
        return self.method == "minimax" or implied

    def averages(self) -> dict[str, float | None]:
        """What is said of averaged weights: a width takes the place of a preset's decay. Raises UsageError for both."""
        said = self.given("ema_width", "ema_decay")
        if len(said) == 2:
            raise UsageError("--ema-width and --ema-decay contradict each other.")
        return {"ema_decay": None, **said} if said else {}

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the settings that something is said of."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def applied_to(self, config: GeneratorConfig) -> GeneratorConfig:
        """A configuration with what is said otherwise, but for fine-tuning."""
        optimizer = self.given("steps", "batch_size", "learning_rate", "accumulation")
        objective = self.given("prediction", "label_dropout")
        if self.min_snr is not None:
            objective["min_snr_gamma"] = self.min_snr or None
        return dataclasses.replace(
            config,
            denoiser=dataclasses.replace(config.denoiser, **self.given("architecture")),
            objective=dataclasses.replace(config.objective, **objective),
            denoiser_optimizer=dataclasses.replace(config.denoiser_optimizer, **optimizer),
            **self.given("precision", "compile", "pretrained_autoencoder", "seed", "flips"),
            **self.averages(),
        )


@dataclass(frozen=True)
class Plan:
    """A training that can begin, or go on. preset: the name of what the configuration came from, "" for none.

    track_every: steps between two scores of the model; 0 for never. features: that they look through, of
    `tracking.NAMES`. start: what fine-tuning starts from, read already; None for a training from nothing.
    """

    preset: str
    config: GeneratorConfig
    track_every: int
    features: str
    start: Start | None = None


def plan_training(data: TrainingData, folder: Path, wishes: TrainingOptions, *, own: Path, fresh: bool = False) -> Plan:
    """The training that is meant: what goes on in `folder` keeps its settings where nothing else is said.

    own: the folder of the dataset's own generator; fine-tuning starts from it where it is there and nothing else is
    named. fresh: whatever is in `folder` is to be forgotten.
    Raises UsageError for what contradicts itself or no preset knows; MissingModelError where there is nothing to start
    fine-tuning from, and what `start_from` raises.
    """
    begun = None if fresh else recorded(folder)
    tunes = wishes.tunes(begun.config if begun else None)
    _refuse_alien(wishes, tunes)
    if begun and wishes.preset in (None, begun.preset):
        name, base = begun.preset, begun.config
    else:
        name = wishes.preset or (MINIMAX_PRESET if tunes else DEFAULT_PRESET)
        base = preset(name).config(data.image_size)
    config, tracking = wishes.applied_to(base), _tracking(wishes, begun, name)
    if not tunes:
        return Plan(name, config, *tracking)
    minimax = begun.config.minimax if begun else None
    if minimax is None:
        minimax = config.minimax or preset(MINIMAX_PRESET).config(data.image_size).minimax
        if has_model(own):
            minimax = dataclasses.replace(minimax, init=str(own))
        elif wishes.init is None:
            raise MissingModelError(
                f"There is no generator of '{data.name}' to start from: {own} holds none.",
                f"Train one: ddkit train --dataset {data.name}. Or name one: --init FOLDER, or --init {minimax.init} "
                "for a pretrained one (gigabytes).",
            )
    config = dataclasses.replace(config, minimax=dataclasses.replace(minimax, **wishes.given(*_OF_MINIMAX)))
    minimax = config.minimax
    start = start_from(minimax.init, data.images.class_names, full=minimax.full, chosen=dict(minimax.class_map))
    return Plan(name, _completed(config, data, wishes, start, new=begun is None), *tracking, start)


def _tracking(wishes: TrainingOptions, begun: Recorded | None, preset_name: str) -> tuple[int, str]:
    """`track_every` and `features` of a Plan: what is said, else what was said before, else the preset's."""
    every, score = (begun.track_every, begun.score) if begun else (None, "")
    if wishes.track_every is not None:
        every = wishes.track_every
    elif every is None:
        every = preset(preset_name).track_every if preset_name else 0
    if wishes.features and not every:
        raise UsageError("--features are what --track-every looks with, and nothing is tracked.", "Give --track-every STEPS.")
    before = next((features for features, name in NAMES.items() if name == score), next(iter(NAMES)))
    return every, wishes.features or before


def _refuse_alien(wishes: TrainingOptions, tunes: bool) -> None:
    """Raise UsageError where settings of one method are given with the other."""
    if tunes and (alien := wishes.given(*_FROM_START)):
        raise UsageError(f"--{_FROM_START[next(iter(alien))]} is decided by what fine-tuning starts from, --init.")
    if not tunes and (alien := wishes.given(*_OF_MINIMAX)):
        raise UsageError(f"--{next(iter(alien)).replace('_', '-')} goes with --method minimax.")


def _completed(
    config: GeneratorConfig, data: TrainingData, wishes: TrainingOptions, start: Start, *, new: bool
) -> GeneratorConfig:
    """The configuration with what its start decides. new: no training goes on, whose length and flips are known."""
    changes: dict[str, Any] = {"objective": dataclasses.replace(config.objective, prediction=start.generator.prediction)}
    if wishes.steps is None and (new or wishes.epochs is not None):
        optimizer = config.denoiser_optimizer
        steps = max(1, config.minimax.epochs * len(data.images) // optimizer.batch_size)
        changes["denoiser_optimizer"] = dataclasses.replace(optimizer, steps=steps)
    init = Path(config.minimax.init).expanduser()
    if new and wishes.flips is None and has_model(init) and (before := recorded(init)):
        changes["flips"] = before.config.flips
    return dataclasses.replace(config, **changes)
