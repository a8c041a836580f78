"""What a refinement has reached, on disk: enough to go on as if it had not been interrupted.

A run folder holds state.pt, the judgements as records.jsonl, and the set as it was before (before.pt, .json, .png).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit.errors import BadFileError, UsageError
from ddkit.runtime.files import atomic_write, sha256_of, write_text
from ddkit.runtime.tensor_files import UnloadableError, load_restricted, save_torch
from ddkit.sets.distilled import SetFiles, read_provenance, set_files

STATE_FILE = "state.pt"
RECORDS_FILE = "records.jsonl"
_VERSION = 8
_FRESH = "Start over with --fresh, or refine on in another folder with --run."


@dataclass(frozen=True)
class Validation:
    """What the held-out images said of the set. step: steps before it; seconds: of work; accuracy: a fraction."""

    step: int
    seconds: float
    accuracy: float


@dataclass
class RefinementState:
    """A refinement between two steps.

    settings: plain values, which have to stay the same. start_sha256: of the set's file as it was;
    dataset_sha256: of the real training images. images, velocity, average (of the images, moving) and best_images (the
    average that was judged best): (N, 3, S, S) float32, on the CPU. student_rate: of a student's steps, where one
    follows experts; None while it is not known.
    """

    folder: Path
    settings: Mapping[str, Any]
    start_sha256: str
    dataset_sha256: str
    images: Tensor
    velocity: Tensor
    average: Tensor
    best_images: Tensor
    step: int = 0
    seconds: float = 0.0
    student_rate: float | None = None
    judgements: list[Validation] = field(default_factory=list)

    @classmethod
    def begin(
        cls, path: Path, images: Tensor, folder: Path, settings: Mapping[str, Any], dataset_sha256: str
    ) -> RefinementState:
        """The state before the first step on the set at `path`, which is copied into the folder."""
        _copy_set(path, _before(folder))
        return cls(folder, settings, sha256_of(path), dataset_sha256, images, torch.zeros_like(images), images, images)

    @classmethod
    def read(cls, folder: Path) -> RefinementState:
        """The state in `folder`. Raises BadFileError where it cannot be used."""
        kept = _load(folder / STATE_FILE)
        settings = json.loads(kept.pop("settings"))
        judgements = [Validation(**judgement) for judgement in kept.pop("judgements")]
        return cls(folder, settings, judgements=judgements, **kept)

    def require(self, path: Path, settings: Mapping[str, Any], dataset_sha256: str) -> None:
        """Raise UsageError where this is of another set than the one at `path`, of other settings or real images."""
        if sha256_of(path) != self.start_sha256 and not self.made(path):
            raise UsageError(f"{self.folder} holds the refinement of another set than {path}.", _another(self.folder))
        # Through JSON, as those of the state went: tuples are lists there.
        wanted = json.loads(json.dumps(settings))
        changed = [f"{name} {self.settings.get(name)}, not {value}" for name, value in wanted.items()
                   if self.settings.get(name) != value]  # fmt: skip
        if changed:
            raise UsageError(
                f"The refinement in {self.folder} was begun with other settings: {'; '.join(changed)}.",
                f"Leave those options away to go on, or start over with --fresh. {_another(self.folder)}",
            )
        if self.dataset_sha256 != dataset_sha256:
            raise UsageError(f"The real images have changed since the refinement in {self.folder} was begun.", _FRESH)

    @property
    def before(self) -> SetFiles:
        """The set as it was."""
        return set_files(_before(self.folder))

    @property
    def first(self) -> Validation:
        """Of the set as it was."""
        return self.judgements[0]

    @property
    def best(self) -> Validation:
        """Of equals the later one, which is refined further."""
        return max(self.judgements, key=lambda judgement: (judgement.accuracy, judgement.step))

    @property
    def judged(self) -> bool:
        """Whether the present images have been."""
        return bool(self.judgements) and self.judgements[-1].step == self.step

    def judge(self, accuracy: float) -> None:
        """Take note of what the held-out images say of the present ones."""
        self.judgements.append(Validation(self.step, round(self.seconds, 1), accuracy))
        if self.best is self.judgements[-1]:
            self.best_images = self.average

    def made(self, path: Path) -> bool:
        """Whether the set at `path` is this refinement's result, the present or an earlier one."""
        return _is_result(path, self.start_sha256, self.best_images)

    def gained_nothing(self) -> bool:
        """Whether the best images are those of the set as it was."""
        before = self.before.tensor
        return self.best.step == 0 and before.is_file() and _holds(before, self.best_images)

    def give_back(self, to: Path) -> SetFiles:
        """Write the set as it was."""
        _copy_set(self.before.tensor, to)
        return set_files(to)

    def save(self) -> None:
        """Write it all, atomically."""
        kept = {name: value for name, value in vars(self).items() if name != "folder"}
        judgements = [asdict(judgement) for judgement in self.judgements]
        kept |= {"version": _VERSION, "settings": json.dumps(self.settings), "judgements": judgements}
        save_torch(kept, self.folder / STATE_FILE)
        write_text(self.folder / RECORDS_FILE, "".join(f"{json.dumps(judgement)}\n" for judgement in judgements))


def start_over(path: Path, folder: Path, out: Path | None = None) -> None:
    """Forget the refinement in `folder`; a set at `path` that it made gives way to the one it was made from.

    out: where the refined set was written, and is to be; `path` when None. What the refinement made there is kept in the
    folder as refined.pt, .json and .png. Only what a refinement wrote is removed from the folder. Raises UsageError where
    the set at `path` is neither what that refinement began with nor what it made: the only copy of the former would be
    lost.
    """
    before = _before(folder)
    if before.exists():
        started_with, best = sha256_of(before), _best_images(folder)
        for file in dict.fromkeys((path, out or path)):
            if file.is_file() and sha256_of(file) != started_with:
                if _is_result(file, started_with, best):
                    _copy_set(file, _given_up(folder))
                elif file == path:
                    raise UsageError(
                        f"{folder} keeps the set that another refinement began with, {before.name}, and {path} is not of it.",
                        _another(folder),
                    )
        _copy_set(before, path)  # also where a kill halfway left the tensor given back and not yet what is beside it
    for file in (folder / STATE_FILE, folder / RECORDS_FILE, *vars(set_files(before)).values()):
        file.unlink(missing_ok=True)


def refuse_kept_copy(folder: Path, *paths: Path) -> None:
    """Raise UsageError where a path is a copy that the folder keeps, of the set as it was or of one given up."""
    kept = {_before(folder).resolve(): "the set as it was", _given_up(folder).resolve(): "a set that was given up"}
    for path in paths:
        if whose := kept.get(path.resolve()):
            raise UsageError(
                f"{path} is the copy that {folder} keeps of {whose}.",
                "Name the set itself, with --fresh to start over from it as it was, or copy that file elsewhere first.",
            )


def _before(folder: Path) -> Path:
    return folder / "before.pt"


def _given_up(folder: Path) -> Path:
    return folder / "refined.pt"


def _is_result(path: Path, start_sha256: str, best_images: Tensor | None) -> bool:
    if read_provenance(path).get("refined_from") == start_sha256:
        return True
    # Killed between writing the tensor and how it was made, the facts do not tell.
    return best_images is not None and _holds(path, best_images)


def _holds(path: Path, images: Tensor) -> bool:
    try:
        held = load_restricted(path)
    except UnloadableError:
        return False
    return isinstance(held, Tensor) and held.shape == images.shape and torch.equal(held, images)


def _best_images(folder: Path) -> Tensor | None:
    """None where the state cannot be read."""
    try:
        return _load(folder / STATE_FILE)["best_images"]
    except BadFileError:
        return None


def _copy_set(path: Path, to: Path) -> None:
    """The three files of a set under another name, in the place of those that were there."""
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
        raise BadFileError(f"{path} is damaged or no state of a refinement.", _FRESH) from error
    if not isinstance(kept, dict) or kept.pop("version", None) != _VERSION:
        raise BadFileError(f"{path} is of another version of ddkit.", _FRESH)
    return kept


def _another(folder: Path) -> str:
    """How to refine beside what a folder holds."""
    return f"Name another folder, such as --run {folder}-2."
