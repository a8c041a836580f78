"""Refining a distilled set: its pixels optimised so that the challenge's network learns from them what it would from
the real training set.

Everything that a step draws depends on the seed and the step's number alone, so an interrupted refinement goes on as
if it had not been interrupted, on a CPU to the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pickle
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.data.images import normalise
from ddkit.data.prepare import open_dataset
from ddkit.data.store import class_titles, dataset_spec, store_hash
from ddkit.device import resolve_device
from ddkit.distill.matching import distance_of_means, misclassification, same_augmentation
from ddkit.distill.observers import Observers, ObserverSettings
from ddkit.distill.references import References
from ddkit.environment import versions
from ddkit.errors import BadFile, ComputeError, Interrupted, UsageError
from ddkit.files import replacing, sha256_of
from ddkit.generator.seeds import derived_seed, generator_for
from ddkit.interrupt import stop_requests
from ddkit.progress import Listener, Progress, ignore
from ddkit.protocol.networks import OFFICIAL_NETWORK, build_network
from ddkit.protocol.rounds import predict
from ddkit.protocol.training import TrainingRun, TrainingSettings
from ddkit.submission.layout import SavedSet, load_tensor, read_facts, row_labels, save_set, set_files

log = logging.getLogger(__name__)

KIND_REFINED = "refined"
STATE_FILE = "state.pt"
RECORDS_FILE = "records.jsonl"
_STATE_VERSION = 1
_LARGEST_PIXEL = 1000.0  # standard deviations of the dataset's pixels; refined sets that score well stay within ten
_SEEDS = 2**32  # of PyTorch's generator on the CPU


@dataclass(frozen=True)
class RefineSettings:
    """How a set is refined; what has to stay the same from call to call.

    real_per_class: real images of each class that a step's mean is taken over.
    learning_rate, momentum: of SGD on the pixels, in normalised space.
    recognition: weight of the cross-entropy by partly trained networks beside the distance of means.
    displayable: keep pixels within [0, 255]; the challenge does not ask for it.
    check_every: steps between two judgements by a held-out part of the training set; the best set by them is kept.
    check_epochs: E of the training that a judgement takes. held_out: share of each class's training images.
    """

    real_per_class: int = 32
    learning_rate: float = 1.0
    momentum: float = 0.5
    recognition: float = 0.0
    displayable: bool = False
    check_every: int = 250
    check_epochs: int = 100
    held_out: float = 0.1
    seed: int = 0
    observers: ObserverSettings = field(default_factory=ObserverSettings)

    def __post_init__(self) -> None:
        for name in ("real_per_class", "learning_rate", "check_every"):
            if getattr(self, name) <= 0:
                raise UsageError(f"RefineSettings.{name} must be positive, got {getattr(self, name)}.")
        if not 0 < self.held_out < 1:
            raise UsageError(f"RefineSettings.held_out is a share between 0 and 1, got {self.held_out}.")


@dataclass(frozen=True)
class Limits:
    """When to stop: after so many steps in all, or, where given, so many seconds of work in all."""

    steps: int = 1000
    seconds: float | None = None

    def reached(self, step: int, seconds: float) -> bool:
        return seconds >= self.seconds if self.seconds is not None else step >= self.steps


@dataclass(frozen=True)
class Refined:
    """What a refinement left. accuracy: of the best set on the held-out images, a fraction; before: of the first."""

    files: SavedSet
    before: SavedSet
    steps: int
    best_step: int
    accuracy: float
    accuracy_before: float
    seconds: float


def refine(
    path: Path,
    dataset: str,
    settings: RefineSettings,
    limits: Limits,
    folder: Path,
    *,
    out: Path | None = None,
    device: str = "cpu",
    save_every_seconds: float = 120.0,
    progress: Listener = ignore,
) -> Refined:
    """Refine the set at `path`, going on from what `folder` holds of it; the best by the held-out images is written.

    folder: keeps the set as it was (before.pt, .json, .png), the state and records.jsonl. out: `path` when None.
    Raises InvalidSubmission for a set that `check` refuses, UsageError where the folder belongs to another set or
    other settings, ComputeError where it diverges and Interrupted once asked to stop, what was reached written in
    both cases, and what `open_dataset` and `save_set` raise.
    """
    spec = dataset_spec(dataset)
    work = _Work.begin_or_go_on(path, spec, settings, folder)
    real = open_dataset(dataset, "train", progress=progress)
    references = References(real, spec, held_out=settings.held_out, seed=settings.seed)
    chosen = resolve_device(device)
    observers = Observers(references, settings.observers, seed=settings.seed, device=chosen, progress=progress)
    refinement = _Refinement(work, references, observers, chosen, progress)
    try:
        refinement.run(limits, save_every_seconds)
    finally:
        files = _write(work, dataset, settings, out or path)
    return Refined(
        files, set_files(folder / "before.pt"), work.step, work.best_step, work.best_accuracy, work.first_accuracy, work.seconds
    )


class _Work:
    """What a refinement has reached, and where it is kept."""

    def __init__(self, folder: Path, settings: RefineSettings, start_sha256: str, images: Tensor) -> None:
        self.folder, self.settings, self.start_sha256 = folder, settings, start_sha256
        self.step, self.seconds = 0, 0.0
        self.images, self.velocity = images, torch.zeros_like(images)
        self.best_step, self.best_images = 0, images.clone()
        self.first_accuracy = self.best_accuracy = -1.0  # until judged
        self.judged_step = -1
        self.result_sha256 = ""

    @classmethod
    def begin_or_go_on(cls, path: Path, spec: DatasetSpec, settings: RefineSettings, folder: Path) -> _Work:
        images, sha256 = load_tensor(path, spec), sha256_of(path)
        if not (folder / STATE_FILE).exists():
            _copy_set(path, folder / "before.pt")
            return cls(folder, settings, sha256, images)
        work = cls._read(folder, settings)
        if sha256 not in (work.start_sha256, work.result_sha256):
            raise UsageError(
                f"{folder} holds the refinement of another set than {path}.", "Start over with --fresh, or name another --run."
            )
        return work

    @classmethod
    def _read(cls, folder: Path, settings: RefineSettings) -> _Work:
        path = folder / STATE_FILE
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise BadFile(f"{path} is damaged or no state of a refinement.", "Start over with --fresh.") from error
        if not isinstance(state, dict) or state.pop("version", None) != _STATE_VERSION:
            raise BadFile(f"{path} is of another version of ddkit.", "Start over with --fresh.")
        begun = json.loads(state.pop("settings"))
        now = json.loads(_as_json(settings))
        changed = [f"{name} {begun.get(name)} (now {now[name]})" for name in now if begun.get(name) != now[name]]
        if changed:
            raise UsageError(
                f"The refinement in {folder} was begun with other settings: {', '.join(changed)}.",
                "Start over with --fresh, or leave the settings as they were.",
            )
        work = cls(folder, settings, state["start_sha256"], state["images"])
        vars(work).update(state)
        return work

    def save(self) -> None:
        kept = {name: value for name, value in vars(self).items() if name not in ("folder", "settings")}
        with replacing(self.folder / STATE_FILE) as temporary:
            torch.save({"version": _STATE_VERSION, "settings": _as_json(self.settings), **kept}, temporary)

    def judged(self, accuracy: float) -> None:
        """Take note of what the held-out images say of the present set."""
        self.judged_step = self.step
        if self.step == 0:
            self.first_accuracy = accuracy
        if accuracy >= self.best_accuracy:  # of equals the later one, which is refined further
            self.best_step, self.best_accuracy, self.best_images = self.step, accuracy, self.images.clone()
        record = {"step": self.step, "seconds": round(self.seconds, 1), "accuracy": accuracy}
        with (self.folder / RECORDS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class _Refinement:
    """The loop over steps."""

    def __init__(
        self, work: _Work, references: References, observers: Observers, device: torch.device, progress: Listener
    ) -> None:
        self._work, self._settings = work, work.settings
        self._references, self._observers = references, observers
        self._spec, self._device, self._progress = references.spec, device, progress
        self._images = work.images.to(device).requires_grad_()
        self._labels = row_labels(self._spec.num_classes, len(work.images) // self._spec.num_classes).to(device)
        self._optimiser = torch.optim.SGD([self._images], self._settings.learning_rate, momentum=self._settings.momentum)
        self._optimiser.state[self._images]["momentum_buffer"] = work.velocity.to(device)
        self._held_out = references.held_out()
        black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
        self._range = normalise(black_and_white, self._spec).to(device)
        self._step_number, self._seconds = work.step, work.seconds

    def run(self, limits: Limits, save_every_seconds: float) -> None:
        if self._work.first_accuracy < 0:
            self._judge()
        saved = time.monotonic()
        with stop_requests() as stop:
            while not limits.reached(self._step_number, self._seconds):
                began = time.monotonic()
                loss = self._step()
                self._step_number += 1
                self._seconds += time.monotonic() - began
                self._tell(loss, limits)
                if stop or time.monotonic() - saved >= save_every_seconds:
                    self._save()
                    saved = time.monotonic()
                if stop:
                    raise Interrupted(
                        f"Interrupted after step {self._step_number}.", "Run the same again to go on from there."
                    )
                if self._step_number % self._settings.check_every == 0:
                    self._judge()
        if self._work.judged_step != self._step_number:
            self._judge()
        self._save()

    def _step(self) -> float:
        """One step on the images; returns the loss before it."""
        settings, number = self._settings, self._step_number
        generator = generator_for("cpu", "refine", settings.seed, number)
        network, trained = self._observers.at(number)
        real = self._references.batch(settings.real_per_class, generator).to(self._device)
        images, real = same_augmentation(self._images, real, generator)
        loss, embedding = distance_of_means(network, images, real, self._spec.num_classes)
        if trained and settings.recognition > 0:
            loss = loss + settings.recognition * misclassification(network, embedding, self._labels)
        self._optimiser.zero_grad()
        loss.backward()
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged("its loss is no number")
        self._optimiser.step()
        if settings.displayable:
            with torch.no_grad():
                torch.clamp(self._images, *self._range, out=self._images)
        if not self._images.detach().abs().max() < _LARGEST_PIXEL:
            raise self._diverged(f"its pixels are further than {_LARGEST_PIXEL:,.0f} deviations from their mean")
        return value

    def _judge(self) -> None:
        """Train one network on the present set and test it on the held-out images; the same network each time."""
        settings, spec = self._settings, self._spec
        seed = derived_seed("judge", settings.seed) % _SEEDS
        network = build_network(OFFICIAL_NETWORK, spec.num_classes, spec.image_size, seed=seed).to(self._device)
        generator = torch.Generator().manual_seed(seed)
        training = TrainingSettings(settings.check_epochs)
        run = TrainingRun(network, self._images.detach().clone(), self._labels, training, generator)
        while not run.finished:
            run.epoch()
            self._progress(Progress("Judging by held-out images", run.epochs_done, training.epochs, "epochs"))
        network.eval()
        correct = predict(run.engine, self._held_out, self._device) == self._held_out.labels
        self._keep()
        self._work.judged(correct.float().mean().item())

    def _diverged(self, how: str) -> ComputeError:
        return ComputeError(
            f"The refinement diverged at step {self._step_number + 1}: {how}.",
            f"The best set, of step {self._work.best_step}, was written. Start over with --fresh and a smaller --lr.",
        )

    def _tell(self, loss: float, limits: Limits) -> None:
        figures = {"loss": loss, "accuracy": self._work.best_accuracy}
        if limits.seconds is None:
            self._progress(Progress("Refining", self._step_number, limits.steps, "steps", figures))
        else:
            figures["step"] = self._step_number
            self._progress(Progress("Refining", min(self._seconds, limits.seconds), limits.seconds, "s", figures))

    def _keep(self) -> None:
        work = self._work
        work.step, work.seconds = self._step_number, self._seconds
        work.images = self._images.detach().cpu().clone()
        work.velocity = self._optimiser.state[self._images]["momentum_buffer"].cpu().clone()

    def _save(self) -> None:
        self._keep()
        self._work.save()


def _write(work: _Work, dataset: str, settings: RefineSettings, out: Path) -> SavedSet:
    """The best set so far, with how it was made."""
    made_by = {
        "kind": KIND_REFINED,
        "method": "distribution matching",
        "refined_steps": work.best_step,
        "held_out_accuracy": work.best_accuracy,
        "refined_from": work.start_sha256,
        "before": read_facts(work.folder / "before.pt"),
        "dataset_sha256": store_hash(dataset, "train"),
        **dataclasses.asdict(settings),
        "versions": versions(),
    }
    spec = dataset_spec(dataset)
    files = save_set(out, work.best_images, spec, class_titles(dataset), made_by)
    work.result_sha256 = sha256_of(files.tensor)
    work.save()
    return files


def _copy_set(path: Path, to: Path) -> None:
    """The three files of a set, under another name."""
    for source, target in zip(vars(set_files(path)).values(), vars(set_files(to)).values(), strict=True):
        if source.exists():
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)


def _as_json(settings: RefineSettings) -> str:
    return json.dumps(dataclasses.asdict(settings), sort_keys=True)
