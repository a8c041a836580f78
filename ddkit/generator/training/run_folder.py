"""The folder of a training: which training it holds, and that nothing else in it is lost.

It is the model folder itself. Next to the model's parts it holds `config.json` (the training's settings),
`metrics.jsonl` (its records), `training.png` (their chart), `checkpoints/` and, if asked for, `tensorboard/`.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ddkit import __version__
from ddkit.errors import BadFileError, UsageError
from ddkit.generator.config import GeneratorConfig
from ddkit.runtime.files import LOCK_FILE, explain_os_error, read_json, write_json
from ddkit.runtime.records import differences, read_record

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CHART_FILE = "training.png"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
_MODEL_FILES = ("ddkit.json", "model_index.json")
_MODEL_PARTS = ("vae", "transformer")


@dataclass(frozen=True)
class RunRecord:
    """The record of a training in its folder: its dataset, its configuration and its score.

    dataset_sha256: hash of the prepared training split. preset: the name that the configuration came from, or "".
    track_every: steps between two scores of the model, 0 for never. score: the name of the score.
    """

    dataset: str
    dataset_sha256: str
    class_names: tuple[str, ...]
    image_size: int
    preset: str
    config: GeneratorConfig
    track_every: int = 0
    score: str = ""
    ddkit_version: str = __version__


def has_training(folder: Path) -> bool:
    """Return whether a training has begun in that folder."""
    return (folder / CONFIG_FILE).is_file()


def read_run_record(folder: Path) -> RunRecord | None:
    """The record of the training in that folder; None when there is none. Raises BadFileError when it cannot be read."""
    if not has_training(folder):
        return None
    path = folder / CONFIG_FILE
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        raise BadFileError(f"{path} was not written by a training of ddkit.", "Choose another folder with --out.")
    # Version 0.1.0 spelled them differently.
    config = {name.replace("optimiser", "optimizer"): item for name, item in value["config"].items()}
    try:
        return read_record(RunRecord, value | {"config": config})
    except BadFileError as error:
        raise BadFileError(
            f"{path} was written by another version of ddkit: {error.message}.", "Choose another folder with --out."
        ) from error


def write_run_record(folder: Path, record: RunRecord) -> None:
    """Record in its folder what a training is about to do.

    Raises UsageError when the folder holds another training (each difference is listed), or a model that was not
    trained there.
    """
    if (before := read_run_record(folder)) is not None:
        if lines := _differences(record, before):
            raise UsageError(
                f"{folder} holds a training with other settings: {'; '.join(lines)}.",
                "Use those settings, start over with --fresh, or choose another folder with --out.",
            )
        if before.dataset_sha256 != record.dataset_sha256:
            log.warning("'%s' was prepared again since the training in %s began; it continues on the new images.",
                        record.dataset, folder)  # fmt: skip
    elif found := [name for name in (*_MODEL_FILES, *_MODEL_PARTS) if (folder / name).exists()]:
        raise UsageError(
            f"{folder} holds a model that was not trained there ({found[0]}), which would be lost.",
            "Choose another folder with --out.",
        )
    write_json(folder / CONFIG_FILE, asdict(record))


def _differences(record: RunRecord, before: RunRecord) -> list[str]:
    if before.dataset != record.dataset:
        return [f"dataset: {before.dataset}, not {record.dataset}"]
    if before.class_names != record.class_names:
        return ["class_names: the dataset had other classes then"]
    if before.image_size != record.image_size:
        return [f"image_size: {before.image_size}, not {record.image_size}"]
    if (before.config.minimax is None) != (record.config.minimax is None):
        return [f"method: {'diffusion, not minimax' if before.config.minimax is None else 'minimax, not diffusion'}"]
    found = differences(asdict(_comparable(record.config)), asdict(_comparable(before.config)))
    if found and before.preset != record.preset:
        return [f"preset: {before.preset}, not {record.preset}", *found]
    return found


def _comparable(config: GeneratorConfig) -> GeneratorConfig:
    """The configuration without what may change when a training continues: its length, what suits the device (precision
    and compilation), and the remedies for a loss that diverges and for too little memory."""
    minimax = config.minimax
    # The minimax criteria compare within each part of a batch, so for them accumulation is another training.
    accumulation = 1 if minimax is None else config.denoiser_optimizer.accumulation
    if minimax is not None:
        folder = Path(minimax.init).expanduser()
        init = str(folder.resolve()) if folder.is_dir() else minimax.init  # one name, however the folder is written
        minimax = replace(minimax, init=init, epochs=1, lambda_r=0, lambda_d=0)
    return replace(
        config,
        minimax=minimax,
        autoencoder_optimizer=replace(config.autoencoder_optimizer, steps=1, accumulation=1),
        denoiser_optimizer=replace(config.denoiser_optimizer, steps=1, learning_rate=1.0, accumulation=accumulation),
        precision="float32",
        compile=False,
    )


def start_over(folder: Path) -> None:
    """Remove what a training left in `folder`: its state, its records and its model. Other files stay.

    Raises UsageError when the folder has files and does not hold a training of ours.
    """
    if not folder.is_dir() or not any(path.name != LOCK_FILE for path in folder.iterdir()):
        return
    if not has_training(folder):
        raise UsageError(f"{folder} does not hold a training, so nothing is removed from it.", "Choose another --out.")
    try:
        # The settings go last, so that after a kill halfway --fresh still recognizes the folder.
        for name in (CHECKPOINTS, TENSORBOARD, "scheduler", *_MODEL_PARTS):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (*_MODEL_FILES, CHART_FILE, METRICS_FILE, CONFIG_FILE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, folder) from error
