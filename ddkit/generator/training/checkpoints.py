"""Training state on disk: one file a checkpoint, written atomically, the oldest removed."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddkit.errors import BadFileError
from ddkit.runtime.tensor_files import UnloadableError, load_restricted, save_torch

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
_KEPT = 2  # checkpoints of a stage


@dataclass(frozen=True)
class Checkpoint:
    """The state of a stage after `step` steps.

    seconds: time spent on them over all runs.
    network, ema, optimizer, memory, scaler: state dictionaries of tensors and plain values; memory belongs to what the
    stage's loss keeps from step to step, and scaler to the loss scale of float16.
    """

    step: int
    seconds: float
    network: dict[str, Any]
    ema: dict[str, Any]
    optimizer: dict[str, Any]
    memory: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, stage: str, checkpoint: Checkpoint) -> Path:
    """Write `<folder>/<stage>-<step>.pt` and remove all but the newest two of that stage."""
    path = folder / f"{stage}-{checkpoint.step:08d}.pt"
    save_torch({"format": FORMAT_VERSION, **vars(checkpoint)}, path)
    for old in list_checkpoints(folder, stage)[:-_KEPT]:
        old.unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path, stage: str) -> list[Path]:
    """The checkpoints of a stage, oldest first."""
    found = folder.glob(f"{stage}-*.pt")
    return sorted(path for path in found if re.fullmatch(rf"{re.escape(stage)}-\d{{8,}}\.pt", path.name))


def load_latest(folder: Path, stage: str) -> Checkpoint | None:
    """The newest checkpoint of a stage that can be read, or None when there is none at all.

    A damaged newest file is skipped, with a warning. Raises BadFileError when there are files and none can be read.
    """
    problems: list[BadFileError] = []
    for path in reversed(list_checkpoints(folder, stage)):
        try:
            checkpoint = load_checkpoint(path)
        except BadFileError as error:
            problems.append(error)
        else:
            for problem in problems:
                log.warning("%s Continuing from the checkpoint before it.", problem.message)
            return checkpoint
    if problems:
        raise problems[0]
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint; nothing in it is executed. Raises BadFileError when it is damaged or has another format."""
    remedy = "Start over with --fresh."
    try:
        value = load_restricted(path)
    except (OSError, UnloadableError) as error:
        raise BadFileError(f"{path} is damaged or not a checkpoint.", remedy) from error
    if not isinstance(value, dict) or value.pop("format", None) != FORMAT_VERSION:
        raise BadFileError(f"{path} is not a checkpoint of this version of ddkit.", remedy)
    value.pop("finished", None)  # of earlier versions
    try:
        # Version 0.1.0 spelled it differently.
        return Checkpoint(**{name.replace("optimiser", "optimizer"): item for name, item in value.items()})
    except TypeError as error:
        raise BadFileError(f"{path} is not complete: {error}.", remedy) from error
