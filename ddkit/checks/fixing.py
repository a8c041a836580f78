"""Putting rows into the order that their labels imply."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ddkit.checks.order import detected_rows
from ddkit.data.store import dataset_spec
from ddkit.errors import InvalidSubmissionError, UsageError
from ddkit.runtime.tensor_files import save_torch
from ddkit.sets.distilled import load_tensor


@dataclass(frozen=True)
class FixedOrder:
    """A rearranged tensor. moved_rows: how many rows stand elsewhere than before."""

    path: Path
    moved_rows: int


def fix_row_order(path: str | os.PathLike[str], out: str | os.PathLike[str], *, dataset: str | None = None) -> FixedOrder:
    """Write the tensor at `path` to `out` with its rows where the real images say they belong.

    dataset: None takes it from the file's name. Raises UsageError where `out` is `path` itself or `path` is no tensor,
    MissingDataError where the real images are not prepared, InvalidSubmissionError where the tensor cannot be used or its order
    cannot be told.
    """
    path, out = Path(path), Path(out)
    if path.is_dir() or path.suffix.lower() == ".zip":
        raise UsageError(
            f"The rows of one tensor at a time are put in order, and {path} is none.",
            "Name the tensor: ddkit check submission/cifar100.pt --fix-order OUT",
        )
    if out.exists() and out.samefile(path):
        raise UsageError("The rearranged tensor would replace the original.", "Name another file for it.")
    spec = dataset_spec(dataset or path.stem)
    images = load_tensor(path, spec)
    rows = detected_rows(images, spec)
    if rows is None:
        raise InvalidSubmissionError(
            f"{path}: the images do not tell which order is right, so nothing was written.",
            "Look at them: the contact sheet beside the tensor shows one row a class.",
        )
    save_torch(images[rows], out)
    return FixedOrder(out, int((rows != torch.arange(len(rows))).sum()))
