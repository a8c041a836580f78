"""Rounds of an evaluation: fresh networks trained and tested, saved on the way so that a kill costs little."""

from __future__ import annotations

import functools
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
from ddkit.errors import ComputeError, InterruptedRunError, counted
from ddkit.evaluation.test_sets import TestSet
from ddkit.evaluation.tracks import Generated, images_per_class
from ddkit.network.engine import Engine
from ddkit.network.networks import build_network
from ddkit.network.training import TrainingRun, TrainingSettings, epoch_side_by_side
from ddkit.runtime.device import release_memory, shortage_explained
from ddkit.runtime.interrupt import StopRequest
from ddkit.runtime.tensor_files import UnloadableError, load_restricted, save_torch

_log = logging.getLogger(__name__)

_STATE_VERSION = 2

EpochListener = Callable[[int, int, float], None]  # round, its epochs done, mean loss of the last


@dataclass(frozen=True)
class RoundSettings:
    """Everything that decides on a round's outcome, other than the data and the round's number.

    seed: of the whole evaluation. Round r of every evaluation with this seed starts from the same network and draws the
        same shuffles and augmentations, so that two sets can be compared round by round.
    """

    network: str
    training: TrainingSettings
    seed: int
    device: str = "cpu"

    def seed_for(self, purpose: str, index: int) -> int:
        """A 32-bit seed for one purpose in round `index`.

        Hashed, because PyTorch's CPU generator uses only the lower 32 bits of a seed, and sums of seed and round would
        coincide.
        """
        text = f"ddkit/{purpose}/{self.seed}/{index}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")


@dataclass(frozen=True)
class RoundResult:
    """The outcome of a finished round.

    predictions: (N_test,) int16, the predicted class of each test image in file order.
    losses: the mean loss of each epoch's batches. seconds: for training and testing.
    images, images_per_class: how many were trained on, and the smallest and largest number of any class.
    """

    predictions: Tensor
    losses: tuple[float, ...]
    seconds: float
    generation_seconds: float
    images: int
    images_per_class: tuple[int, int]

    def accuracy(self, labels: Tensor) -> float:
        """Fraction of the test images whose prediction equals their label in `labels`, (N_test,) int64."""
        return int((self.predictions == labels).sum()) / len(labels)

    def confusion(self, labels: Tensor, num_classes: int) -> Tensor:
        """(num_classes, num_classes) int64: how many images of each true class (row) got each predicted one."""
        pairs = labels * num_classes + self.predictions
        return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class RoundJob:
    """A round to run: its number, what it trains on, and the file that keeps its state and then its result.

    path: None keeps nothing. seconds_between_saves: how much work a kill may cost.
    """

    index: int
    made: Generated
    path: Path | None = None
    seconds_between_saves: float = 30.0


def run_rounds(
    jobs: Sequence[RoundJob],
    test_set: TestSet,
    settings: RoundSettings,
    *,
    stop: StopRequest,
    listener: EpochListener,
) -> list[RoundResult]:
    """Train and test the jobs' networks side by side, continuing from the states in their files.

    Raises InterruptedRunError, with the states saved, once `stop` is set.
    """
    device = torch.device(settings.device)
    data = on_device([job.made for job in jobs], device)
    rounds = [_Round(job, *of_job, test_set.spec, settings) for job, of_job in zip(jobs, data, strict=True)]
    while unfinished := [each for each in rounds if not each.training.finished]:
        _train_epoch(unfinished, stop, listener)
    results = [each.finish(test_set) for each in rounds]
    del data, rounds
    release_memory(device)
    return results


def read_result(path: Path | None) -> RoundResult | None:
    """The result of the round whose state is kept at `path`; None if it is not finished."""
    result = _read_state(path).get("result")
    return RoundResult(**{**result, "losses": tuple(result["losses"])}) if result else None


def predict(engine: Engine, test_set: TestSet, device: torch.device) -> Tensor:
    """(N_test,) int16 on the CPU: the class of the largest logit of each test image."""
    classes = torch.empty(len(test_set), dtype=torch.int64, device=device)
    start = 0
    for images in test_set.batches(device):
        classes[start : start + len(images)] = engine.logits(images).argmax(dim=1)
        start += len(images)
    return classes.to("cpu", torch.int16)


class _Round:
    def __init__(self, job: RoundJob, images: Tensor, labels: Tensor, spec: DatasetSpec, settings: RoundSettings) -> None:
        self.job = job
        self._device = torch.device(settings.device)
        initial = settings.seed_for("network", job.index)
        network = build_network(settings.network, spec.num_classes, spec.image_size, seed=initial).to(settings.device)
        generator = torch.Generator().manual_seed(settings.seed_for("training", job.index))
        self.training = TrainingRun(network, images, labels, settings.training, generator, spec=spec)
        self.losses: list[float] = []
        self.seconds = 0.0  # of this round's share of the work, over all sittings
        self.saved_at = time.monotonic()
        if state := _read_state(job.path):
            self.training.load_state_dict(state["training"])
            self.losses, self.seconds = state["losses"], state["seconds"]

    def save(self) -> None:
        state = {"training": self.training.state_dict(), "losses": self.losses, "seconds": self.seconds}
        _write_state(self.job.path, state)
        self.saved_at = time.monotonic()

    def finish(self, test_set: TestSet) -> RoundResult:
        """Test the network, keep the result in place of the state, and give the engine's memory back."""
        began = time.monotonic()
        self.training.network.eval()
        predictions = predict(self.training.engine, test_set, self._device)
        self.training.close()
        result = RoundResult(
            predictions=predictions,
            losses=tuple(self.losses),
            seconds=self.seconds + time.monotonic() - began,
            generation_seconds=self.job.made.seconds,
            images=len(self.job.made.images),
            images_per_class=images_per_class(self.job.made.labels, test_set.spec.num_classes),
        )
        _write_state(self.job.path, {"result": {**vars(result), "losses": self.losses}})
        return result


def _train_epoch(rounds: Sequence[_Round], stop: StopRequest, listener: EpochListener) -> None:
    """Train all rounds for one epoch. Raises InterruptedRunError, with the states saved, once asked to stop."""
    last = time.monotonic()

    def count_seconds() -> None:
        nonlocal last
        now = time.monotonic()
        for each in rounds:
            each.seconds += (now - last) / len(rounds)
        last = now

    def save_or_stop() -> None:
        """Do what is due between two batches, because an epoch of a whole training set takes minutes."""
        nonlocal last
        due = [each for each in rounds if each.job.path and time.monotonic() >= each.saved_at + each.job.seconds_between_saves]
        if not stop and not due:
            return
        count_seconds()
        for each in rounds:
            each.save()
        last = time.monotonic()  # saving is not training
        if stop:
            first = rounds[0]
            raise InterruptedRunError(
                f"Interrupted after {counted(first.training.epochs_done, 'epoch', 'epochs')} of round {first.job.index + 1}.",
                "Run the same command again to continue." if first.job.path else "Nothing was saved.",
            )

    losses_of_epoch = epoch_side_by_side([each.training for each in rounds], save_or_stop)
    for each, losses in zip(rounds, losses_of_epoch, strict=True):
        each.losses.append(sum(losses) / len(losses))
        listener(each.job.index, each.training.epochs_done, each.losses[-1])
    count_seconds()
    save_or_stop()


def _read_state(path: Path | None) -> dict[str, Any]:
    """The saved state, or an empty dict; a file that cannot be used is reported and ignored."""
    if path is None or not path.exists():
        return {}
    try:
        state = load_restricted(path)
    except (OSError, UnloadableError) as error:
        _log.warning("%s cannot be read (%s). The round starts over.", path, error)
        return {}
    if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
        _log.warning("%s was saved by another version of ddkit. The round starts over.", path)
        return {}
    return state


def _write_state(path: Path | None, state: dict[str, Any]) -> None:
    if path is not None:
        save_torch({"version": _STATE_VERSION, **state}, path)


def on_device(sets: Sequence[Generated], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Each set's images, (N, 3, S, S) float32 or uint8, and labels there; copied once where several share them."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    for made in sets:
        if id(made.images) in moved:
            continue
        message = f"There is not enough memory for {len(made.images):,} training images."
        with shortage_explained(functools.partial(ComputeError, message, "Choose another --device.")):
            images = made.images if made.images.dtype == torch.uint8 else made.images.float()
            moved[id(made.images)] = images.to(device), made.labels.to(device)
    return [moved[id(made.images)] for made in sets]
