"""Deciding on a training: a preset, the settings given, what the training in the folder was begun with, and the machine."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddkit.errors import ComputeError, MissingModelError, UsageError, did_you_mean
from ddkit.generator.config import METHODS, GeneratorConfig, MinimaxConfig
from ddkit.generator.model_facts import has_model
from ddkit.generator.model_folder import Model
from ddkit.generator.presets import DEFAULT_PRESET, GPU_PRESETS, MINIMAX_PRESET, preset
from ddkit.generator.pretrained import Start, start_from
from ddkit.generator.training.estimate import Estimate, estimate, shortage
from ddkit.generator.training.run_folder import has_training, read_run_record
from ddkit.generator.training.tracking import SCORE_NAMES
from ddkit.generator.training.train import TrainingData, TrainingRequest, train
from ddkit.runtime.device import (
    cpu_model,
    describe_device,
    free_memory,
    has_bfloat16,
    own_device,
    resolve_device,
    shared_gpus,
)
from ddkit.runtime.environment import processes
from ddkit.runtime.progress import Listener, ignore, span_text, time_option
from ddkit.runtime.records import override

# The settings that a user gives by name, as --batch-size or batch_size=, and their place in GeneratorConfig.
SETTINGS = {
    "steps": "denoiser_optimizer.steps",
    "batch_size": "denoiser_optimizer.batch_size",
    "learning_rate": "denoiser_optimizer.learning_rate",
    "accumulation": "denoiser_optimizer.accumulation",
    "ema_width": "ema_width",
    "ema_decay": "ema_decay",
    "label_dropout": "objective.label_dropout",
    "min_snr": "objective.min_snr_gamma",
    "prediction": "objective.prediction",
    "architecture": "denoiser.architecture",
    "flips": "flips",
    "precision": "precision",
    "compile": "compile",
    "autoencoder": "pretrained_autoencoder",
    "seed": "seed",
    "init": "minimax.init",
    "full": "minimax.full",
    "lambda_r": "minimax.lambda_r",
    "lambda_d": "minimax.lambda_d",
    "memory_size": "minimax.memory_size",
    "epochs": "minimax.epochs",
    "class_map": "minimax.class_map",
}
_TRIED_SECONDS, _TRIALS = 0.1, 3  # of each network, to see whether a time is too short; the fastest trial counts
_TIME_MARGIN = 1.5  # of what is suggested instead, so that the next trial does not find it too short again
_FROM_START = ("prediction", "architecture", "autoencoder")  # what fine-tuning takes from the generator it starts from


def train_generator(
    dataset: str,
    *,
    preset: str | None = None,
    folder: Path | None = None,
    device: str = "auto",
    progress: Listener = ignore,
    **options: Any,
) -> Model:
    """Train a class-conditional generator on a dataset, or continue its training; returns the trained model.

    What `ddkit train` does. options: further arguments of `plan_training`, or settings by their names in SETTINGS, such
    as steps=2000 or batch_size=64. Raises UsageError for an unknown one, and what `plan_training`, `require_memory`,
    `require_time` and `train` raise.
    """
    _data, _settings, _preset, *others = inspect.signature(plan_training).parameters
    known = (*SETTINGS, *others)
    for name in options.keys() - known:
        raise UsageError(f"A training has no setting '{name}'.", did_you_mean(name, known))
    data = TrainingData.open(dataset, progress=progress)
    settings = {name: options.pop(name) for name in SETTINGS if name in options}
    request = plan_training(data, settings, preset_name=preset, folder=folder, device=device, **options)
    require_memory(data, request)
    require_time(data, request)
    return train(data, request, progress=progress)


def plan_training(
    data: TrainingData,
    settings: Mapping[str, Any],
    *,
    preset_name: str | None = None,
    method: str | None = None,
    folder: Path | None = None,
    runs: Path = Path("runs"),
    seconds: float | None = None,
    resume: bool = False,
    fresh: bool = False,
    track_every: int | None = None,
    features: str | None = None,
    device: str = "auto",
    save_every_seconds: float = 300.0,
    tensorboard: bool = False,
) -> TrainingRequest:
    """The training that these arguments ask for. A training that continues keeps every setting that is not given.

    settings: values by their names in SETTINGS; those of None are ignored, and min_snr = 0 gives all noise levels the
    same weight. method: one of METHODS; `settings["init"]`, the preset minimax-paper and a folder with a fine-tuning
    imply "minimax". folder: by default `runs`/<dataset>, or `runs`/<dataset>-minimax. resume: a training must be there.
    fresh: the training in the folder is to be removed. track_every, features: as in TrainingRequest.
    A new training on a GPU takes the largest of GPU_PRESETS that fits into its memory, and one on a device with
    instructions for bfloat16 computes in it. Raises UsageError for arguments that contradict each other or are unknown,
    MissingModelError when there is nothing to resume or to start fine-tuning from, and what `start_from` raises.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    _check_contradictions(given, seconds=seconds, resume=resume, fresh=fresh)
    own = runs / data.name
    tunes = method == "minimax" or preset_name == MINIMAX_PRESET or "init" in given
    folder = folder or (runs / f"{data.name}-minimax" if tunes else own)
    if resume and not has_training(folder):
        raise MissingModelError(f"There is no training in {folder} to resume.", "Leave out --resume to begin one.")
    before = None if fresh else read_run_record(folder)
    before_minimax = before.config.minimax if before else None
    tunes = tunes or before_minimax is not None
    _check_method(given, method, tunes)
    choices: tuple[str, ...] = ()
    if before and preset_name in (None, before.preset):
        name, config = before.preset, before.config
    else:
        name = preset_name or (MINIMAX_PRESET if tunes else "")
        name, config, choices = _new_config(name, data, device, chooses_precision="precision" not in given)
    if tunes and config.minimax is None:
        minimax = before_minimax or preset(MINIMAX_PRESET).config(data.image_size).minimax
        config = dataclasses.replace(config, minimax=minimax)
    if tunes and before_minimax is None and "init" not in given:
        if not has_model(own):
            raise MissingModelError(
                f"There is no generator of '{data.name}' to start from: {own} does not hold one.",
                f"Train one: ddkit train --dataset {data.name}. Or name one: --init FOLDER, or "
                f"--init {config.minimax.init if config.minimax else ''} for a pretrained one (gigabytes).",
            )
        given["init"] = str(own)
    changes = {SETTINGS.get(name, name): value for name, value in given.items()}
    if "ema_width" in given:
        changes["ema_decay"] = None
    if given.get("min_snr") == 0:
        changes[SETTINGS["min_snr"]] = None
    config = override(config, changes)
    start = None
    if config.minimax is not None:
        start = start_from(config.minimax, data.images.class_names)
        config = _completed(config, config.minimax, data, given, start, new=before is None)
    if settings.get("min_snr") is not None and config.objective.prediction == "flow":
        new = before is None and config.minimax is None
        remedy = "Leave it out, or add --prediction v or epsilon." if new else "Leave it out."
        raise UsageError("--min-snr has no effect with the prediction flow.", remedy)
    score = before.score if before else ""
    if track_every is None:
        track_every = before.track_every if before else preset(name).track_every
    if features not in (None, *SCORE_NAMES):
        raise UsageError(f"Unknown features '{features}'.", did_you_mean(str(features), tuple(SCORE_NAMES)))
    if features and not track_every:
        raise UsageError("--features needs --track-every.", "Give --track-every STEPS.")
    return TrainingRequest(
        config, folder, name, seconds, device, save_every_seconds, tensorboard, fresh, track_every,
        features=features or next((key for key, value in SCORE_NAMES.items() if value == score), "convnet"),
        start=start, choices=choices,
    )  # fmt: skip


def require_memory(data: TrainingData, request: TrainingRequest) -> None:
    """Raise ComputeError, saying what would fit, when a training needs more memory than the device has free."""
    _, problem = measure_costs(data, request, seconds=0)
    if problem is not None:
        raise problem


def require_time(data: TrainingData, request: TrainingRequest) -> None:
    """Raise UsageError, saying the least, when the time of a new training is too short for `Preset.least_steps`.

    Each network is tried for a moment. A training that continues may be of any length, and so may one by
    several processes, which could disagree.
    """
    least = preset(request.preset).least_steps if request.preset else 0
    continues = has_training(request.folder) and not request.fresh
    if request.seconds is None or request.start is not None or continues or processes() > 1 or not least:
        return
    device = resolve_device(request.device)
    needed = math.inf
    for _ in range(_TRIALS):
        costs = estimate(request.config, data.image_size, data.num_classes, device, seconds=_TRIED_SECONDS)
        needed = min(needed, costs.least_seconds(least))
        if request.seconds >= needed:
            return
    networks = " and ".join(f"the {stage.stage}" for stage in costs.stages)
    raise UsageError(
        f"{span_text(request.seconds)} of training is too short: preset {request.preset} needs at least {least} steps of "
        f"{networks}, which take about {span_text(needed)} on this machine.",
        f"Give --time {time_option(_TIME_MARGIN * needed)} or more.",
    )


def measure_costs(
    data: TrainingData, request: TrainingRequest, *, seconds: float = 1.0
) -> tuple[Estimate, ComputeError | None]:
    """The costs of a training, and the error that says what would fit if it does not fit. seconds: as `estimate` takes it."""
    subject = (request.config, data.image_size, data.num_classes, resolve_device(request.device))
    costs = estimate(*subject, processes=processes(), seconds=seconds, start=request.start)
    return costs, None if costs.fits else shortage(costs, *subject, processes=processes())


def _check_contradictions(given: Mapping[str, Any], *, seconds: float | None, resume: bool, fresh: bool) -> None:
    lengths = [f"--{name}" for name in ("steps", "epochs") if name in given] + (["--time"] if seconds is not None else [])
    if len(lengths) > 1:
        raise UsageError(f"{' and '.join(lengths)} contradict each other: each says how long to train.", "Give one of them.")
    if resume and fresh:
        raise UsageError("--resume and --fresh contradict each other.", "Give one of them.")
    if "ema_width" in given and "ema_decay" in given:
        raise UsageError("--ema-width and --ema-decay contradict each other.", "Give one of them.")


def _check_method(given: Mapping[str, Any], method: str | None, tunes: bool) -> None:
    """Raise UsageError for an unknown method, and when settings of one method are given with the other."""
    if method not in (None, *METHODS):
        raise UsageError(f"Unknown method '{method}'.", did_you_mean(str(method), METHODS))
    if method == "diffusion" and tunes:
        raise UsageError(
            "--method diffusion trains a new generator.",
            f"Leave out --init and --preset {MINIMAX_PRESET}, and choose a folder without a fine-tuning, or --fresh.",
        )
    for name in given:
        option = name.replace("_", "-")
        if tunes and name in _FROM_START:
            raise UsageError(f"--{option} cannot be changed when fine-tuning; it comes from --init.")
        if not tunes and SETTINGS.get(name, name).startswith("minimax."):
            raise UsageError(f"--{option} needs --method minimax.")


def preset_for(image_size: int, num_classes: int, device_name: str) -> tuple[str, str]:
    """The preset of a new training on that device, and a sentence that says why: on a GPU the largest of GPU_PRESETS that
    fits into its memory. Raises what `resolve_device` raises."""
    device = own_device(resolve_device(device_name))
    if device.type != "cuda":
        return DEFAULT_PRESET, f"Preset {DEFAULT_PRESET}: the default for training without a GPU."
    gpus, free, what = shared_gpus(device), free_memory(device), describe_device(device)
    if len(gpus) > 1:  # all processes must choose the same, and what is free changes while they start
        free = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
        what = f"the smallest of {len(gpus)} GPUs"
    for name in GPU_PRESETS:
        config = preset(name).config(image_size)
        # Measured on the CPU, because the kept tensors do not depend on the device.
        costs = estimate(config, image_size, num_classes, torch.device("cpu"), processes=processes(), seconds=0)
        if dataclasses.replace(costs, free_memory=free).fits:
            break
    memory = "memory" if len(gpus) > 1 else "free memory"
    needed = f"it needs about {costs.memory / 2**30:.1f} GiB"
    return name, f"Preset {name}: {what} has {free / 2**30:.1f} GiB of {memory}, and {needed}."


def _new_config(
    name: str, data: TrainingData, device_name: str, *, chooses_precision: bool
) -> tuple[str, GeneratorConfig, tuple[str, ...]]:
    """The configuration of a new training: the preset's name, its configuration on that device, and what was chosen and why.

    name: "" chooses a preset.
    """
    choices = []
    if not name:
        name, reason = preset_for(data.image_size, data.num_classes, device_name)
        choices.append(reason)
    config = preset(name).config(data.image_size)
    device = own_device(resolve_device(device_name))
    if chooses_precision and config.precision != (suitable := suitable_precision(config, device)):
        config = dataclasses.replace(config, precision=suitable)
        name_of_device = cpu_model() if device.type == "cpu" else describe_device(device)
        choices.append(f"Precision {suitable}: {name_of_device} computes it faster than float32.")
    return name, config, tuple(choices)


def suitable_precision(config: GeneratorConfig, device: torch.device) -> str:
    """bfloat16 if every device that shares the training has instructions for it, else the configuration's own precision."""
    devices = shared_gpus(device) if device.type == "cuda" else [device]
    return "bfloat16" if config.precision == "float32" and all(map(has_bfloat16, devices)) else config.precision


def _completed(
    config: GeneratorConfig, minimax: MinimaxConfig, data: TrainingData, given: Mapping[str, Any], start: Start, *, new: bool
) -> GeneratorConfig:
    """The configuration of a fine-tuning with what its start decides. new: the training has not begun yet."""
    changes: dict[str, Any] = {"objective.prediction": start.generator.prediction}
    if "steps" not in given and (new or "epochs" in given):
        batches = minimax.epochs * len(data.images) // config.denoiser_optimizer.batch_size
        changes["denoiser_optimizer.steps"] = max(1, batches)
    init = Path(minimax.init).expanduser()
    if new and "flips" not in given and has_model(init) and (before := read_run_record(init)):
        changes["flips"] = before.config.flips
    return override(config, changes)
