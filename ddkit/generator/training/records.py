"""The records of a training, one JSON object a line: what happened up to a step, and scores."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddkit.errors import UsageError
from ddkit.generator.training.run_folder import METRICS_FILE, TENSORBOARD
from ddkit.runtime.jsonl import append_line, read_lines


@dataclass(frozen=True)
class Score:
    """What Tracking found after `step` steps of the denoiser."""

    step: int
    name: str
    value: float
    stage: str = "score"


class MetricsLog:
    """Records as JSON lines, and for TensorBoard where that is asked for."""

    def __init__(self, folder: Path, *, tensorboard: bool) -> None:
        self._path = folder / METRICS_FILE
        self._writer = require_tensorboard()(folder / TENSORBOARD) if tensorboard else None

    def records(self) -> list[dict[str, Any]]:
        """What is written so far, as `read_records` has it."""
        return read_records(self._path)

    def write(self, record: Any) -> None:
        """Append one dataclass; raises BadFileError for what the system refuses."""
        values = dataclasses.asdict(record)
        values |= values.pop("figures", {})
        append_line(self._path, values, sync=False)  # a record is not worth waiting for the disk
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{values['stage']}/{name}", value, values["step"])

    def close(self) -> None:
        """See to it that TensorBoard's file is written to its end."""
        if self._writer is not None:
            self._writer.close()


def require_tensorboard() -> Any:
    """Its writer's class. Raises UsageError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("TensorBoard is not installed.", "Install it: pip install 'ddkit[tensorboard]'") from error
    return SummaryWriter


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics log, the last one of each stage, step and score's name; none where there is no log yet.

    A torn line is left out. Raises BadFileError.
    """
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for _, record in read_lines(path):
        found[record["stage"], record["step"], record.get("name", "")] = record
    return sorted(found.values(), key=lambda record: record["step"])
