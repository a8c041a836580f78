"""Rounds of an evaluation: fresh networks trained and tested, saved on the way so that a kill costs little."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.errors import ComputeError, InterruptedRunError
from ddkit.evaluation.reference import TestSet
from ddkit.evaluation.tracks import Generated, images_per_class
from ddkit.network.engine import Engine
from ddkit.network.networks import build_network
from ddkit.network.training import TrainingRun, TrainingSettings, epoch_side_by_side
from ddkit.runtime.device import shortage_explained
from ddkit.runtime.interrupt import StopRequest
from ddkit.runtime.tensor_files import UnloadableError, load_restricted, save_torch

_log = logging.getLogger(__name__)

_STATE_VERSION = 2
_BETWEEN_EPOCHS = 1  # the version whose states were all saved between two epochs

EpochListener = Callable[[int, int, float], None]  # round, its epochs done, mean loss of the last


@dataclass(frozen=True)
class RoundSettings:
    """What decides on a round's outcome, beside the data and its number.

    seed: of the whole evaluation; round r of every evaluation with this seed starts from the same network and
        draws the same shuffles and augmentations, so that two sets can be compared round by round.
    """

    network: str
    training: TrainingSettings
    seed: int
    device: str = "cpu"

    def seed_for(self, purpose: str, index: int) -> int:
        """A 32-bit seed for one purpose in round `index`.

        Hashed, because PyTorch's CPU generator looks at the lower 32 bits of a seed only and neighboring
        sums of seed and round would coincide.
        """
        text = f"ddkit/{purpose}/{self.seed}/{index}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")


@dataclass(frozen=True)
class RoundResult:
    """What a finished round leaves.

    predictions: (N_test,) int16, the predicted class of each test image in file order.
    losses: of each epoch, the mean of its batches' losses. seconds: of training and testing.
    images, images_per_class: how many were trained on, and the smallest and largest number of any class.
    """

    predictions: Tensor
    losses: tuple[float, ...]
    seconds: float
    generation_seconds: float
    images: int
    images_per_class: tuple[int, int]

    def accuracy(self, labels: Tensor) -> float:
        """Fraction of the test images whose prediction is in `labels`, (N_test,) int64."""
        return int((self.predictions == labels).sum()) / len(labels)

    def confusion(self, labels: Tensor, num_classes: int) -> Tensor:
        """(num_classes, num_classes) int64: how many images of each true class (row) got each predicted one."""
        pairs = labels * num_classes + self.predictions
        return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class StateFile:
    """Where a round's state lies while it runs, and its result afterwards.

    path: None keeps nothing. seconds_between_saves: how much work a kill may cost.
    """

    path: Path | None = None
    seconds_between_saves: float = 30.0

    def read(self) -> dict[str, Any]:
        """What was saved, or an empty dict; a file that cannot be used is reported and counts as none."""
        if self.path is None or not self.path.exists():
            return {}
        try:
            state = load_restricted(self.path)
        except (OSError, UnloadableError) as error:
            _log.warning("%s cannot be read (%s); the round starts afresh.", self.path, error)
            return {}
        if isinstance(state, dict) and state.get("version") == _BETWEEN_EPOCHS:
            state |= {"version": _STATE_VERSION}
            if "training" in state:
                state["training"] |= {"order": None, "losses": []}
        if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
            _log.warning("%s is of another version; the round starts afresh.", self.path)
            return {}
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Save atomically."""
        if self.path is not None:
            save_torch({"version": _STATE_VERSION, **state}, self.path)


@dataclass(frozen=True)
class RoundJob:
    """A round to run: its number, what it trains on, where its state lies."""

    index: int
    made: Generated
    file: StateFile


def run_rounds(
    jobs: Sequence[RoundJob],
    test_set: TestSet,
    settings: RoundSettings,
    *,
    stop: StopRequest,
    listener: EpochListener,
) -> list[RoundResult]:
    """Train and test the jobs' networks side by side, going on from what their files hold.

    Raises InterruptedRunError, the states saved, once `stop` is set.
    """
    data = _on_device(jobs, settings.device)
    rounds = [_Round(job, *own, test_set.spec, settings) for job, own in zip(jobs, data, strict=True)]
    while unfinished := [one for one in rounds if not one.training.finished]:
        _SideBySide(unfinished, stop, listener).epoch()
    return [one.finish(test_set) for one in rounds]


class _SideBySide:
    """Rounds that train together, and share the time that it takes."""

    def __init__(self, rounds: Sequence[_Round], stop: StopRequest, listener: EpochListener) -> None:
        self._rounds, self._stop, self._listener = rounds, stop, listener
        self._settled = time.monotonic()

    def epoch(self) -> None:
        """Train all for one epoch. Raises InterruptedRunError, the states saved, once asked to stop."""
        of_epoch = epoch_side_by_side([one.training for one in self._rounds], self._save_or_stop)
        for one, losses in zip(self._rounds, of_epoch, strict=True):
            one.losses.append(sum(losses) / len(losses))
            self._listener(one.index, one.training.epochs_done, one.losses[-1])
        self._settle()
        self._save_or_stop()

    def _save_or_stop(self) -> None:
        """Do what is due between two batches: an epoch of a whole training set takes minutes."""
        if not (self._stop or any(one.save_is_due for one in self._rounds)):
            return
        self._settle()
        for one in self._rounds:
            one.save()
        self._settled = time.monotonic()  # saving is not training
        if self._stop:
            first = self._rounds[0]
            raise InterruptedRunError(
                f"Interrupted after {first.training.epochs_done} epochs of round {first.index + 1}.",
                "Run the same again to go on from there." if first.is_kept else "Nothing was kept.",
            )

    def _settle(self) -> None:
        now = time.monotonic()
        for one in self._rounds:
            one.seconds += (now - self._settled) / len(self._rounds)
        self._settled = now


class _Round:
    """A round that runs."""

    def __init__(self, job: RoundJob, images: Tensor, labels: Tensor, spec: DatasetSpec, settings: RoundSettings) -> None:
        self.index = job.index
        self._made, self._file = job.made, job.file
        self._device = torch.device(settings.device)
        initial = settings.seed_for("network", job.index)
        network = build_network(settings.network, spec.num_classes, spec.image_size, seed=initial).to(settings.device)
        generator = torch.Generator().manual_seed(settings.seed_for("training", job.index))
        self.training = TrainingRun(network, images, labels, settings.training, generator)
        self.losses: list[float] = []
        self.seconds = 0.0  # of this round's own work, over all its sittings
        self._saved = time.monotonic()
        if saved := job.file.read():
            self.training.load_state_dict(saved["training"])
            self.losses, self.seconds = saved["losses"], saved["seconds"]

    @property
    def is_kept(self) -> bool:
        return self._file.path is not None

    @property
    def save_is_due(self) -> bool:
        return self.is_kept and time.monotonic() - self._saved >= self._file.seconds_between_saves

    def save(self) -> None:
        state = {"training": self.training.state_dict(), "losses": self.losses, "seconds": self.seconds}
        self._file.write(state)
        self._saved = time.monotonic()

    def finish(self, test_set: TestSet) -> RoundResult:
        began = time.monotonic()
        self.training.network.eval()
        predictions = predict(self.training.engine, test_set, self._device)
        result = RoundResult(
            predictions=predictions,
            losses=tuple(self.losses),
            seconds=self.seconds + time.monotonic() - began,
            generation_seconds=self._made.seconds,
            images=len(self._made.images),
            images_per_class=images_per_class(self._made.labels, test_set.spec.num_classes),
        )
        self._file.write({"result": {**vars(result), "losses": self.losses}})
        return result


def read_result(file: StateFile) -> RoundResult | None:
    """The result of a round that is finished; None of one that is not."""
    result = file.read().get("result")
    return RoundResult(**{**result, "losses": tuple(result["losses"])}) if result else None


def predict(engine: Engine, test_set: TestSet, device: torch.device) -> Tensor:
    """(N_test,) int16 on the CPU: the class of the largest logit of each test image."""
    classes = torch.empty(len(test_set), dtype=torch.int64, device=device)
    start = 0
    for images in test_set.batches(device):
        classes[start : start + len(images)] = engine.logits(images).argmax(dim=1)
        start += len(images)
    return classes.to("cpu", torch.int16)


def _on_device(jobs: Sequence[RoundJob], device: str) -> list[tuple[Tensor, Tensor]]:
    """Each job's images, (N, 3, S, S) float32, and labels there; what several of them train on, once."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    for made in (job.made for job in jobs):
        count = len(made.images)
        with shortage_explained(
            lambda count=count: ComputeError(f"Memory is short for {count:,} training images.", "Use another --device.")
        ):
            if id(made.images) not in moved:
                moved[id(made.images)] = made.images.float().to(device), made.labels.to(device)
    return [moved[id(job.made.images)] for job in jobs]
