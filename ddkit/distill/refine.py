"""Refining a distilled set: its pixels optimized so that the challenge's network learns from them what it would from
the real training set.

Everything that a step draws depends on the seed and the step's number alone, so an interrupted refinement goes on as
if it had not been interrupted, on a CPU to the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.checks.check import require_acceptable
from ddkit.data.images import normalize
from ddkit.data.prepare import open_dataset
from ddkit.data.store import class_titles, dataset_spec, store_hash
from ddkit.distill.experts import Experts, ExpertSettings, flat_parameters, load_flat_parameters
from ddkit.distill.holdout import TrainHoldout
from ddkit.distill.matching import (
    distance_of_attention,
    mean_embedding_distance,
    misclassification,
    ridge_regression_loss,
    siamese_augment,
)
from ddkit.distill.spectrum import Spectrum
from ddkit.distill.state import STATE_FILE, RefinementState, refuse_kept_copy, start_over
from ddkit.distill.student import Student, StudentSettings
from ddkit.errors import BadFileError, ComputeError, InterruptedRunError, UsageError, did_you_mean, require_positive
from ddkit.evaluation.rounds import predict
from ddkit.network.convnet import ConvNet
from ddkit.network.embedding import Embedder, build_embedder
from ddkit.network.networks import OFFICIAL_NETWORK, build_network
from ddkit.network.training import TrainingRun, TrainingSettings
from ddkit.runtime.device import resolve_device, shortage_explained
from ddkit.runtime.environment import versions
from ddkit.runtime.files import exclusive
from ddkit.runtime.interrupt import StopRequest, stop_requests
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.runtime.seeds import generator_for, network_seed
from ddkit.sets.distilled import (
    KIND_REFINED,
    SetFiles,
    class_labels,
    load_tensor,
    read_provenance,
    require_tensor_name,
    save_set,
)

METHODS = {
    "means": "distribution matching",
    "regression": "neural feature regression",
    "trajectories": "trajectory matching",
}  # by objective
_PIXELS_OF_SPECTRUM = 2000 * 32**2  # so many pictures of side 32 tell variances to 3 %; of larger ones fewer
_LARGEST_PIXEL = 1000.0  # standard deviations of the dataset's pixels; refined sets that score well stay within ten
# For each image of a student's step, over which its loss is a mean. The steps of one learning rate then serve all
# objectives; measured on ten classes of CIFAR-100.
_DISTANCE_AS_MEANS = 6


@dataclass(frozen=True)
class RefineSettings:
    """How a set is refined; what has to stay the same from call to call.

    objective: "means", the distance of the classes' mean features from those of real images; "regression", the error
        with which ridge regression on the set's features tells real images; or "trajectories", how far a network that
        learns from the set in a few steps ends from where one has come that learned from real images in many.
    means_first: steps by means before those of another objective, which is slower at first.
    ridge: strength of the regression.
    trained_share: of the steps but those of trajectories, which share looks through experts, at any place of their ways,
        instead of through fresh random networks.
    experts: of that and of trajectories. student: of trajectories.
    real_per_class: real images of each class that a step goes by.
    learning_rate, momentum: of SGD on the pixels, in normalized space.
    spectrum: power of the real pictures' spectrum that gradients are weighed by, see `Spectrum`; 0 leaves them.
    average: of the images' exponential moving average, which is what is judged and written, the share that a step
        keeps at most; it evens out what each step's random network does. 0: the images themselves.
    attention: weight of the distance of attention maps beside that of means; see `distance_of_attention`.
    recognition: weight of the cross-entropy by the expert that a step looks through, beside the step's loss.
    displayable: keep pixels within [0, 255]; the challenge does not ask for it.
    check_every: steps between two judgements by a held-out part of the training set; the best set by them is kept.
    check_epochs: E of the training that a judgement takes. held_out: share of each class's training images.
    """

    objective: str = "regression"
    ridge: float = 0.2
    means_first: int = 100
    real_per_class: int = 32
    learning_rate: float = 6.0
    momentum: float = 0.5
    spectrum: float = 0.25
    average: float = 0.99
    trained_share: float = 0.0
    attention: float = 0.0
    recognition: float = 0.0
    displayable: bool = False
    check_every: int = 250
    check_epochs: int = 100
    held_out: float = 0.1
    seed: int = 0
    experts: ExpertSettings = field(default_factory=ExpertSettings)
    student: StudentSettings = field(default_factory=StudentSettings)

    def __post_init__(self) -> None:
        if self.objective not in METHODS:
            raise UsageError(f"There is no objective '{self.objective}'.", did_you_mean(self.objective, tuple(METHODS)))
        require_positive(self, "ridge", "real_per_class", "learning_rate", "check_every")
        if self.means_first < 0:
            raise UsageError(f"RefineSettings.means_first must not be negative, got {self.means_first}.")
        if not 0 < self.held_out < 1:
            raise UsageError(f"RefineSettings.held_out is a share between 0 and 1, got {self.held_out}.")
        if self.attention < 0:
            raise UsageError(f"RefineSettings.attention must not be negative, got {self.attention}.")
        if not 0 <= self.spectrum <= 1:
            raise UsageError(f"RefineSettings.spectrum is a power from 0 to 1, got {self.spectrum}.")
        if not 0 <= self.trained_share <= 1:
            raise UsageError(f"RefineSettings.trained_share is a share from 0 to 1, got {self.trained_share}.")
        if self.recognition > 0 and self.trained_share == 0:
            raise UsageError("RefineSettings.recognition is by experts, and trained_share is 0.")
        if not 0 <= self.average < 1:
            raise UsageError(f"RefineSettings.average is a share from 0 to below 1, got {self.average}.")

    def objective_at(self, step: int) -> str:
        """What step number `step`, counted from 0, goes by."""
        return "means" if step < self.means_first else self.objective

    def needs_experts_at(self, step: int) -> bool:
        """Whether experts have to be there before step number `step`, counted from 0."""
        return self.trained_share > 0 or self.objective_at(step) == "trajectories"


# What measured best for track 1's ten images a class and E = 1000; and distribution matching alone.
PRESETS = {"track1": RefineSettings(), "means": RefineSettings(objective="means")}


@dataclass(frozen=True)
class Limits:
    """When to stop: after so many steps in all, or, where given, so many seconds of work in all."""

    steps: int = 1000
    seconds: float | None = None

    def reached(self, step: int, seconds: float) -> bool:
        return seconds >= self.seconds if self.seconds is not None else step >= self.steps


@dataclass(frozen=True)
class Refined:
    """What a refinement left. accuracy: of the best set on the held-out images, a fraction; accuracy_before: of the first."""

    files: SetFiles
    before: SetFiles
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
    fresh: bool = False,
    ignore_codes: Collection[str] = (),
    device: str = "cpu",
    save_every_seconds: float = 120.0,
    progress: Listener = ignore,
) -> Refined:
    """Refine the set at `path`, going on from what `folder` holds of it; the best by the held-out images is written.

    folder: keeps the set as it was (before.pt, .json, .png), the state and records.jsonl. out: `path` when None.
    fresh: begin from the set as it was; the one that was refined from it, at `out`, is kept in the folder (refined.pt).
        A set that nothing is gained on is left as it is.
    ignore_codes: of findings of `check` that do not count.
    Raises InvalidSubmissionError for a set that `check` refuses; UsageError for an `out` that does not end in .pt or holds
    another refinement's result, for the copies that the folder keeps, or where the folder belongs to another set, other
    settings or other real images, or another process refines in it;
    ComputeError where it diverges or memory is short, InterruptedRunError once asked to stop and BadFileError for
    what the system
    refuses, what was reached written in these cases; and what `open_dataset` and `save_set` raise.
    """
    require_tensor_name(out or path)
    refuse_kept_copy(folder, path, out or path)
    spec = dataset_spec(dataset)
    real = open_dataset(dataset, "train", progress=progress)
    references = TrainHoldout(real, spec, held_out=settings.held_out, seed=settings.seed)
    chosen = resolve_device(device)
    load_tensor(path, spec)  # what is no set is refused before anything is forgotten
    with exclusive(folder, "refines", elsewhere="--run"):
        if fresh:
            start_over(path, folder, out)
        state = _begin_or_go_on(path, spec, settings, folder, ignore_codes)
        _refuse_another_result(state, path, out or path)
        experts = Experts(
            references, state.dataset_sha256, settings.experts, seed=settings.seed, device=chosen, progress=progress
        )
        try:
            _Refinement(state, settings, references, experts, chosen, progress).run(limits, save_every_seconds)
        except (InterruptedRunError, ComputeError, BadFileError):
            if state.judgements:
                _write(state, settings, spec, out or path)
            raise
        files = _write(state, settings, spec, out or path)
    best, first = state.best, state.first
    return Refined(files, state.before, state.step, best.step, best.accuracy, first.accuracy, state.seconds)


def _refuse_another_result(state: RefinementState, path: Path, out: Path) -> None:
    """Raise UsageError where the result would take the place of another refinement's, which has cost hours."""
    if out.resolve() != path.resolve() and read_provenance(out).get("kind") == KIND_REFINED and not state.made(out):
        raise UsageError(
            f"{out} holds what another refinement has made, which would be lost.", "Name another file with --out, or delete it."
        )


def recorded_settings(folder: Path) -> RefineSettings | None:
    """Those of the refinement in `folder`; None where there is none. Raises BadFileError where it cannot be read."""
    if not (folder / STATE_FILE).exists():
        return None
    recorded = dict(RefinementState.read(folder).settings)
    parts = {
        "experts": ExpertSettings(**recorded.pop("experts")),
        "student": StudentSettings(**recorded.pop("student")),
    }
    return RefineSettings(**recorded, **parts)


def _begin_or_go_on(
    path: Path, spec: DatasetSpec, settings: RefineSettings, folder: Path, ignore_codes: Collection[str]
) -> RefinementState:
    images, dataset_sha256 = load_tensor(path, spec), store_hash(spec.name, "train")
    if not (folder / STATE_FILE).exists():
        require_acceptable(path, spec.name, ignore_codes=ignore_codes)
        if settings.displayable:
            images = images.clamp(*_black_and_white(spec))
        return RefinementState.begin(path, images, folder, dataclasses.asdict(settings), dataset_sha256)
    state = RefinementState.read(folder)
    state.require(path, dataclasses.asdict(settings), dataset_sha256)
    return state


def _black_and_white(spec: DatasetSpec) -> Tensor:
    """(2, 3, 1, 1): the least and the largest values that a picture can have, normalized."""
    return normalize(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1), spec)


class _Refinement:
    """The loop over steps."""

    def __init__(
        self,
        state: RefinementState,
        settings: RefineSettings,
        references: TrainHoldout,
        experts: Experts,
        device: torch.device,
        progress: Listener,
    ) -> None:
        self._state, self._settings = state, settings
        self._references, self._experts = references, experts
        self._spec, self._device, self._progress = references.spec, device, progress
        self._images = state.images.to(device).clone().requires_grad_()
        self._average = state.average.to(device).clone()
        images_per_class = len(state.images) // self._spec.num_classes
        self._labels = class_labels(self._spec.num_classes, images_per_class).to(device)
        if settings.objective == "trajectories":
            self._student = Student(self._spec, images_per_class, settings.student, device)
        self._optimizer = torch.optim.SGD([self._images], settings.learning_rate, momentum=settings.momentum)
        self._optimizer.state[self._images]["momentum_buffer"] = state.velocity.to(device).clone()
        # One network for all steps, as what computes with it keeps memory that is costly to ask for each time.
        self._observer = self._network("observer", settings.seed).to(device)
        self._held_out = references.held_out()
        self._range = _black_and_white(self._spec).to(device)

    @functools.cached_property
    def _embed(self) -> Embedder:
        return build_embedder(self._observer, len(self._labels))

    @functools.cached_property
    def _spectrum(self) -> Spectrum:
        count = max(1, _PIXELS_OF_SPECTRUM // self._spec.image_size**2)
        return Spectrum(self._references.sample(count), self._settings.spectrum).to(self._device)

    def run(self, limits: Limits, save_every_seconds: float) -> None:
        """Advance and judge until a limit is reached and the images it is reached with are judged."""
        state, saved = self._state, time.monotonic()
        with stop_requests() as stop:
            while True:
                finished = limits.reached(state.step, state.seconds)
                judging = not state.judged and (finished or state.step % self._settings.check_every == 0)
                if finished and not judging:
                    return
                if judging:
                    self._judge(stop)
                elif not self._prepared():
                    self._save()
                    self._prepare(stop)
                else:
                    self._advance(limits)
                stopping = bool(stop)
                if stopping or judging or time.monotonic() - saved >= save_every_seconds:
                    self._save()
                    saved = time.monotonic()
                if stopping:
                    raise InterruptedRunError(
                        f"Interrupted after step {state.step}.", "Run the same again, without --fresh, to go on from there."
                    )

    def _advance(self, limits: Limits) -> None:
        """One step, timed and told of."""
        began = time.monotonic()
        with shortage_explained(self._shortage):
            loss = self._step()
        self._state.step += 1
        self._state.seconds += time.monotonic() - began
        self._tell(loss, limits)

    def _follows(self, step: int) -> bool:
        return self._settings.objective_at(step) == "trajectories"

    def _shortage(self) -> ComputeError:
        classes, at_once = self._spec.num_classes, self._settings.real_per_class
        if self._follows(self._state.step) or not self._prepared():
            return ComputeError(
                f"Memory is short for experts of {classes} classes and for what goes by them.",
                "Close other programs, or start over with --fresh, without --trained-share and with another --objective.",
            )
        return ComputeError(
            f"Memory is short for {at_once} real images of each of {classes} classes at once.",
            f"Start over with --fresh and --real-per-class {max(1, at_once // 2)}.",
        )

    def _step(self) -> float:
        """One step on the images; returns the loss before it."""
        settings, number = self._settings, self._state.step
        generator = generator_for("cpu", "refine", settings.seed, number)
        if self._follows(number):
            value, gradient = self._follow(generator)
        else:
            value, gradient = self._compare(number, generator)
        if not math.isfinite(value):
            raise self._diverged("its loss is no number")
        self._images.grad = self._spectrum.weigh(gradient) if settings.spectrum > 0 else gradient
        self._optimizer.step()
        if settings.displayable:
            with torch.no_grad():
                torch.clamp(self._images, *self._range, out=self._images)
        # Over a tenth of the steps so far, at most: the first images are far from what is to come.
        self._average.lerp_(self._images.detach(), 1 - min(settings.average, (1 + number) / (10 + number)))
        if not self._images.detach().abs().max() < _LARGEST_PIXEL:
            raise self._diverged(f"its pixels are further than {_LARGEST_PIXEL:,.0f} deviations from their mean")
        return value

    def _compare(self, number: int, generator: torch.Generator) -> tuple[float, Tensor]:
        """What the step's network makes of the images and of real ones: the loss, and its gradient."""
        settings = self._settings
        trained = self._prepare_observer(number)
        real = self._references.batch(settings.real_per_class, number).to(self._device)
        images, real = siamese_augment(self._images, real, generator)
        if settings.objective_at(number) == "regression":
            loss, embedding = ridge_regression_loss(self._embed, images, real, self._spec.num_classes, settings.ridge)
        elif settings.attention > 0:
            loss, embedding = distance_of_attention(self._observer, images, real, self._spec.num_classes, settings.attention)
        else:
            loss, embedding = mean_embedding_distance(self._embed, images, real, self._spec.num_classes)
        if trained and settings.recognition > 0:
            loss = loss + settings.recognition * misclassification(self._observer, embedding, self._labels)
        return loss.item(), torch.autograd.grad(loss, self._images)[0]

    def _prepare_observer(self, number: int) -> bool:
        """Give the observer the parameters that a step looks through, by the seed and the step alone; whether trained."""
        generator = generator_for("cpu", "observer", self._settings.seed, number)
        trained = torch.rand(1, generator=generator).item() < self._settings.trained_share
        fresh = self._network("observer", self._settings.seed, number)
        load_flat_parameters(self._observer, self._experts.place(generator) if trained else flat_parameters(fresh))
        return trained

    def _network(self, *seed: str | int) -> ConvNet:
        spec = self._spec
        return build_network(OFFICIAL_NETWORK, spec.num_classes, spec.image_size, seed=network_seed(*seed))

    def _prepared(self) -> bool:
        """Whether what the next step needs besides the images is there."""
        step = self._state.step
        experts = self._experts.ready or not self._settings.needs_experts_at(step)
        return experts and (self._state.student_rate is not None or not self._follows(step))

    def _prepare(self, stop: StopRequest) -> None:
        """See to experts and, for students, to a rate that they begin with; asked to stop, it returns with less than that."""
        with shortage_explained(self._shortage):
            self._experts.prepare(stop)
            if self._experts.ready and self._follows(self._state.step) and self._state.student_rate is None:
                generator = generator_for("cpu", "first rate", self._settings.seed)
                self._state.student_rate = self._student.first_rate(
                    self._images, self._experts, generator, stop=stop, progress=self._progress
                )

    def _follow(self, generator: torch.Generator) -> tuple[float, Tensor]:
        """How far a student of the images stays behind an expert: the distance, and its scaled gradient."""
        state = self._state
        followed = self._student.follow(self._images, *self._experts.stretch(generator), state.student_rate, generator)
        if not math.isfinite(followed.best_rate):
            raise self._diverged("its gradients are no numbers")
        state.student_rate += self._settings.student.rate_share * (followed.best_rate - state.student_rate)
        return followed.distance, _DISTANCE_AS_MEANS * self._student.images_at_once * followed.gradient

    def _judge(self, stop: StopRequest) -> None:
        """Train one network on the present set and test it on the held-out images; the same network each time."""
        settings = self._settings
        seed = network_seed("judge", settings.seed)
        network = self._network("judge", settings.seed).to(self._device)
        generator = torch.Generator().manual_seed(seed)
        training = TrainingSettings(settings.check_epochs)
        run = TrainingRun(network, self._average.clone(), self._labels, training, generator)
        while not run.finished:
            if stop:
                return
            run.epoch()
            self._progress(Progress("Judging by held-out images", run.epochs_done, training.epochs, "epochs"))
        network.eval()
        correct = predict(run.engine, self._held_out, self._device) == self._held_out.labels
        self._keep()
        self._state.judge(correct.float().mean().item())

    def _diverged(self, how: str) -> ComputeError:
        return ComputeError(
            f"The refinement diverged at step {self._state.step + 1}: {how}.",
            f"The best set, of step {self._state.best.step}, was written. Refine it on with a smaller --lr and another "
            "--run, or start over with --fresh.",
        )

    def _tell(self, loss: float, limits: Limits) -> None:
        state = self._state
        figures = {"loss": loss, "accuracy": state.best.accuracy}
        if limits.seconds is None:
            self._progress(Progress("Refining", state.step, limits.steps, "steps", figures))
        else:
            figures["step"] = state.step
            self._progress(Progress("Refining", min(state.seconds, limits.seconds), limits.seconds, "s", figures))

    def _save(self) -> None:
        self._keep()
        self._state.save()

    def _keep(self) -> None:
        """Bring the state up to what is on the device."""
        self._state.images = self._images.detach().cpu().clone()
        self._state.average = self._average.cpu().clone()
        self._state.velocity = self._optimizer.state[self._images]["momentum_buffer"].cpu().clone()


def _write(state: RefinementState, settings: RefineSettings, spec: DatasetSpec, out: Path) -> SetFiles:
    """The best set so far, with how it was made; the set as it was where that is the best."""
    if state.gained_nothing():
        return state.give_back(out)
    steps = (0, state.best.step - 1) if state.best.step > 0 else ()
    went_by = dict.fromkeys(METHODS[settings.objective_at(step)] for step in steps)
    made_by = {
        "kind": KIND_REFINED,
        "method": ", then ".join(went_by) or "kept within what a picture holds",
        "refined_steps": state.best.step,
        "held_out_accuracy": state.best.accuracy,
        "refined_from": state.start_sha256,
        "before": read_provenance(state.before.tensor),
        "dataset_sha256": state.dataset_sha256,
        **state.settings,
        "versions": versions(),
    }
    return save_set(out, state.best_images, spec, class_titles(spec.name), made_by)
