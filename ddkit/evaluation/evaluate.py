"""The challenge's evaluation: several fresh networks trained on a set and tested on the real test images."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit import challenge
from ddkit.challenge import DatasetSpec
from ddkit.data.store import ImageSet
from ddkit.errors import InterruptedRunError, UsageError, did_you_mean
from ddkit.evaluation.rounds import RoundJob, RoundResult, RoundSettings, read_result, run_rounds
from ddkit.evaluation.sources import FixedSet, Source, TimedGenerator, check_training_set
from ddkit.evaluation.test_sets import TestSet, as_test_set
from ddkit.evaluation.tracks import Conditions, Generated, deviations
from ddkit.network.networks import NETWORKS, OFFICIAL_NETWORK
from ddkit.network.training import TrainingSettings
from ddkit.results import Outcome, Result
from ddkit.runtime.device import describe_device, resolve_device
from ddkit.runtime.distributed import ProcessGroup
from ddkit.runtime.environment import versions
from ddkit.runtime.files import LOCK_FILE, one_at_a_time
from ddkit.runtime.interrupt import StopRequest, stop_requests
from ddkit.runtime.progress import Listener, Progress, ignore

_MOST_CONFUSIONS = 30
_POINTS_OF_CURVE = 101
SIDE_BY_SIDE = 4  # rounds at a time on a GPU


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation; None takes the track's value.

    track: 1 or 2. rounds: how many fresh networks to train. epochs_setting: E; E + 1 epochs run.
    network: a name in `ddkit.network.networks.NETWORKS`. precision: "float32" or "bfloat16".
    time_budget: seconds that a track 2 generator may take for each round.
    Raises UsageError for values that make no sense.
    """

    track: int = 1
    rounds: int | None = None
    epochs_setting: int | None = None
    seed: int = 0
    network: str = OFFICIAL_NETWORK
    augment: bool = True
    precision: str = "float32"
    device: str = "auto"
    time_budget: float | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "epochs_setting", "seed"):
            if (value := getattr(self, name)) is not None:
                try:
                    object.__setattr__(self, name, operator.index(value))  # JSON takes no integers of NumPy
                except TypeError:
                    raise UsageError(f"EvaluationSettings.{name} must be a whole number, got {value!r}.") from None
        if self.rounds is not None and self.rounds < 1:
            raise UsageError(f"The number of rounds must be positive, got {self.rounds}.")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"The seed must be from 0 to {2**31 - 1}, got {self.seed}.")
        if self.time_budget is not None and self.time_budget <= 0:
            raise UsageError(f"The time budget must be positive, got {self.time_budget}.")
        if self.time_budget is not None and self.track == 1:
            raise UsageError("A time budget needs track 2.", "On track 1 nothing is generated during the evaluation.")
        if self.network not in NETWORKS:
            raise UsageError(f"Unknown network '{self.network}'.", did_you_mean(self.network, tuple(NETWORKS)))
        # These raise UsageError for an unknown track, and for epochs or a precision that make no sense.
        _ = challenge.track(self.track), self.training

    @property
    def number_of_rounds(self) -> int:
        return self.rounds or challenge.track(self.track).rounds

    @property
    def budget(self) -> float | None:
        """Seconds that a track 2 generator may take for each round; None on track 1."""
        return self.time_budget or challenge.track(self.track).time_budget_seconds

    @property
    def training(self) -> TrainingSettings:
        epochs = self.epochs_setting
        if epochs is None:
            epochs = challenge.track(self.track).epochs_setting
        return TrainingSettings(epochs, augment=self.augment, precision=self.precision)


@dataclass(frozen=True, kw_only=True)
class Evaluation(Outcome):
    """The outcome of an evaluation, and its settings."""

    settings: EvaluationSettings

    def result(
        self, name: str, sha256: str, source: str, *, kind: str = "submission", made_by: Mapping[str, Any] | None = None
    ) -> Result:
        """The record for the results file: what was evaluated (its name, hash and path) and the outcome."""
        outcome = {field.name: getattr(self, field.name) for field in dataclasses.fields(Outcome)}
        settings = self.settings
        return Result(
            name=name,
            sha256=sha256,
            source=source,
            kind=kind,
            made_by=dict(made_by or {}),
            track=settings.track,
            epochs_setting=settings.training.epochs_setting,
            network=settings.network,
            augment=settings.augment,
            precision=settings.precision,
            seed=settings.seed,
            versions=versions(),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **outcome,
        )


@dataclass(frozen=True)
class StateFolder:
    """Where evaluations save their states and results, each in its own folder.

    path: None saves nothing. seconds_between_saves: how much work a kill may cost.
    """

    path: Path | None = None
    seconds_between_saves: float = 30.0


def evaluate(
    images: Tensor,
    labels: Tensor,
    test_set: ImageSet | Mapping[str, Tensor] | tuple[Tensor, Tensor] | TestSet,
    *,
    track: int = 1,
    rounds: int | None = None,
    epochs_setting: int | None = None,
    seed: int = 0,
    network: str = OFFICIAL_NETWORK,
    augment: bool = True,
    precision: str = "float32",
    device: str = "auto",
    spec: DatasetSpec | None = None,
    state: StateFolder | None = None,
    progress: Listener = ignore,
) -> Evaluation:
    """Train fresh networks on a distilled set as the challenge does, and test them on real images.

    images: (N, 3, S, S) float, normalized, or uint8 pixels. labels: (N,) int64.
    test_set: an ImageSet of uint8 pixels, the challenge's reference as dict or as (images, labels), normalized, or a
        TestSet, which has its own spec.
    track, rounds, epochs_setting, seed, network, augment, precision, device: see EvaluationSettings.
    spec: the dataset; None finds it among the built-in ones by number of classes and image size.
    state: where to save, so that an interrupted evaluation is continued and a finished one is not repeated. On a CPU a
        continued one gives the same accuracies to the bit.

    Raises InvalidSubmissionError for images that cannot be trained on, BadDataError for a test set that does not fit,
    UsageError for settings that make no sense, InterruptedRunError once asked to stop, with the state saved.
    Source: PROTOCOL.md.
    """
    settings = EvaluationSettings(track, rounds, epochs_setting, seed, network, augment, precision, device)
    test_set = as_test_set(test_set, spec)
    return evaluate_source(FixedSet(images, labels), test_set, settings, state=state, progress=progress)


def evaluate_generator(
    generate: Callable[[int, float], Generated],
    test_set: TestSet,
    settings: EvaluationSettings,
    *,
    name: str,
    state: StateFolder | None = None,
    progress: Listener = ignore,
) -> Evaluation:
    """Track 2: like `evaluate`, with images that `generate` makes for each round within the time budget.

    generate: (seed, seconds) -> Generated, as `evaluate` takes images and labels; raises InvalidSubmissionError if it needs
    longer.
    name: a hash or name that identifies the entry, under which interrupted evaluations are continued.
    Raises UsageError for settings of track 1.
    """
    if settings.budget is None:
        raise UsageError("Generators are evaluated on track 2.", "Add --track 2.")
    source = TimedGenerator(generate, name, settings.budget, test_set.spec)
    return evaluate_source(source, test_set, settings, state=state, progress=progress)


def evaluate_source(
    source: Source,
    test_set: TestSet,
    settings: EvaluationSettings,
    *,
    state: StateFolder | None = None,
    progress: Listener = ignore,
) -> Evaluation:
    """Do what `evaluate` and `evaluate_generator` do, for either source of training images."""
    if isinstance(source, FixedSet):
        check_training_set(source.images, source.labels, test_set.spec)
    group = ProcessGroup(resolve_device(settings.device))
    local = group.local_items(range(settings.number_of_rounds))
    run = _Run(source, test_set, settings, group.device, state or StateFolder(), progress, len(local))
    # A GPU trains a few rounds side by side, because one small network does not fill it. A CPU trains one, and so does a
    # GPU where each round has its own images, which can be gigabytes.
    at_once = SIDE_BY_SIDE if group.device.type == "cuda" and source.budget is None else 1
    results: list[tuple[int, RoundResult]] = []
    with run.alone(group):
        with stop_requests() as stop:
            for start in range(0, len(local), at_once):
                indices = local[start : start + at_once]
                results += zip(indices, run.rounds(indices, stop), strict=True)
        # Every process gets all results, and so the same evaluation.
        gathered = sorted(group.gather(results), key=lambda pair: pair[0])
    return _summary([result for _, result in gathered], test_set, settings, source, group.device)


def finished_rounds(
    source: Source, test_set: TestSet, settings: EvaluationSettings, device: torch.device, state: StateFolder
) -> int:
    """The number of rounds that an earlier call has finished, which are not repeated."""
    run = _Run(source, test_set, settings, device, state, ignore, settings.number_of_rounds)
    return sum(read_result(run.file(index)) is not None for index in range(settings.number_of_rounds))


@dataclass
class _Run:
    """This process's rounds of an evaluation, and how far they are."""

    source: Source
    test_set: TestSet
    settings: EvaluationSettings
    device: torch.device
    state: StateFolder
    progress: Listener
    number_of_rounds: int

    def __post_init__(self) -> None:
        settings = self.settings
        self._rounds = RoundSettings(settings.network, settings.training, settings.seed, str(self.device))
        self._folder = self.state.path and Path(self.state.path) / _key(self.source, self.test_set, self._rounds)
        self._epochs_done: dict[int, int] = {}

    @contextlib.contextmanager
    def alone(self, group: ProcessGroup) -> Iterator[None]:
        """Wait until no other process makes the same evaluation with the same state, whose finished rounds are then read."""
        with contextlib.ExitStack() as locks:
            if self._folder is not None and group.is_main:
                locks.enter_context(one_at_a_time(self._folder / LOCK_FILE, "makes the same evaluation"))
            group.gather([])  # the others wait for the main process
            yield

    def rounds(self, indices: Sequence[int], stop: StopRequest) -> list[RoundResult]:
        """The results of these rounds, trained side by side where they are not finished already."""
        files = {index: self.file(index) for index in indices}
        results = {index: result for index, file in files.items() if (result := read_result(file))}
        for index, result in results.items():
            self._report(index, self.settings.training.epochs, result.losses[-1])
        jobs = []
        for index in sorted(files.keys() - results.keys()):
            if stop:
                raise InterruptedRunError(f"Interrupted before round {index + 1}.", "Run the same command again to continue.")
            made = self.source.for_round(self._rounds.seed_for("generation", index), self._images_file(index))
            jobs.append(RoundJob(index, made, files[index], self.state.seconds_between_saves))
        ran = run_rounds(jobs, self.test_set, self._rounds, stop=stop, listener=self._report)
        results |= {job.index: result for job, result in zip(jobs, ran, strict=True)}
        for index in indices:
            if images := self._images_file(index):
                images.unlink(missing_ok=True)
        return [results[index] for index in indices]

    def file(self, index: int) -> Path | None:
        """Where the state and the result of a round are kept."""
        return self._folder and self._folder / f"round-{index}.pt"

    def _images_file(self, index: int) -> Path | None:
        """Where the images that a generator made for a round are kept until the round is finished."""
        return self._folder and self._folder / f"round-{index}-images.pt"

    def _report(self, index: int, epochs_done: int, loss: float) -> None:
        self._epochs_done[index] = epochs_done
        done, total = sum(self._epochs_done.values()), self.number_of_rounds * self.settings.training.epochs
        figures = {"round": index + 1, "loss": loss}
        self.progress(Progress(f"training on {self.test_set.spec.name}", done, total, "epochs", figures))


def _key(source: Source, test_set: TestSet, rounds: RoundSettings) -> str:
    """A name for everything that decides on the outcome of a round, other than its number."""
    spec = test_set.spec
    decides = {
        "training set": source.identity,
        "test set": test_set.sha256,
        "normalisation": [spec.num_classes, spec.mean, spec.std],
        # Which of a machine's GPUs it is does not matter, and depends on the number of processes.
        "settings": dataclasses.asdict(rounds) | {"device": torch.device(rounds.device).type},
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return f"{spec.name}-{digest[:16]}"


def _summary(
    results: Sequence[RoundResult],
    test_set: TestSet,
    settings: EvaluationSettings,
    source: Source,
    device: torch.device,
) -> Evaluation:
    spec = test_set.spec
    fewest = min(result.images_per_class[0] for result in results)
    most = max(result.images_per_class[1] for result in results)
    budget = source.budget
    differences = deviations_of(settings, test_set, (fewest, most), device, budget=budget, converted=source.converted)
    counts = torch.stack([result.confusion(test_set.labels, spec.num_classes) for result in results])
    classes = spec.num_classes
    top = counts.double().mean(0).fill_diagonal_(0).flatten().topk(min(_MOST_CONFUSIONS, classes**2))
    mistakes = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Evaluation(
        dataset=spec.name,
        settings=settings,
        accuracies=tuple(result.accuracy(test_set.labels) for result in results),
        official=not differences,
        deviations=differences,
        images=results[0].images,
        images_per_class=(fewest, most),
        seconds=sum(result.seconds for result in results),
        generation_seconds=tuple(result.generation_seconds for result in results) if budget else (),
        generated=tuple(result.images for result in results) if budget else (),
        time_budget=budget,
        test_images=len(test_set),
        device=describe_device(device),
        loss_curves=tuple(_thinned(result.losses) for result in results),
        per_class=_per_class(counts),
        confusions=tuple((place // classes, place % classes, count) for place, count in mistakes if count > 0),
        class_rounds=tuple(_per_class(of_round[None]) for of_round in counts),
        test_sha256=test_set.sha256,
    )


def deviations_of(
    settings: EvaluationSettings,
    test_set: TestSet,
    per_class: tuple[int, int],
    device: torch.device,
    *,
    budget: float | None = None,
    converted: str = "",
) -> tuple[str, ...]:
    """The differences from PROTOCOL.md of an evaluation.

    per_class: the smallest and largest number of images of a class. budget, converted: as in the source of the images.
    """
    conditions = Conditions(
        rounds=settings.number_of_rounds,
        epochs_setting=settings.training.epochs_setting,
        images_per_class=per_class,
        test_images=len(test_set),
        network=settings.network,
        augment=settings.augment,
        precision=settings.precision,
        time_budget=budget,
        official_tests=test_set.is_official,
        converted=converted,
        tf32_products=device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32",
    )
    return deviations(challenge.track(settings.track), test_set.spec, conditions)


def _thinned(losses: Sequence[float]) -> tuple[float, ...]:
    """Evenly spaced epochs, first and last included, few enough for a picture."""
    points = min(len(losses), _POINTS_OF_CURVE)
    places = torch.linspace(0, len(losses) - 1, points).round().long().tolist()
    return tuple(round(losses[place], 5) for place in places)


def _per_class(counts: Tensor) -> tuple[float, ...]:
    """Mean accuracy of each class, from counts (rounds, true class, predicted class); 0 for a class without images."""
    right = counts.diagonal(dim1=1, dim2=2).sum(0).double()
    return tuple((right / counts.sum((0, 2)).clamp(min=1)).tolist())
