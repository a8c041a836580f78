"""The challenge's files: their names, the order of their rows, and how ddkit writes and reads them."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.data.images import denormalize, to_uint8
from ddkit.errors import BadFileError, InvalidSubmissionError, UsageError
from ddkit.runtime.files import read_json, sha256_of, write_json
from ddkit.runtime.tensor_files import save_torch
from ddkit.sets.contact_sheet import contact_sheet, save_png
from ddkit.sets.reading import read_tensor

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedSet:
    """The three files of a distilled set: the challenge's tensor, how it was made, and how it looks."""

    tensor: Path
    facts: Path
    sheet: Path


def tensor_path(folder: str | os.PathLike[str], dataset_name: str) -> Path:
    """Where a dataset's tensor lies in a submission folder."""
    return Path(folder) / f"{dataset_name}.pt"


def set_files(path: str | os.PathLike[str]) -> SavedSet:
    """The three files of the set whose tensor is, or will be, at `path`; of a link, those of the set that it leads to."""
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    return SavedSet(path, path.with_suffix(".json"), path.with_suffix(".png"))


def row_labels(num_classes: int, ipc: int) -> Tensor:
    """The labels that the scorer implies: (num_classes * ipc,) int64, ipc rows of class 0, then of class 1, and so on."""
    return torch.arange(num_classes).repeat_interleave(ipc)


def require_tensor_name(path: Path) -> None:
    """Raises UsageError for a set's file that does not end in .pt: its JSON and sheet lie beside it, by other endings."""
    if path.suffix != ".pt":
        raise UsageError(f"{path} does not end in .pt.", "Name the tensor's file, such as submission/cifar100.pt.")


def save_set(
    path: str | os.PathLike[str],
    images: Tensor,
    spec: DatasetSpec,
    class_names: Sequence[str],
    made_by: Mapping[str, Any],
    *,
    titles: Sequence[str] | None = None,
) -> SavedSet:
    """Write a distilled set: the bare tensor, its JSON and its contact sheet.

    images: (num_classes * ipc, 3, S, S) float, normalized, rows in the order of `row_labels`.
    made_by: how the set was made; the JSON holds it with the tensor's SHA-256, so that an old JSON beside a
    new tensor, after a kill between the two, is recognized. titles: class names for people, on the sheet.
    Raises InvalidSubmissionError for another shape, BadFileError for what the system refuses.
    """
    if images.ndim != 4 or images.shape[1:] != spec.image_shape or len(images) % spec.num_classes or not len(images):
        raise InvalidSubmissionError(
            f"{tuple(images.shape)} is no set for {spec.name}: "
            f"it takes (rows, 3, {spec.image_size}, {spec.image_size}), the same number of rows for each class."
        )
    files = set_files(path)
    ipc = len(images) // spec.num_classes
    # A tensor saved as a view would drag its whole storage along.
    own = images.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
    save_torch(own, files.tensor)
    facts = dict(made_by) | {
        "dataset": spec.name,
        "images_per_class": ipc,
        "class_names": list(titles or class_names),
        "sha256": sha256_of(files.tensor),
    }
    write_json(files.facts, facts)
    draw_sheet(own, spec, titles or class_names, files.sheet)
    return files


def draw_sheet(images: Tensor, spec: DatasetSpec, titles: Sequence[str], path: Path) -> None:
    """Write the contact sheet of a set: images as `save_set` takes them. Raises BadFileError for what the system refuses."""
    labels = row_labels(spec.num_classes, len(images) // spec.num_classes)
    save_png(contact_sheet(to_uint8(denormalize(images, spec)), labels, titles), path)


def read_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """How the set at `path` was made, from the JSON beside its tensor; empty where there is none that belongs to it."""
    files = set_files(path)
    if not files.facts.exists():
        return {}
    try:
        facts = read_json(files.facts)
    except BadFileError as error:
        _log.warning("%s", error)
        return {}
    if not isinstance(facts, dict) or facts.get("sha256") != sha256_of(files.tensor):
        _log.warning("%s does not belong to the present %s and is left aside.", files.facts, files.tensor.name)
        return {}
    return facts


def check_command(path: str | os.PathLike[str], dataset: str) -> str:
    """What to type to see all that is wrong with a set."""
    named = "" if Path(path).stem == dataset else f" --dataset {dataset}"
    return f"ddkit check {shlex.quote(str(path))}{named}"


def load_tensor(path: str | os.PathLike[str], spec: DatasetSpec, *, ipc: int | None = None) -> Tensor:
    """Read a distilled set without executing anything in it.

    Returns (N, 3, S, S) float32, contiguous. ipc: images per class there must be; None for any whole number.
    Raises InvalidSubmissionError with the first thing that `check` would find wrong.
    """
    tensor, findings = read_tensor(path, spec, ipc=ipc)
    if tensor is None:
        first = next(finding for finding in findings if finding.level == "error")
        raise InvalidSubmissionError(f"{path}: {first.message}", f"See: {check_command(path, spec.name)}")
    return tensor.detach().contiguous()
