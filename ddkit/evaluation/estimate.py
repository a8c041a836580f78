"""What an evaluation will take, and if it would be official, before it begins."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import psutil
import torch

from ddkit.challenge import BATCH_SIZE
from ddkit.evaluation.evaluate import SIDE_BY_SIDE, EvaluationSettings, StateFolder, deviations_of, finished_rounds
from ddkit.evaluation.rounds import on_device
from ddkit.evaluation.sources import FixedSet, check_training_set
from ddkit.evaluation.test_sets import TestSet
from ddkit.evaluation.tracks import Generated, images_per_class
from ddkit.network.networks import build_network
from ddkit.network.training import TrainingRun
from ddkit.runtime.device import free_memory, resolve_device
from ddkit.runtime.progress import Listener, Progress, ignore

_FEWEST_BATCHES = 3  # besides the first of each size


@dataclass(frozen=True)
class EvaluationEstimate:
    """What the evaluation of a set will take.

    source: the set's file. images: that each network trains on. rounds: in all; finished_rounds: that are done already.
    epochs: of each round. seconds_per_epoch, test_seconds: of one network, as measured. seconds: still to come.
    memory: that is needed, and free_memory: that is free on the device, bytes.
    deviations: what would differ from the protocol; the result would be official if nothing does.
    """

    source: str
    dataset: str
    images: int
    rounds: int
    finished_rounds: int
    epochs: int
    seconds_per_epoch: float
    test_seconds: float
    seconds: float
    memory: int
    free_memory: int
    deviations: tuple[str, ...]

    @property
    def official(self) -> bool:
        return not self.deviations


def estimate_evaluation(
    source: FixedSet,
    name: str,
    test_set: TestSet,
    settings: EvaluationSettings,
    *,
    state: StateFolder | None = None,
    tried_seconds: float = 3.0,
    progress: Listener = ignore,
) -> EvaluationEstimate:
    """Train on a few batches of a set and test on one, on this machine; nothing is kept.

    name: of the set's file. tried_seconds: of training, at least.
    Raises what `evaluate` raises for the set and the device.
    """
    spec, device = test_set.spec, resolve_device(settings.device)
    check_training_set(source.images, source.labels, spec)
    free = free_memory(device)
    network = build_network(settings.network, spec.num_classes, spec.image_size, seed=0).to(device)
    ((images, labels),) = on_device([Generated(source.images, source.labels, 0.0)], device)
    training = TrainingRun(network, images, labels, settings.training, torch.Generator().manual_seed(0), spec=spec)
    per_image = _seconds_per_image(training, device, len(images), tried_seconds, progress)
    network.eval()
    batch = next(test_set.batches(device))
    training.engine.logits(batch)
    began = time.monotonic()
    training.engine.logits(batch).argmax(dim=1).cpu()
    test_seconds = (time.monotonic() - began) / len(batch) * len(test_set)
    training.close()
    rounds, epochs = settings.number_of_rounds, settings.training.epochs
    per_class = images_per_class(source.labels, spec.num_classes)
    finished = finished_rounds(source, test_set, settings, device, state or StateFolder())
    epoch = per_image * len(images)
    if device.type == "cuda":  # of all networks that train side by side
        memory = torch.cuda.max_memory_allocated(device) * min(rounds, SIDE_BY_SIDE)
    else:
        memory = _peak_memory()
    return EvaluationEstimate(
        source=name,
        dataset=spec.name,
        images=len(images),
        rounds=rounds,
        finished_rounds=finished,
        epochs=epochs,
        seconds_per_epoch=epoch,
        test_seconds=test_seconds,
        seconds=(rounds - finished) * (epochs * epoch + test_seconds),
        memory=memory,
        free_memory=free,
        deviations=deviations_of(settings, test_set, per_class, device, converted=source.converted),
    )


def _seconds_per_image(training: TrainingRun, device: torch.device, images: int, tried: float, progress: Listener) -> float:
    """The time that one image takes in training, in batches as they will be."""
    seconds, counted, batches = 0.0, 0, 0
    met: set[int] = set()  # sizes of batches: for the first of each, memory is allocated, and a GPU records or compiles
    while batches < _FEWEST_BATCHES or seconds < tried:
        sizes = [min(BATCH_SIZE, images - start) for start in range(0, images, BATCH_SIZE)]
        began = time.monotonic()
        for size, _ in zip(sizes, training.steps(), strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = time.monotonic()
            if size in met:
                seconds, counted, batches = seconds + now - began, counted + size, batches + 1
            met.add(size)
            began = now
            progress(Progress("measuring batches", min(seconds, tried), tried, "s"))
            if batches >= _FEWEST_BATCHES and seconds >= tried:
                break
        else:
            training.end_epoch()
    return seconds / counted


def _peak_memory() -> int:
    """The most bytes of memory that this process has held so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows does not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
