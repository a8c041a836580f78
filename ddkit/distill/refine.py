"""Refinement of a distilled set: its pixels are optimized so that the challenge's network learns more from it.

Everything that a step draws depends on the seed and the step's number alone, so that an interrupted refinement resumes
as if it had not been interrupted, on a CPU to the same bits.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ddkit.challenge import NETWORK_WIDTH, DatasetSpec
from ddkit.checks.check import require_acceptable
from ddkit.data.images import normalize
from ddkit.data.prepare import open_dataset
from ddkit.data.store import train_sha256
from ddkit.distill.experts import Experts
from ddkit.distill.holdout import TrainHoldout
from ddkit.distill.matching import dm_loss, frepo_loss, siamese_augment
from ddkit.distill.pool import OnlinePool, pool_memory, require_memory
from ddkit.distill.settings import OBJECTIVES, RefineLimits, RefineSettings
from ddkit.distill.spectrum import Spectrum
from ddkit.distill.state import (
    STATE_FILE,
    RefinementState,
    is_kept_copy,
    original_set,
    refuse_kept_copy,
    require_no_loss,
    start_over,
)
from ddkit.distill.student import Student
from ddkit.errors import BadFileError, ComputeError, InterruptedRunError, counted
from ddkit.evaluation.rounds import predict
from ddkit.network.autotune import choose_plan
from ddkit.network.embedding import build_embedder
from ddkit.network.parameters import flat_parameters, load_flat_parameters, random_network
from ddkit.network.training import TrainingRun, TrainingSettings
from ddkit.runtime.device import free_memory, larger_gpu, resolve_device, shortage_explained
from ddkit.runtime.environment import versions
from ddkit.runtime.files import exclusive, require_ending
from ddkit.runtime.interrupt import StopRequest, stop_requests
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.runtime.records import read_record
from ddkit.runtime.seeds import generator_for, network_seed
from ddkit.sets.distilled import (
    KIND_REFINED,
    DistilledSet,
    SetFiles,
    class_labels,
    dataset_of,
    read_provenance,
    read_set,
    require_nothing_else,
    save_set,
)

_PIXELS_OF_SPECTRUM = 2000 * 32**2  # so many images of side 32 determine variances to 3 %; of larger ones fewer do
_LARGEST_PIXEL = 1000.0  # in standard deviations of the dataset's pixels; refined sets that score well stay within ten
# For the memory that a refinement needs: floats of each kind that exist at a time.
_COPIES_OF_IMAGES, _COPIES_OF_REAL, _COPIES_OF_KERNEL = 12, 3, 8
# One learning rate then serves "mtt" as well; measured on ten and on all hundred classes of CIFAR-100.
_MTT_SCALE = 10
_VALIDATING = "Validating on held-out images"
_LARGEST_MAPS = 6 * 2**27  # as embedders compute parts of a batch where there is no engine


@dataclass(frozen=True)
class Refined:
    """The result of a refinement.

    files, before: the refined set and the original. accuracy, accuracy_before: their validation accuracies on
    held-out training images, fractions. diverged: networks of the pool that diverged and were replaced.
    earlier_steps: those of the steps that were done before this call.
    """

    files: SetFiles
    before: SetFiles
    steps: int
    best_step: int
    accuracy: float
    accuracy_before: float
    seconds: float
    diverged: int
    earlier_steps: int = 0

    @property
    def gain(self) -> str:
        """Both accuracies in words."""
        if self.best_step == 0:
            steps = counted(self.steps, "step", "steps")
            return f"{self.accuracy_before:.2%} before, and no better in {steps}, so that the original set is kept"
        return f"{self.accuracy_before:.2%} before, {self.accuracy:.2%} at step {self.best_step:,} of {self.steps:,}"


def refine(
    path: Path,
    dataset: str | None,
    settings: RefineSettings,
    limits: RefineLimits,
    folder: Path,
    *,
    out: Path | None = None,
    fresh: bool = False,
    ignore_codes: Collection[str] = (),
    device: str = "cpu",
    save_every_seconds: float = 120.0,
    progress: Listener = ignore,
) -> Refined:
    """Refine the set at `path`, resuming from the state in `folder`, and write the latest version that validates within
    `RefineSettings.val_margin` of the best.

    dataset: its name; None takes it from the set's provenance or file name.
    folder: keeps the original set (before.pt, .json, .png), the state and records.jsonl. out: `path` when None.
    fresh: start over from the original set. The refined set at `out` is kept in the folder as refined.pt.
    ignore_codes: codes of findings of `check` that are not to stop the refinement.
    A set that does not improve is left as it is.
    Raises InvalidSubmissionError for a set that `check` refuses, and what `open_dataset` and `save_set` raise.
    Raises UsageError if `out` does not end in .pt or holds the result of another refinement or a set that ddkit did not make,
    or if a JSON or a picture of something else has a name that it needs; if `path` or `out` is a copy that the folder keeps;
    if the folder belongs to another set, other settings or other real images; and while another process refines in it.
    After writing the best set so far, raises InterruptedRunError once asked to stop, ComputeError if the refinement diverges
    or memory is short, and BadFileError if the system refuses a file.
    """
    target = out or path
    require_ending(target, ".pt")
    if out is not None:
        require_nothing_else(out)
    refuse_kept_copy(folder, path, target)
    chosen, dataset = resolve_device(device), dataset_of(path, dataset)
    before = read_set(original_set(path, folder) if fresh else path, dataset)
    spec = before.spec
    real = open_dataset(spec.name, "train", progress=progress)
    holdout = TrainHoldout(real, spec, held_out=settings.held_out, seed=settings.seed, device=chosen)
    _require_memory(before, settings, chosen)  # of what the real images leave
    with exclusive(folder, "refines", elsewhere="--run"):
        if fresh:
            start_over(path, folder, out)
        state = _begin_or_resume(before, path, settings, folder, ignore_codes)
        earlier = state.step
        if target.exists() and target.resolve() != path.resolve() and not (state.made(target) or is_kept_copy(target, folder)):
            require_no_loss(target)
        try:
            kept = state.before.tensor
            original = read_set(kept, spec.name).images if kept.is_file() else None  # somebody may have deleted it
            with Refinement(state, original, settings, holdout, chosen, progress) as refinement:
                refinement.run(limits, save_every_seconds)
        except (InterruptedRunError, ComputeError, BadFileError):
            if state.validations:
                _write(state, settings, spec, target)
            raise
        files = _write(state, settings, spec, target)
    best, first, diverged = state.best, state.first, int(state.pool.get("diverged", 0))
    return Refined(files, state.before, state.step, best.step, best.accuracy, first.accuracy, state.seconds, diverged, earlier)


def _require_memory(distilled: DistilledSet, settings: RefineSettings, device: torch.device) -> None:
    """Raise ComputeError where the refinement will not fit, before anything is computed or discarded."""
    spec, free = distilled.spec, free_memory(device)
    if settings.objective == "frepo":
        require_memory(settings.pool, spec, free)
    needed = memory_needed(spec, distilled.ipc, settings, device)
    if needed > free:
        raise ComputeError(
            f"Refining {len(distilled.images):,} images of {spec.name} needs about {needed / 2**30:,.1f} GiB of memory, and "
            f"{free / 2**30:,.1f} GiB are free.",
            "Close other programs, use a smaller --batch-real, or refine a set with fewer images per class."
            + larger_gpu(device, needed),
        )


def recorded_settings(folder: Path) -> RefineSettings | None:
    """The settings of the refinement in `folder`, None without one. Raises BadFileError where they cannot be read."""
    if not (folder / STATE_FILE).exists():
        return None
    recorded = RefinementState.read(folder).settings
    try:
        return read_record(RefineSettings, recorded)
    except BadFileError as error:
        raise BadFileError(
            f"{folder / STATE_FILE} has settings of another version of ddkit: {error.message}",
            "Start over with --fresh, or refine in another folder with --run.",
        ) from error


def _begin_or_resume(
    distilled: DistilledSet, path: Path, settings: RefineSettings, folder: Path, ignore_codes: Collection[str]
) -> RefinementState:
    spec, dataset_sha256 = distilled.spec, train_sha256(distilled.spec.name)
    if (folder / STATE_FILE).exists():
        state = RefinementState.read(folder)
        state.require(path, dataclasses.asdict(settings), dataset_sha256)
        return state
    require_acceptable(distilled, ignore_codes=ignore_codes)
    images = distilled.images.clamp(*_displayable_range(spec)) if settings.displayable else distilled.images
    return RefinementState.begin(path, images, folder, dataclasses.asdict(settings), dataset_sha256)


def _displayable_range(spec: DatasetSpec) -> Tensor:
    """(2, 3, 1, 1): the smallest and the largest values of a normalized picture."""
    return normalize(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1), spec)


def memory_needed(spec: DatasetSpec, ipc: int, settings: RefineSettings, device: torch.device) -> int:
    """Bytes that a refinement needs, about: maps and embeddings of the network, images, kernel and pool."""
    images, real, side = spec.num_classes * ipc, spec.num_classes * settings.batch_real, spec.image_size
    floats = 3 * side**2 * (_COPIES_OF_IMAGES * images + _COPIES_OF_REAL * real)
    floats += NETWORK_WIDTH * (side // 8) ** 2 * (3 * images + real)
    if settings.objective == "frepo":
        floats += _COPIES_OF_KERNEL * images**2
    if device.type == "cpu":
        floats += NETWORK_WIDTH * side**2 * 5 * images // 16  # the maps of blocks 2 and 3
    else:
        floats += min(_LARGEST_MAPS, 6 * NETWORK_WIDTH * side**2 * max(images, real))
    pool = pool_memory(settings.pool, spec) if settings.objective == "frepo" else 0
    return 4 * floats + pool


class Refinement:
    """The loop over steps. A context manager, as a thread prepares the next step.

    original: (N, 3, S, S) the set before its first step, whose real images do not count in validation;
    None where it is not known.
    """

    def __init__(
        self,
        state: RefinementState,
        original: Tensor | None,
        settings: RefineSettings,
        holdout: TrainHoldout,
        device: torch.device,
        progress: Listener,
    ) -> None:
        self._state, self._settings = state, settings
        self._holdout, self._spec = holdout, holdout.spec
        self._device, self._progress = device, progress
        self._images, self._velocity, self._average = (
            tensor.to(device, copy=True) for tensor in (state.images, state.velocity, state.average)
        )
        ipc = len(state.images) // self._spec.num_classes
        self._labels = class_labels(self._spec.num_classes, ipc).to(device)
        # One network for all steps, as what computes with it keeps memory that is costly to allocate each time.
        self._observer = random_network(self._spec, "observer", settings.seed).to(device)
        if state.step == 0 and not state.validations:
            state.precision = choose_plan(self._observer, settings.precision, len(self._labels)).precision
        self._embed = build_embedder(self._observer, len(self._labels), state.precision)
        self._pool = self._build_pool() if state.pool else None
        if settings.objective == "mtt":
            self._student = Student(self._spec, ipc, settings.student, state.precision, device)
            self._experts = Experts(
                holdout, state.dataset_sha256, settings.experts,
                seed=settings.seed, precision=state.precision, device=device, progress=progress,
            )  # fmt: skip
        count = max(1, _PIXELS_OF_SPECTRUM // self._spec.image_size**2)
        self._spectrum = Spectrum(holdout.sample(count).to(device), settings.spectrum) if settings.spectrum else None
        self._range = _displayable_range(self._spec).to(device)
        self._held_out = holdout.held_out(original)
        self._thread = ThreadPoolExecutor(1, "ddkit-next-step")
        self._next: tuple[int, Future[tuple[Tensor, Tensor]]] | None = None

    def __enter__(self) -> Refinement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def run(self, limits: RefineLimits, save_every_seconds: float) -> None:
        """Take steps and validate until a limit is reached and the final images are validated."""
        state, saved = self._state, time.monotonic()
        with stop_requests() as stop:
            while True:
                finished = limits.progress(state.step, state.seconds) >= 1
                validating = not state.validated and (finished or state.step % self._settings.val_every == 0)
                if validating:
                    with shortage_explained(self._shortage):
                        self.validate(stop)
                elif finished:
                    return
                elif self._settings.objective_at(state.step) == "mtt" and (not self._experts.ready or state.student_lr is None):
                    self._save()
                    self.prepare_mtt(stop)
                else:
                    self.take_step(limits)
                stopping = bool(stop)
                if stopping or validating or time.monotonic() - saved >= save_every_seconds:
                    self._save()
                    saved = time.monotonic()
                if stopping:
                    raise InterruptedRunError(
                        f"Interrupted after step {state.step}.", "Run the same command again, without --fresh, to resume."
                    )

    def take_step(self, limits: RefineLimits) -> None:
        """One step on the pixels, timed and reported."""
        state, began = self._state, time.monotonic()
        objective, used = self._settings.objective_at(state.step), limits.progress(state.step, state.seconds)
        with shortage_explained(self._shortage):
            if objective == "mtt":
                loss = self._mtt_step(used)
            else:
                loss = self._feature_step(objective, limits, used)
        state.step += 1
        state.seconds += time.monotonic() - began
        self._report(loss, limits)

    def _feature_step(self, objective: str, limits: RefineLimits, used: float) -> float:
        """A step of "dm" or "frepo" through one network; returns the loss before it. The host waits once."""
        settings, step = self._settings, self._state.step
        if self._pool is None and settings.uses_pool_at(step, limits.time_used(self._state.seconds)):
            self._state.pool_start, self._pool = step, self._build_pool()
        draws = generator_for("cpu", "pool", settings.seed, step)
        number = self._pool.draw(draws) if self._pool else 0
        rows, parameters = self._inputs(step)
        if self._pool:
            self._pool.load_into(self._observer, number)
        else:
            load_flat_parameters(self._observer, parameters)
        images = self._images.detach().requires_grad_()
        generator = generator_for("cpu", "refine", settings.seed, step)
        augmented, real = siamese_augment(images, self._holdout.images(rows), generator)
        if objective == "dm":
            loss = dm_loss(self._embed, augmented, real, self._spec.num_classes)
        else:
            loss = frepo_loss(self._embed, augmented, real, self._spec.num_classes, settings.krr_lambda)
        (gradient,) = torch.autograd.grad(loss, images)
        self._update_pixels(gradient, used)
        figures = [loss.detach(), self._images.abs().max()]
        if self._pool:
            figures.append(self._pool.update(number, self._images, draws))
        value, largest_pixel, *largest_weight = torch.stack(figures).tolist()
        self._refuse_divergence(value, largest_pixel)
        if self._pool:
            self._pool.retire(number, step, *largest_weight)
        return value

    def _mtt_step(self, used: float) -> float:
        """A step of "mtt"; returns the distance before it."""
        state, settings = self._state, self._settings
        generator = generator_for("cpu", "refine", settings.seed, state.step)
        segment = self._experts.sample_segment(generator)
        assert state.student_lr is not None, "prepare_mtt comes first"
        match = self._student.match(self._images, *segment, state.student_lr, generator)
        if not math.isfinite(match.best_lr) or match.gradient is None:
            raise self._diverged("its gradients are not finite")
        state.student_lr += settings.student.lr_momentum * (match.best_lr - state.student_lr)
        # For each image of a student's step, over which its loss is a mean.
        self._update_pixels(_MTT_SCALE * self._student.images_at_once * match.gradient, used)
        self._refuse_divergence(match.distance, self._images.abs().max().item())
        return match.distance

    def _update_pixels(self, gradient: Tensor, used: float) -> None:
        """One step of SGD, and of the moving average of the images. used: share of the limit."""
        settings, step = self._settings, self._state.step
        decay = settings.final_rate + (1 - settings.final_rate) * (1 + math.cos(math.pi * min(used, 1))) / 2
        self._velocity.mul_(settings.momentum).add_(self._spectrum.weigh(gradient) if self._spectrum else gradient)
        self._images.add_(self._velocity, alpha=-settings.learning_rate * decay)
        if settings.displayable:
            torch.clamp(self._images, *self._range, out=self._images)
        # At most over a tenth of the steps so far, as the first images are far from the later ones.
        self._average.lerp_(self._images, 1 - min(settings.ema, (1 + step) / (10 + step)))

    def _inputs(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows of the step's real images and (P,) parameters of its random network; the next step's are begun."""
        if self._next is None or self._next[0] != step:
            self._next = step, self._thread.submit(self._draw_inputs, step)
        found = self._next[1].result()
        self._next = step + 1, self._thread.submit(self._draw_inputs, step + 1)
        return found

    def _draw_inputs(self, step: int) -> tuple[Tensor, Tensor]:
        rows = self._holdout.rows(self._settings.batch_real, step)
        if self._pool:
            parameters = torch.empty(0)  # the pool has its own
        else:
            parameters = flat_parameters(random_network(self._spec, "observer", self._settings.seed, step))
        return rows, parameters

    def _build_pool(self) -> OnlinePool:
        state = self._state
        return OnlinePool(
            self._settings.pool, self._spec, self._labels,
            seed=self._settings.seed, precision=state.precision, kept=state.pool or None,
        )  # fmt: skip

    def prepare_mtt(self, stop: StopRequest) -> None:
        """Train experts and find the student's learning rate. Returns early when asked to stop."""
        with shortage_explained(self._shortage):
            self._experts.prepare(stop)
            if self._experts.ready and self._state.student_lr is None:
                generator = generator_for("cpu", "first rate", self._settings.seed)
                self._state.student_lr = self._student.initial_lr(
                    self._images, self._experts, generator, stop=stop, progress=self._progress
                )

    def validate(self, stop: StopRequest) -> None:
        """Train a network on the present set and test it on the held-out images; the same random network each time."""
        settings = self._settings
        # The name of the seed is that of ddkit 0.1.0, so that its refinements resume comparably.
        network = random_network(self._spec, "judge", settings.seed).to(self._device)
        generator = torch.Generator().manual_seed(network_seed("judge", settings.seed))
        training = TrainingSettings(settings.val_epochs, precision=self._state.precision)
        run = TrainingRun(network, self._average.clone(), self._labels, training, generator)
        while not run.finished:
            if stop:
                return
            run.epoch()
            if not run.finished:
                self._progress(Progress(_VALIDATING, run.epochs_done, training.epochs, "epochs"))
        network.eval()
        correct = predict(run.engine, self._held_out, self._device) == self._held_out.labels
        run.close()
        accuracy = correct.float().mean().item()
        self._keep()
        self._state.record(accuracy)
        self._progress(Progress(_VALIDATING, training.epochs, training.epochs, "epochs", {"accuracy": accuracy}))

    def _refuse_divergence(self, loss: float, largest_pixel: float) -> None:
        if not math.isfinite(loss):
            raise self._diverged("its loss is not finite")
        if not largest_pixel < _LARGEST_PIXEL:
            raise self._diverged(f"its pixels are further than {_LARGEST_PIXEL:,.0f} standard deviations from the mean")

    def _diverged(self, how: str) -> ComputeError:
        return ComputeError(
            f"The refinement diverged at step {self._state.step + 1}: {how}.",
            f"The best set, of step {self._state.best.step}, was written. Refine it further with a smaller --lr and another "
            "--run, or start over with --fresh.",
        )

    def _shortage(self) -> ComputeError:
        classes, per_class = self._spec.num_classes, self._settings.batch_real
        again = "Close other programs that use it, and run the same command again"
        if self._settings.objective_at(self._state.step) == "mtt":
            return ComputeError(
                f"Out of memory: experts and students of {classes} classes do not fit.",
                f"{again}, or start over with --fresh and another --objective.",
            )
        return ComputeError(
            f"Out of memory: {per_class} real images x {classes} classes do not fit.",
            f"{again}, or start over with --fresh and --batch-real {max(1, per_class // 2)}.",
        )

    def _report(self, loss: float, limits: RefineLimits) -> None:
        state = self._state
        figures = {"loss": loss, "val": state.validations[-1].accuracy, "best": state.best.accuracy}
        if limits.seconds is None:
            self._progress(Progress("Refining", state.step, limits.steps, "steps", figures))
        else:
            figures["step"] = state.step
            self._progress(Progress("Refining", min(state.seconds, limits.seconds), limits.seconds, "s", figures))

    def _save(self) -> None:
        self._keep()
        self._state.save()

    def _keep(self) -> None:
        """Copy the tensors on the device into the state."""
        state = self._state
        state.images, state.velocity, state.average = (
            tensor.cpu().clone() for tensor in (self._images, self._velocity, self._average)
        )
        if self._pool:
            state.pool = self._pool.state()


def _write(state: RefinementState, settings: RefineSettings, spec: DatasetSpec, out: Path) -> SetFiles:
    """Write the best set so far and its provenance, or the original set if that is the best."""
    if state.gained_nothing():
        return state.give_back(out)
    steps = (0, state.best.step - 1) if state.best.step > 0 else ()
    methods = dict.fromkeys(OBJECTIVES[settings.objective_at(step)] for step in steps)
    provenance = {
        "kind": KIND_REFINED,
        "method": ", then ".join(methods) or "clamped to the range of pixels",
        "refined_steps": state.best.step,
        "held_out_accuracy": state.best.accuracy,
        "refined_from": state.start_sha256,
        "before": read_provenance(state.before.tensor),
        "dataset_sha256": state.dataset_sha256,
        "computed_in": state.precision,
        "pool_start": state.pool_start,
        "pool_networks_diverged": int(state.pool.get("diverged", 0)),
        **state.settings,
        "versions": versions(),
    }
    return save_set(out, state.best_images, spec, provenance)
