"""Distilled sets: one value that holds a set, and the three files in which a set is kept.

The tensor `<dataset>.pt` is the challenge's file. `<dataset>.json` next to it holds the provenance, which is how the set
was made, and `<dataset>.png` is the contact sheet.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.data.images import denormalize, to_uint8
from ddkit.data.store import class_titles, dataset_spec, known_names
from ddkit.errors import BadFileError, InvalidSubmissionError, MissingDataError, UsageError
from ddkit.runtime.files import read_json, sha256_of, why_not_a_file, write_json
from ddkit.runtime.html import data_uri
from ddkit.runtime.tensor_files import save_torch
from ddkit.sets.contact_sheet import contact_sheet, save_png
from ddkit.sets.findings import Finding
from ddkit.sets.reading import read_tensor

_log = logging.getLogger(__name__)

# In a notebook, whose file holds what it shows.
_MOST_CLASSES_SHOWN = 20
_MOST_OF_A_CLASS_SHOWN = 5

# How the provenance names what made a set: its key "kind".
KIND_GENERATED = "generated"  # sampled from a generator
KIND_REFINED = "refined"  # the pixels of another set were optimized
KIND_RANDOM_REAL = "random-real"  # real training images, drawn at random
KIND_FIRST_REAL = "first-real"  # the first real training images of each class
KIND_FULL_REAL = "full-real"  # all real training images
KIND_SUBMISSION = "submission"  # any other set; its maker is not known
# Real images, with which the results of other sets are compared.
BASELINE_KINDS = (KIND_RANDOM_REAL, KIND_FIRST_REAL, KIND_FULL_REAL)


@dataclass(frozen=True)
class DistilledSet:
    """A distilled set, read and hashed once and handed on whole.

    images: (C * ipc, 3, S, S) float32, normalized, contiguous; the rows are in the order of `class_labels`.
    sha256: hexadecimal, of the file's bytes; "" for a set that is not on the disk.
    provenance: the JSON next to the tensor; {} if there is none that belongs to it.
    warnings: what the check of the file itself warns of, without a look at the numbers.
    """

    images: Tensor = field(repr=False)
    spec: DatasetSpec
    sha256: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    path: Path | None = None
    warnings: tuple[Finding, ...] = ()

    @property
    def ipc(self) -> int:
        """Images per class."""
        return len(self.images) // self.spec.num_classes

    @property
    def labels(self) -> Tensor:
        """(C * ipc,) int64, the labels that the scorer implies."""
        return class_labels(self.spec.num_classes, self.ipc)

    @property
    def kind(self) -> str:
        """The kind that the provenance names; KIND_SUBMISSION if it names none."""
        return str(self.provenance.get("kind", KIND_SUBMISSION))

    def _repr_html_(self) -> str:
        """What a notebook shows: the contact sheet of the first images of the first classes."""
        size, classes = self.spec.image_size, self.spec.num_classes
        most, each = min(classes, _MOST_CLASSES_SHOWN), min(self.ipc, _MOST_OF_A_CLASS_SHOWN)
        rows = slice(most * self.ipc)
        pictures = to_uint8(denormalize(self.images[rows], self.spec))
        sheet = contact_sheet(pictures, self.labels[rows], class_titles(self.spec.name), per_class=each)
        text = (
            f"{self.kind} set for {self.spec.name}: {len(self.images):,} images of {size} × {size} pixels, {self.ipc} for each "
            f"of {classes} classes. Shown: the first {each} of the first {most} classes."
        )
        return f'<p>{escape(text)}</p><img src="{data_uri(sheet)}" alt="contact sheet">'


@dataclass(frozen=True)
class SetFiles:
    """The three files of a set: the challenge's tensor, the JSON of its provenance, and the contact sheet."""

    tensor: Path
    provenance: Path
    sheet: Path


def set_files(path: str | os.PathLike[str]) -> SetFiles:
    """The three files of the set whose tensor is, or will be, at `path`. A link is followed to the set's own folder."""
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    return SetFiles(path, path.with_suffix(".json"), path.with_suffix(".png"))


def class_labels(num_classes: int, ipc: int) -> Tensor:
    """The labels that the scorer implies, on the CPU: (num_classes * ipc,) int64, ipc rows of class 0, of 1, and so on."""
    return torch.arange(num_classes, device="cpu").repeat_interleave(ipc)


def read_set(path: str | os.PathLike[str], dataset: str | None = None, *, ipc: int | None = None) -> DistilledSet:
    """Read a distilled set without executing anything in it.

    dataset: None takes it from the provenance, else from the file's name (see `dataset_of`). ipc: the images per class
    that there must be; None accepts any whole number.
    Raises what `dataset_of` raises, and InvalidSubmissionError with the first error that `ddkit check` would find.
    """
    path = Path(path)
    _require_tensor_file(path, dataset)
    sha256 = sha256_of(path)
    provenance = read_provenance(path, sha256)
    spec = dataset_spec(_dataset_name(path, dataset, provenance))
    if (made_for := provenance.get("dataset", spec.name)) != spec.name:
        _log.warning("%s was made for %s, as the JSON next to it says, and is read as a set for %s.", path, made_for, spec.name)
    images, findings = read_tensor(path, spec, ipc=ipc)
    if images is None:
        first = next(finding for finding in findings if finding.level == "error")
        raise InvalidSubmissionError(f"{path}: {first.message}", f"To see everything: {check_command(path, spec.name)}")
    return DistilledSet(images.contiguous(), spec, sha256, provenance, path, tuple(findings))


def dataset_of(path: str | os.PathLike[str], dataset: str | None = None) -> str:
    """The name of the dataset that a set is for: `dataset` if given, else as its provenance or its file's name says.

    Raises MissingDataError for a missing file; UsageError for a folder, a zip, and a name that tells no dataset.
    """
    path = Path(path)
    _require_tensor_file(path, dataset)
    return _dataset_name(path, dataset, {} if dataset else read_provenance(path))


def likely_dataset(file_name: str) -> str:
    """The known dataset that a tensor's file was probably meant for, such as "cifar100" for `CIFAR-100 (1).pth`; or ""."""
    plain = re.sub(r"[^a-z0-9]", "", Path(file_name.lower()).stem)
    by_plain_name = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in known_names()}
    within = sorted((name for name in by_plain_name if name in plain), key=len)  # the whole name, if it is one, comes last
    likely = within[-1:] or difflib.get_close_matches(plain, by_plain_name, n=1, cutoff=0.75)
    return by_plain_name[likely[0]] if likely else ""


def require_nothing_else(path: str | os.PathLike[str]) -> None:
    """Raise UsageError where the set at `path`, which is not there yet, would overwrite a JSON or a picture of something else.

    What ddkit wrote is known by the JSON's "sha256", also where the tensor was removed.
    """
    files = set_files(path)
    try:
        found = read_json(files.provenance) if files.provenance.exists() else None
    except BadFileError:
        found = None
    if files.tensor.exists() or (isinstance(found, dict) and "sha256" in found):
        return
    for other in (files.provenance, files.sheet):
        if other.exists():
            raise UsageError(
                f"{other} does not belong to a set that ddkit made, and would be lost.",
                "Name another file with --out, or move that one away.",
            )


def save_set(
    path: str | os.PathLike[str],
    images: Tensor,
    spec: DatasetSpec,
    provenance: Mapping[str, Any],
) -> SetFiles:
    """Write a distilled set: the bare tensor, its provenance as JSON, and its contact sheet.

    images: (num_classes * ipc, 3, S, S) float, normalized, rows in the order of `class_labels`.
    provenance: how the set was made. The JSON holds it with the tensor's SHA-256, so that an old JSON next to a new
    tensor, after a kill between the two writes, is recognized.
    Raises InvalidSubmissionError for another shape, BadFileError where the system refuses to write.
    """
    if images.ndim != 4 or images.shape[1:] != spec.image_shape or len(images) % spec.num_classes or not len(images):
        raise InvalidSubmissionError(
            f"Images of shape {tuple(images.shape)} are not a set for {spec.name}. "
            f"It takes (rows, 3, {spec.image_size}, {spec.image_size}), with the same number of rows for each class."
        )
    files = set_files(path)
    # A tensor saved as a view would take its whole storage along.
    whole = images.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
    save_torch(whole, files.tensor)
    written = dict(provenance) | {
        "dataset": spec.name,
        "images_per_class": len(images) // spec.num_classes,
        "class_names": list(class_titles(spec.name)),
        "sha256": sha256_of(files.tensor),
    }
    write_json(files.provenance, written)
    draw_sheet(whole, spec, files.sheet)
    return files


def draw_sheet(images: Tensor, spec: DatasetSpec, path: Path) -> None:
    """Write the contact sheet of a set, whose images are as `save_set` takes them. Raises BadFileError."""
    labels = class_labels(spec.num_classes, len(images) // spec.num_classes)
    save_png(contact_sheet(to_uint8(denormalize(images, spec)), labels, class_titles(spec.name)), path)


def check_command(path: str | os.PathLike[str], dataset: str) -> str:
    """The command that shows everything that is wrong with a set."""
    option = "" if Path(path).stem == dataset else f" --dataset {dataset}"
    return f"ddkit check {shlex.quote(str(path))}{option}"


def generate_command(dataset: str = "cifar100") -> str:
    """A command that makes a set, and needs no generator for it."""
    return f"ddkit generate --from-real random --dataset {dataset}"


def read_provenance(path: str | os.PathLike[str], sha256: str | None = None) -> dict[str, Any]:
    """The provenance of the set at `path`, from the JSON next to its tensor; {} if there is none that belongs to it.

    sha256: of the tensor's file; None hashes it.
    """
    files = set_files(path)
    if not (files.provenance.exists() and files.tensor.exists()):
        return {}
    try:
        provenance = read_json(files.provenance)
    except BadFileError as error:
        _log.warning("%s", error)
        return {}
    if not isinstance(provenance, dict) or provenance.get("sha256") != (sha256 or sha256_of(files.tensor)):
        _log.warning("%s does not belong to the present %s and is ignored.", files.provenance, files.tensor.name)
        return {}
    return provenance


def _require_tensor_file(path: Path, dataset: str | None) -> None:
    if not path.exists():
        name = dataset or (path.stem if path.stem in known_names() else "NAME")
        raise MissingDataError(
            f"{path} does not exist.",
            f"Check the path, or make a set: {generate_command(name)} --out {shlex.quote(str(path.with_suffix('.pt')))}",
        )
    if problem := why_not_a_file(path):
        raise UsageError(f"{path} {problem}.", "Name a .pt file." if not path.is_dir() else "Name the .pt files in it.")
    if path.suffix == ".zip":
        raise UsageError(
            f"{path} is a zip, not a tensor.", "Name a .pt file; a track 2 bundle is evaluated with ddkit evaluate --track 2."
        )


def _dataset_name(path: Path, dataset: str | None, provenance: Mapping[str, Any]) -> str:
    name = dataset or provenance.get("dataset")
    if name is None and path.stem not in known_names():
        likely = likely_dataset(path.name)
        remedy = f"If it is for {likely}, rename it to {likely}.pt" if likely else "Rename it to NAME.pt"
        remedy += f", or add --dataset {likely or 'NAME'} if the command has it."
        raise UsageError(f"{path} is not named after a known dataset.", remedy)
    return str(name or path.stem)
