"""What makes an evaluation official, and track 2's generators under their clock."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddkit.challenge import CHALLENGE_DATASETS, DatasetSpec, Track
from ddkit.errors import ComputeError, InvalidSubmission
from ddkit.files import sha256_of
from ddkit.progress import Listener, Progress, ignore
from ddkit.protocol.networks import OFFICIAL_NETWORK

TEST_IMAGES = 10_000  # of both datasets of the challenge
_SECONDS_BETWEEN_LOOKS = 0.5
_STANDARD_ERROR = 2  # its file descriptor

Generate = Callable[[int, float], tuple[Tensor, Tensor]]
"""A track 2 entry: (seed, seconds it may take) -> normalised (N, 3, S, S) images and (N,) int64 labels."""


@dataclass(frozen=True)
class Conditions:
    """Under which an evaluation ran, as far as the protocol prescribes them."""

    rounds: int
    epochs_setting: int
    images_per_class: tuple[int, int]
    test_images: int
    network: str
    augment: bool
    precision: str
    time_budget: float | None = None  # seconds; track 2 only


def deviations(track: Track, spec: DatasetSpec, conditions: Conditions) -> tuple[str, ...]:
    """What differs from PROTOCOL.md, a phrase each; empty for an official evaluation."""
    found = []
    if not spec.in_challenge:
        names = " and ".join(known.name for known in CHALLENGE_DATASETS)
        found.append(f"dataset {spec.name}, the challenge has {names}")
    elif conditions.test_images != TEST_IMAGES:
        found.append(f"{conditions.test_images:,} test images instead of {TEST_IMAGES:,}")
    if track.ipc is not None and conditions.images_per_class != (track.ipc, track.ipc):
        fewest, most = conditions.images_per_class
        found.append(f"{fewest if fewest == most else f'{fewest} to {most}'} images a class instead of {track.ipc}")
    if conditions.time_budget != track.time_budget_seconds:
        found.append(_budget_deviation(conditions.time_budget, track.time_budget_seconds))
    if conditions.rounds != track.rounds:
        found.append(f"{conditions.rounds} rounds instead of {track.rounds}")
    if conditions.epochs_setting != track.epochs_setting:
        found.append(f"E = {conditions.epochs_setting} instead of {track.epochs_setting}")
    if conditions.network != OFFICIAL_NETWORK:
        found.append(f"network {conditions.network} instead of {OFFICIAL_NETWORK}")
    if not conditions.augment:
        found.append("no augmentation")
    if conditions.precision != "float32":
        found.append(f"{conditions.precision} instead of float32")
    return tuple(found)


def _budget_deviation(budget: float | None, official: float | None) -> str:
    if budget is None:
        return f"images not generated within {official:g} s for each round"
    return f"a time budget of {budget:g} s" + (f" instead of {official:g} s" if official else "")


@dataclass(frozen=True)
class Generated:
    """What a track 2 entry made for one round, and how long it took, loading and saving included."""

    images: Tensor  # (N, 3, S, S) float32, normalised
    labels: Tensor  # (N,) int64
    seconds: float


def generate_within(generate: Generate, seed: int, budget: float) -> Generated:
    """Run a track 2 entry on the clock. Raises InvalidSubmission when it takes longer than `budget` seconds."""
    began = time.monotonic()
    images, labels = generate(seed, budget)
    seconds = time.monotonic() - began
    if seconds > budget:
        raise _overrun("The generator", f"ended after {seconds:.1f} s,", budget)
    return Generated(images, labels, seconds)


def script_entry(script: Path, dataset: str, *, device: str | None = None, progress: Listener = ignore) -> Generate:
    """The entry that `python script --dataset NAME --out FILE --time-budget SECONDS --seed N` is.

    The script writes {"images": (N, 3, S, S) float32 normalised, "labels": (N,) int64} with torch.save.
    device: passed on as --device, where given. progress: hears of the seconds as they are spent.
    """

    def generate(seed: int, budget: float) -> tuple[Tensor, Tensor]:
        with tempfile.TemporaryDirectory(prefix="ddkit-entry-") as folder:
            out = Path(folder) / "images.pt"
            command = [sys.executable, str(script), "--dataset", dataset, "--out", str(out)]
            command += ["--time-budget", f"{budget:g}", "--seed", str(seed)]
            _run_script(command + (["--device", device] if device else []), budget, progress)
            return _read_generated(out)

    return generate


def hash_of_folder(folder: Path) -> str:
    """Hexadecimal SHA-256 of all files below `folder`, names included: identifies an entry with its models."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(folder)}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _run_script(command: list[str], budget: float, progress: Listener) -> None:
    began = time.monotonic()
    # Its output is the entry's own affair, and ours may be JSON: it goes where progress goes.
    with subprocess.Popen(command, stdout=_STANDARD_ERROR) as process:
        try:
            while process.poll() is None:
                spent = time.monotonic() - began
                if spent > budget:
                    raise _overrun(command[1], "was still running", budget)
                progress(Progress("generating", spent, budget, "s"))
                _wait(process, _SECONDS_BETWEEN_LOOKS)
        finally:
            process.kill()  # nothing, where it has ended
    if process.returncode != 0:
        raise ComputeError(f"{command[1]} ended with status {process.returncode}.", "Its own message stands above.")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _overrun(name: str, what: str, budget: float) -> InvalidSubmission:
    return InvalidSubmission(
        f"{name} {what} after its budget of {budget:g} s.",
        "In the challenge an entry that overruns its time scores nothing.",
    )


def _read_generated(path: Path) -> tuple[Tensor, Tensor]:
    try:
        made = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, ValueError, KeyError, EOFError) as error:
        raise InvalidSubmission(f"The generator left no readable file of images: {error}.") from error
    if not isinstance(made, dict) or not {"images", "labels"} <= made.keys():
        raise InvalidSubmission("The generator's file is no dict of 'images' and 'labels'.")
    return made["images"], made["labels"]


def images_per_class(labels: Tensor, num_classes: int) -> tuple[int, int]:
    """Smallest and largest number of images of any class."""
    counts = torch.bincount(labels.cpu(), minlength=num_classes)
    return int(counts.min()), int(counts.max())
