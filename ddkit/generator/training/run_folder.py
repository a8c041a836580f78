"""The folder of a training: which one it holds, that nothing else is lost there, and that nobody else trains in it.

It is the model folder itself; beside the model's parts lie `config.json` (the settings the training goes by),
`metrics.jsonl` (its records), `training.png` (a chart of them), `checkpoints/` and, where asked for, `tensorboard/`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddkit import __version__
from ddkit.errors import BadFileError, UsageError
from ddkit.generator.model_folder import FACTS_FILE, INDEX_FILE
from ddkit.generator.presets import GeneratorConfig, differences, from_json, to_json
from ddkit.runtime.files import LOCK_FILE, explain_os_error, read_json, write_json

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CHART_FILE = "training.png"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
_OF_MODELS = (FACTS_FILE, INDEX_FILE, "vae", "transformer", "unet")


@dataclass(frozen=True)
class Begun:
    """What a training is of. dataset_sha256: of the prepared training split. preset: the configuration's name.

    track_every, score: steps between two scores of the model, 0 for none, and the score's name.
    """

    dataset: str
    dataset_sha256: str
    class_names: tuple[str, ...]
    image_size: int
    preset: str
    config: GeneratorConfig
    track_every: int = 0
    score: str = ""


@dataclass(frozen=True)
class Recorded:
    """What a training goes by. preset: the name of what the configuration came from. Others as in `Begun`.

    track_every: None where the record is of an earlier version, which did not say.
    """

    preset: str
    config: GeneratorConfig
    track_every: int | None
    score: str


def has_training(folder: Path) -> bool:
    """Whether a training was begun in that folder."""
    return (folder / CONFIG_FILE).is_file()


def recorded(folder: Path) -> Recorded | None:
    """What the training in that folder goes by; None where there is none. Raises BadFileError where it cannot be read."""
    if not has_training(folder):
        return None
    record = _record_of(folder)
    return Recorded(record.get("preset", ""), from_json(record["config"]), record.get("track_every"), record.get("score", ""))


def _record_of(folder: Path) -> Mapping[str, Any]:
    """What a training has written of itself. Raises BadFileError where it is something else."""
    value = read_json(folder / CONFIG_FILE)
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        raise BadFileError(f"{folder / CONFIG_FILE} is not of a training of ddkit's.", "Choose another folder with --out.")
    return value


def claim(folder: Path, begun: Begun) -> None:
    """Record in its folder what a training is of.

    Raises UsageError where the folder holds a training of something else (each difference is listed), or a model that
    was not trained there.
    """
    if has_training(folder):
        record = _record_of(folder)
        if lines := _differences(begun, record):
            raise UsageError(
                f"{folder} holds a training with other settings: {'; '.join(lines)}.",
                "Give those, start over with --fresh, or choose another folder with --out.",
            )
        if record.get("dataset_sha256") != begun.dataset_sha256:
            log.warning("'%s' was prepared anew since the training in %s began; it goes on with the new images.",
                        begun.dataset, folder)  # fmt: skip
    elif found := [name for name in _OF_MODELS if (folder / name).exists()]:
        raise UsageError(
            f"{folder} holds a model that was not trained there ({found[0]}); it would be lost.",
            "Choose another folder with --out.",
        )
    values = {**vars(begun), "config": to_json(begun.config)}
    write_json(folder / CONFIG_FILE, {"ddkit_version": __version__, **values})


def _differences(begun: Begun, record: Mapping[str, Any]) -> list[str]:
    if record.get("dataset") != begun.dataset:
        return [f"dataset: {record.get('dataset')}, not {begun.dataset}"]
    if record.get("class_names") != list(begun.class_names):
        return ["class_names: the dataset had other classes then"]
    if record.get("image_size") != begun.image_size:
        return [f"image_size: {record.get('image_size')}, not {begun.image_size}"]
    found = differences(_comparable(begun.config), _comparable(from_json(record["config"])))
    if found and record.get("preset") != begun.preset:
        return [f"preset: {record.get('preset')}, not {begun.preset}", *found]
    return found


def _comparable(config: GeneratorConfig) -> GeneratorConfig:
    """The configuration with what may differ when a training goes on set equal: its lengths, compilation, what helps
    against a loss that diverges, and what helps where memory is short."""
    minimax = config.minimax
    # The criteria of minimax diffusion are of a part of the batch each, so there accumulation is another training.
    accumulation = 1 if minimax is None else config.denoiser_optimizer.accumulation
    return replace(
        config,
        minimax=None if minimax is None else replace(minimax, init=_place(minimax.init), epochs=1, lambda_r=0, lambda_d=0),
        autoencoder_optimizer=replace(config.autoencoder_optimizer, steps=1, accumulation=1),
        denoiser_optimizer=replace(config.denoiser_optimizer, steps=1, learning_rate=1.0, accumulation=accumulation),
        compile=False,
    )


def _place(source: str) -> str:
    """A folder under one name, however it is written; a hub id as it is."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if folder.is_dir() else source


def start_over(folder: Path) -> None:
    """Remove what a training left in `folder`: its state, its records and its model. Other files stay.

    Raises UsageError where a folder that is there holds no training of ours.
    """
    if not folder.is_dir() or not any(path.name != LOCK_FILE for path in folder.iterdir()):
        return
    if not (folder / CONFIG_FILE).is_file():
        raise UsageError(f"{folder} holds no training, so nothing is removed from it.", "Choose another --out.")
    try:
        # The settings go last: a kill halfway leaves a folder that --fresh still knows for its own.
        for name in (CHECKPOINTS, TENSORBOARD, "vae", "transformer", "unet", "scheduler"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("ddkit.json", "model_index.json", CHART_FILE, METRICS_FILE, CONFIG_FILE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, folder) from error
