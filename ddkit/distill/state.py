"""The state of a refinement on disk, from which it resumes to the same bits.

A run folder holds state.pt, the validations as records.jsonl, and the original set (before.pt, .json, .png).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit.distill.settings import PoolSettings
from ddkit.errors import BadFileError, UsageError
from ddkit.runtime.files import atomic_write, sha256_of, write_text
from ddkit.runtime.records import differences
from ddkit.runtime.tensor_files import UnloadableError, load_restricted, save_torch
from ddkit.sets.distilled import KIND_REFINED, KIND_SUBMISSION, SetFiles, read_provenance, set_files

STATE_FILE = "state.pt"
RECORDS_FILE = "records.jsonl"
_VERSION = 9
_VERSION_0_1_0 = 8
_FRESH = "Start over with --fresh, or begin another refinement with --run."
_MAY_CHANGE = ("val_every", "val_margin")
_NAMES_SINCE_0_1_0 = {
    "means_first": "dm_steps",
    "ridge": "krr_lambda",
    "real_per_class": "batch_real",
    "average": "ema",
    "check_every": "val_every",
    "check_epochs": "val_epochs",
}


@dataclass(frozen=True)
class Validation:
    """The accuracy of a network trained on the set, on held-out training images.

    step: steps before it. seconds: of work before it. accuracy: fraction of the images.
    """

    step: int
    seconds: float
    accuracy: float


@dataclass
class RefinementState:
    """A refinement between two steps.

    settings: plain values, which have to stay the same. start_sha256: of the file of the original set.
    dataset_sha256: of the real training images. images, velocity (momentum of the pixels), average (moving average of
    the images) and best_images (the average that validated best, at best_step): (N, 3, S, S) float32 on the CPU.
    precision: in which steps and validations compute, "float32" or "bfloat16".
    pool_start: step from which the pool is used, None before.
    pool: what `OnlinePool.state` returned, empty before. student_lr: learning rate of the student of "mtt", None before.
    """

    folder: Path
    settings: Mapping[str, Any]
    start_sha256: str
    dataset_sha256: str
    images: Tensor
    velocity: Tensor
    average: Tensor
    best_images: Tensor
    best_step: int = 0
    precision: str = "float32"
    step: int = 0
    seconds: float = 0.0
    pool_start: int | None = None
    pool: Mapping[str, Tensor] = field(default_factory=dict)
    student_lr: float | None = None
    validations: list[Validation] = field(default_factory=list)

    @classmethod
    def begin(
        cls, path: Path, images: Tensor, folder: Path, settings: Mapping[str, Any], dataset_sha256: str
    ) -> RefinementState:
        """The state before the first step on the set at `path`, which is copied into the folder.

        Raises UsageError where the folder keeps another set, which would be lost.
        """
        before, sha256 = _before(folder), sha256_of(path)
        if before.exists() and sha256_of(before) != sha256:
            raise UsageError(
                f"{before} is the original set of a refinement whose {STATE_FILE} is gone.",
                f"Start over from it with --fresh. {_another(folder)}",
            )
        _copy_set(path, before)
        return cls(folder, settings, sha256, dataset_sha256, images, torch.zeros_like(images), images, images)

    @classmethod
    def read(cls, folder: Path) -> RefinementState:
        """The state in `folder`. Raises BadFileError where it cannot be used."""
        kept = _load(folder / STATE_FILE)
        settings = json.loads(kept.pop("settings"))
        validations = [Validation(**validation) for validation in kept.pop("validations")]
        return cls(folder, settings, validations=validations, **kept)

    def require(self, path: Path, settings: Mapping[str, Any], dataset_sha256: str) -> None:
        """Raise UsageError where this refines another set than the one at `path`, with other settings or real images.

        When to validate and which set to prefer may change, and are then those of `settings`.
        """
        if sha256_of(path) != self.start_sha256 and not self.made(path):
            raise UsageError(f"{self.folder} holds the refinement of a set other than {path}.", _another(self.folder))
        if changed := [line for line in differences(settings, self.settings) if not line.startswith(_MAY_CHANGE)]:
            raise UsageError(
                f"The refinement in {self.folder} was begun with other settings: {'; '.join(changed)}.",
                f"Omit those options to resume it, or start over with --fresh. {_another(self.folder)}",
            )
        if self.dataset_sha256 != dataset_sha256:
            raise UsageError(f"The real images have changed since the refinement in {self.folder} was begun.", _FRESH)
        self.settings = settings

    @property
    def before(self) -> SetFiles:
        """The original set."""
        return set_files(_before(self.folder))

    @property
    def first(self) -> Validation:
        return self.validations[0]

    @property
    def best(self) -> Validation:
        return next(validation for validation in self.validations if validation.step == self.best_step)

    @property
    def validated(self) -> bool:
        """True if the present images have been validated."""
        return bool(self.validations) and self.validations[-1].step == self.step

    def record(self, accuracy: float) -> None:
        """Record the validation of the present images.

        They are the best unless they are worse than the original set, or worse than the best by more than the margin.
        """
        self.validations.append(Validation(self.step, round(self.seconds, 1), accuracy))
        highest = max(validation.accuracy for validation in self.validations)
        if accuracy >= max(self.first.accuracy, highest - self.settings["val_margin"]):
            self.best_images, self.best_step = self.average, self.step

    def made(self, path: Path) -> bool:
        """True if the set at `path` is a result of this refinement, the present one or an earlier one."""
        return _is_result(path, self.start_sha256, self.settings, self.best_images)

    def gained_nothing(self) -> bool:
        """True if the best images are those of the original set."""
        before = self.before.tensor
        return self.best.step == 0 and before.is_file() and _holds(before, self.best_images)

    def give_back(self, to: Path) -> SetFiles:
        """Copy the original set to that path."""
        _copy_set(self.before.tensor, to)
        return set_files(to)

    def save(self) -> None:
        """Write the state and the validations into the folder. Raises BadFileError."""
        kept = {name: value for name, value in vars(self).items() if name != "folder"}
        validations = [asdict(validation) for validation in self.validations]
        kept |= {"version": _VERSION, "settings": json.dumps(self.settings), "validations": validations}
        save_torch(kept, self.folder / STATE_FILE)
        write_text(self.folder / RECORDS_FILE, "".join(f"{json.dumps(validation)}\n" for validation in validations))


def original_set(path: Path, folder: Path) -> Path:
    """The set that a refinement of the one at `path` in `folder` starts from, or has started from."""
    before = _before(folder)
    return before if before.is_file() else path


def start_over(path: Path, folder: Path, out: Path | None = None) -> None:
    """Discard the refinement in `folder` and restore the original set at `path`.

    out: where the refined set was written; `path` when None. The refined set there is kept in the folder as refined.pt,
    .json and .png, and so is a damaged file at `path`. Only files that a refinement wrote are removed from the folder.
    Raises UsageError if the set at `path` is neither the original nor a result of that refinement, because the only copy
    of the original would be lost, and what `require_no_loss` raises for `out`.
    """
    before = _before(folder)
    if before.exists():
        started_with, best = sha256_of(before), None
        settings: Mapping[str, Any] = {}
        with contextlib.suppress(BadFileError):
            state = RefinementState.read(folder)
            settings, best = state.settings, state.best_images
        for file in dict.fromkeys((path, out or path)):
            if file.is_file() and sha256_of(file) != started_with:
                if _is_result(file, started_with, settings, best) or (file == path and _loaded(file) is None):
                    _copy_set(file, _given_up(folder))
                elif file == path:
                    raise UsageError(
                        f"{folder} holds the refinement of a set other than {path}, and its only copy, {before.name}.",
                        _another(folder),
                    )
                elif not is_kept_copy(file, folder):
                    require_no_loss(file)
        _copy_set(before, path)  # also where a kill halfway has given back the tensor but not its JSON and sheet
    for file in (folder / STATE_FILE, folder / RECORDS_FILE, *vars(set_files(before)).values()):
        file.unlink(missing_ok=True)


def is_kept_copy(path: Path, folder: Path) -> bool:
    """True if the folder keeps the set at `path` as one that --fresh replaced."""
    kept = _given_up(folder)
    return kept.is_file() and sha256_of(kept) == sha256_of(path)


def require_no_loss(path: Path) -> None:
    """Raise UsageError where a set at `path` cannot be made again: another refinement's result, or one not made by ddkit."""
    kind = read_provenance(path).get("kind", KIND_SUBMISSION)
    if kind in (KIND_REFINED, KIND_SUBMISSION):
        what = "the result of another refinement" if kind == KIND_REFINED else "a set that ddkit did not make"
        raise UsageError(f"{path} holds {what}, which would be lost.", "Name another file with --out, or delete it.")


def refuse_kept_copy(folder: Path, *paths: Path) -> None:
    """Raise UsageError where a path is one of the copies that the folder keeps."""
    kept = {_before(folder).resolve(): "the original set", _given_up(folder).resolve(): "a set that --fresh replaced"}
    for path in paths:
        if whose := kept.get(path.resolve()):
            raise UsageError(
                f"{path} is the copy of {whose} that {folder} keeps.",
                "Name the set itself, with --fresh to start over from its original, or copy that file elsewhere first.",
            )


def _before(folder: Path) -> Path:
    return folder / "before.pt"


def _given_up(folder: Path) -> Path:
    return folder / "refined.pt"


def _is_result(path: Path, start_sha256: str, settings: Mapping[str, Any], best_images: Tensor | None) -> bool:
    """True if a refinement from that start with these settings wrote the set, or if it holds these images."""
    provenance = read_provenance(path)
    if provenance.get("refined_from") == start_sha256 and (
        "pool" not in provenance  # ddkit 0.1.0, whose settings had other names
        or all(provenance.get(name) == value for name, value in settings.items() if name not in _MAY_CHANGE)
    ):
        return True
    # After a kill between the tensor and its JSON, the JSON does not belong to the tensor.
    return best_images is not None and _holds(path, best_images)


def _holds(path: Path, images: Tensor) -> bool:
    held = _loaded(path)
    return isinstance(held, Tensor) and held.shape == images.shape and torch.equal(held, images)


def _loaded(path: Path) -> Any:
    """What a file of torch.save holds; None if it is damaged."""
    with contextlib.suppress(UnloadableError):
        return load_restricted(path)
    return None


def _copy_set(path: Path, to: Path) -> None:
    """Copy the three files of a set to another name, replacing those that are there."""
    for source, target in zip(vars(set_files(path)).values(), vars(set_files(to)).values(), strict=True):
        if source.exists():
            with atomic_write(target) as temporary:
                shutil.copyfile(source, temporary)
        else:
            target.unlink(missing_ok=True)


def _load(path: Path) -> dict[str, Any]:
    try:
        kept = load_restricted(path)
    except (UnloadableError, OSError) as error:
        raise BadFileError(f"{path} is damaged or is not the state of a refinement.", _FRESH) from error
    version = kept.pop("version", None) if isinstance(kept, dict) else None
    if version == _VERSION_0_1_0:
        return _from_0_1_0(kept, path)
    if version != _VERSION:
        raise BadFileError(f"{path} was written by another version of ddkit.", _FRESH)
    kept.pop("validation_precision", None)  # of states from before it was always that of the steps
    return kept


def _from_0_1_0(kept: dict[str, Any], path: Path) -> dict[str, Any]:
    """The state of a refinement that ddkit 0.1.0 began, which resumes with its settings: float32 and no pool."""
    recorded = json.loads(kept.pop("settings"))
    if gone := [name for name in ("trained_share", "attention", "recognition") if recorded.pop(name)]:
        raise BadFileError(f"{path} was begun by ddkit 0.1.0 with {', '.join(gone)}, which have been removed.", _FRESH)
    settings = {_NAMES_SINCE_0_1_0.get(name, name): value for name, value in recorded.items()}
    settings["objective"] = {"means": "dm", "regression": "frepo", "trajectories": "mtt"}[settings["objective"]]
    settings["student"]["lr_momentum"] = settings["student"].pop("rate_share")
    settings["pool"] = asdict(PoolSettings(size=0))
    settings |= {"final_rate": 1.0, "precision": "float32", "val_margin": 0.0}
    kept["student_lr"] = kept.pop("student_rate")
    kept["validations"] = kept.pop("judgements")
    best = max(kept["validations"], key=lambda each: (each["accuracy"], each["step"]), default={"step": 0})
    kept["best_step"] = best["step"]
    return kept | {"settings": json.dumps(settings)}


def _another(folder: Path) -> str:
    return f"To keep both, name another folder, such as --run {folder}-2."
