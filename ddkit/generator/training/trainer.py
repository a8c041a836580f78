"""The training loop of one stage: the same for the autoencoder, the denoiser and fine-tuning.

A stage says what a step's global batch is, as a pure function of (seed, step), and what its loss is. The engine
does the rest: processes, precision, accumulation, averaged weights, checkpoints, stopping and going on.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ddkit.errors import ComputeError, InterruptedRunError, UsageError
from ddkit.generator.compiling import compiled
from ddkit.generator.presets import OptimiserConfig
from ddkit.generator.training.checkpoints import Checkpoint, list_checkpoints, load_latest, save_checkpoint
from ddkit.runtime.device import shortage_explained
from ddkit.runtime.interrupt import StopRequest, stop_requests
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.runtime.threads import cores_for, side_by_side

log = logging.getLogger(__name__)

# Images, latents and targets have a variance of about one or two: who predicts nothing at all errs no more than that.
_LARGEST_ERROR = 20.0


class Stage(Protocol):
    """What the engine trains.

    name: of its checkpoints and records. loss: a module that holds `network` and maps a part of a batch to the mean
    loss and the figures worth recording, all scalars. memory: what the loss keeps from step to step beside the network.
    ema_width, ema_decay: of the averaged weights, as GeneratorConfig has them.
    """

    name: str
    task: str  # what progress calls it
    figures: tuple[str, ...]  # what the values after the loss are called in records; the first is a squared error
    remedy: str  # what to do where the loss diverges
    network: nn.Module
    loss: nn.Module
    memory: nn.Module | None
    optimizer: OptimiserConfig
    ema_width: float
    ema_decay: float | None

    def draw(self, step: int, device: torch.device) -> dict[str, Tensor]:
        """The global batch of that step: tensors whose first dimension is the batch."""


@dataclass(frozen=True)
class Limits:
    """When a stage ends, and how often it is saved.

    steps: in all. seconds: of training in all, resumed or not; None for no limit.
    """

    steps: int
    seconds: float | None = None
    save_every_seconds: float = 300.0
    record_every: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1 or self.record_every < 1:
            raise UsageError("A training needs at least one step.")


@dataclass(frozen=True)
class StepRecord:
    """What happened up to a step. loss, figures: means since the record before. images: seen so far."""

    stage: str
    step: int
    loss: float
    figures: Mapping[str, float]
    rate: float
    images: int
    seconds: float


class Trainer:
    """Trains one stage. Make it, then `run()`; `ema_weights()` is the result.

    folder: of checkpoints. on_record: called with every StepRecord, on the main process only.
    Set `on_save` to what is to happen after a checkpoint was written, on the main process only.
    """

    def __init__(
        self,
        stage: Stage,
        accelerator: Accelerator,
        folder: Path,
        limits: Limits,
        *,
        compile_network: bool = False,
        progress: Listener = ignore,
        on_record: Callable[[StepRecord], None] = lambda record: None,
    ) -> None:
        self.stage, self.accelerator, self.folder, self.limits = stage, accelerator, folder, limits
        self.on_save: Callable[[], None] = lambda: None
        self._progress, self._on_record = progress, on_record
        self._visits: list[tuple[int, Callable[[], None]]] = []
        self.step, self.finished = 0, False
        self._seconds_before, self._began = 0.0, time.monotonic()
        require_even_parts(stage.optimizer, accelerator.num_processes)
        stage.network.to(accelerator.device)
        self._parameters = [parameter for parameter in stage.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            self._parameters,
            lr=stage.optimizer.learning_rate,
            betas=(0.9, stage.optimizer.beta2),
            weight_decay=stage.optimizer.weight_decay,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self._loss, self._optimizer = accelerator.prepare(stage.loss, optimizer)
        if compile_network:
            self._loss = compiled(self._loss)
        self._compiling = compile_network  # until the first step
        self._workers = workers_for(stage, accelerator.device, accelerator.num_processes)
        self._ema = averaging(self._parameters, stage.ema_width, stage.ema_decay)
        self._resume()

    def run(self) -> None:
        """Train until a limit is reached. Raises InterruptedRunError or ComputeError, the state saved as far as it is good."""
        self._began = time.monotonic()
        with stop_requests() as stop:
            for record in self._steps(stop):
                if self.accelerator.is_main_process:
                    self._on_record(record)
                    self._show(record)
            if not self.finished:
                self.finished = True
                self.save()
            # Asked for during the last step, it would be forgotten, and the next stage begin.
            (stopping,) = self._agreed(bool(stop))
            if stopping:
                raise self._interrupted()

    @property
    def seconds(self) -> float:
        """Spent on this stage by all runs so far, saving and visits included."""
        return self._seconds_before + time.monotonic() - self._began

    def every(self, steps: int, visit: Callable[[], None]) -> None:
        """Call `visit` after every `steps` steps, on the main process only."""
        self._visits.append((steps, visit))

    def save(self) -> None:
        """Write a checkpoint now."""
        if self.accelerator.is_main_process:
            save_checkpoint(self.folder, self.stage.name, self._checkpoint())
            self.on_save()
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """The stage's network with its averaged weights, which are put back afterwards."""
        self._ema.store(self._parameters)
        self._ema.copy_to(self._parameters)
        try:
            yield self.stage.network
        finally:
            self._ema.restore(self._parameters)

    def _steps(self, stop: StopRequest) -> Iterator[StepRecord]:
        """Train, yielding a record every so often and before every save and visit, so that no broken state is kept."""
        saved = time.monotonic()
        losses: list[Tensor] = []
        # However short the time, a stage that was begun has taken a step, or there would be nothing to go on from.
        over = self.finished or self.step >= self.limits.steps or (self.step > 0 and self._out_of_time())
        while not over:
            with shortage_explained(self._shortage):
                losses.append(self._train_step())
            self.step += 1
            stopping, out_of_time, save_due = self._agreed(
                bool(stop), self._out_of_time(), time.monotonic() - saved > self.limits.save_every_seconds
            )
            over = out_of_time or self.step >= self.limits.steps
            visited = any(self.step % steps == 0 for steps, _ in self._visits)
            if over or stopping or save_due or visited or self.step % self.limits.record_every == 0:
                yield self._record(losses)
                losses = []
            if stopping or save_due:  # before visits, which may take minutes
                self.save()
                saved = time.monotonic()
            if stopping and not over:
                raise self._interrupted()
            self._visit()

    def _interrupted(self) -> InterruptedRunError:
        return InterruptedRunError(
            f"Stopped after {self.step} steps of {self.stage.name} training; all of it is saved.",
            "Run the same command again, without --fresh, to go on.",
        )

    def _visit(self) -> None:
        for steps, visit in self._visits:
            if self.step % steps == 0:
                if self.accelerator.is_main_process:
                    visit()
                self.accelerator.wait_for_everyone()

    def _shortage(self) -> ComputeError:
        return ComputeError(
            f"Memory is short for {self.stage.name} training with batches of {self.stage.optimizer.batch_size} images.",
            "Try --accumulation 2 or more, a smaller --batch-size, or a smaller --preset.",
        )

    def _train_step(self) -> Tensor:
        """One optimizer step; returns this process's mean loss and figures and the gradient's length, (2 + figures,)
        float32 on the device."""
        rate = self.stage.optimizer.rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        parts = self._own_parts(self.stage.draw(self.step, self.accelerator.device))
        values = self._backward(parts) if self._workers == 1 else self._backward_side_by_side(parts)
        length = self.accelerator.clip_grad_norm_(self._parameters, self.stage.optimizer.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._ema.step(self._parameters)
        return torch.cat([torch.stack(values).mean(dim=0), length.detach().float().view(1)])

    def _backward(self, parts: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Leave the gradient of the mean loss in the parameters; returns each part's loss and figures."""
        values = []
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self._loss):
                loss, *figures = self._loss(**part)
                self.accelerator.backward(loss / len(parts))
            values.append(_detached(loss, *figures))
        return values

    def _backward_side_by_side(self, parts: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """The same, every part cut into one for each core. Gradients are added in order, so that sums are the same again."""
        pieces = [piece for part in parts for piece in cut(part, self._workers)]

        def work(piece: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            loss, *figures = self._loss(**piece)
            gradients = torch.autograd.grad(loss / len(pieces), self._parameters, allow_unused=True)
            return _detached(loss, *figures), gradients

        # What compiles, compiles once; the pieces after the first find it done.
        alone = 1 if self._compiling else 0
        self._compiling = False
        values = []
        for group in (pieces[:alone], pieces[alone:]):
            for value, gradients in side_by_side(work, group, self._workers):
                values.append(value)
                _add_gradients(self._parameters, gradients)
        return values

    def _own_parts(self, batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """This process's share of the global batch, in as many parts as the step is computed in."""
        processes, own = self.accelerator.num_processes, self.accelerator.process_index
        size = self.stage.optimizer.batch_size // (processes * self.stage.optimizer.accumulation)
        starts = [(own * self.stage.optimizer.accumulation + k) * size for k in range(self.stage.optimizer.accumulation)]
        return [{name: values[start : start + size] for name, values in batch.items()} for start in starts]

    def _record(self, losses: list[Tensor]) -> StepRecord:
        """The means since the last record over all processes. Raises ComputeError where the training diverges."""
        means = torch.stack(losses).mean(dim=0)
        loss, *figures, length = self.accelerator.reduce(means, reduction="mean").tolist()
        if not math.isfinite(loss):
            raise self._diverged("loss", "no number")
        if figures[0] > _LARGEST_ERROR:
            raise self._diverged("loss", "too large")
        # Clipped, a gradient of infinite length is none at all, and training goes on and learns nothing. float16's scaler
        # meets such ones by design and leaves the step out.
        if self.accelerator.scaler is None and not math.isfinite(length):
            raise self._diverged("gradient", "no number")
        # The loss is of the weights before the step, and what is kept are those after it.
        if not torch.stack(torch._foreach_norm(self._parameters)).isfinite().all():
            raise self._diverged("result", "no number")
        return StepRecord(
            stage=self.stage.name,
            step=self.step,
            loss=loss,
            figures=dict(zip(self.stage.figures, figures, strict=True)),
            rate=self.stage.optimizer.rate(self.step - 1),
            images=self.step * self.stage.optimizer.batch_size,
            seconds=self.seconds,
        )

    def _out_of_time(self) -> bool:
        return self.limits.seconds is not None and self.seconds >= self.limits.seconds

    def _agreed(self, *wishes: bool) -> tuple[bool, ...]:
        """For each wish whether any process has it: all must do the same after the same step."""
        if self.accelerator.num_processes == 1:
            return wishes
        votes = torch.tensor(wishes, dtype=torch.float32, device=self.accelerator.device)
        return tuple((self.accelerator.reduce(votes, reduction="sum") > 0).tolist())

    def _show(self, record: StepRecord) -> None:
        figures = {"loss": record.loss, **record.figures}
        if self.limits.seconds is None:
            self._progress(Progress(self.stage.task, record.step, self.limits.steps, "steps", figures))
        else:
            seconds = min(record.seconds, self.limits.seconds)
            figures = {"step": record.step, **figures}
            self._progress(Progress(self.stage.task, round(seconds), round(self.limits.seconds), "s", figures))

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            step=self.step,
            seconds=self.seconds,
            finished=self.finished,
            network=self.stage.network.state_dict(),
            ema=self._ema.state_dict(),
            optimizer=self._optimizer.state_dict(),
            memory={} if self.stage.memory is None else self.stage.memory.state_dict(),
            scaler={} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        )

    def _resume(self) -> None:
        checkpoint = load_latest(self.folder, self.stage.name)
        if checkpoint is None:
            return
        self.stage.network.load_state_dict(checkpoint.network)
        self._ema.load_state_dict(checkpoint.ema)
        self._ema.to(self.accelerator.device)
        self._optimizer.load_state_dict(checkpoint.optimizer)
        if self.stage.memory is not None:
            self.stage.memory.load_state_dict(checkpoint.memory)
        if self.accelerator.scaler is not None and checkpoint.scaler:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)
        self.step, self._seconds_before, self._began = checkpoint.step, checkpoint.seconds, time.monotonic()
        # Limits may have grown since.
        self.finished = checkpoint.finished and (self.step >= self.limits.steps or self._out_of_time())
        log.info("Going on with %s after %d steps", self.stage.name, self.step)

    def _diverged(self, what: str, how: str) -> ComputeError:
        good = list_checkpoints(self.folder, self.stage.name)
        remedy = f"The last good state is {good[-1]}. " if good else "There is no checkpoint yet. "
        return ComputeError(
            f"The {what} of {self.stage.name} training is {how} after step {self.step}.",
            remedy + self.stage.remedy,
        )


def require_even_parts(optimizer: OptimiserConfig, processes: int) -> None:
    """Raise UsageError where a batch cannot be split evenly among processes and accumulated parts."""
    parts = processes * optimizer.accumulation
    if optimizer.batch_size % parts:
        raise UsageError(
            f"A batch of {optimizer.batch_size} cannot be split evenly into {parts} parts "
            f"({processes} processes, {optimizer.accumulation} accumulated).",
            "Launch a number of processes that divides it, or choose another --batch-size or --accumulation.",
        )


def workers_for(stage: Stage, device: torch.device, processes: int = 1) -> int:
    """How many cores share a step: as many as cut a part into equal ones.

    What is kept from step to step wants a part as a whole, and processes share already.
    """
    if processes > 1 or stage.memory is not None:
        return 1
    part = stage.optimizer.batch_size // stage.optimizer.accumulation
    return max(workers for workers in range(1, cores_for(device) + 1) if part % workers == 0)


def _detached(*values: Tensor) -> Tensor:
    """Scalars as (n,) float32."""
    return torch.stack([value.detach().float() for value in values])


def cut(part: Mapping[str, Tensor], pieces: int) -> list[dict[str, Tensor]]:
    """A part as that many equal ones."""
    cut = {name: values.chunk(pieces) for name, values in part.items()}
    return [{name: values[k] for name, values in cut.items()} for k in range(pieces)]


def _add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            # In the parameter's own layout: those of linear layers come transposed, and fused AdamW takes memory as it lies.
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        else:
            parameter.grad.add_(gradient)


def averaging(parameters: Sequence[nn.Parameter], width: float, decay: float | None) -> EMAModel:
    """Averaged weights: with the same decay at every step, or where that is None as `power_ema` has them."""
    if decay is None:
        return power_ema(parameters, width)
    # diffusers would begin with a lower decay, which is a way to forget initial weights that are worth nothing.
    return EMAModel(parameters, decay=decay, min_decay=decay, foreach=True)


def power_ema(parameters: Sequence[nn.Parameter], width: float) -> EMAModel:
    """Averaged weights whose profile is a power of the step, so that it suits any length of training.

    width: the profile's standard deviation as a share of the training so far, sigma_rel of Karras et al. 2024
    (arXiv 2312.02696, equations 3 and 126): sigma_rel = sqrt((g + 1) / ((g + 2)^2 (g + 3))) is solved for g.
    diffusers' decay 1 - 1 / (1 + step / inv_gamma) is that profile where inv_gamma = g + 1.
    """
    exponent = _ema_exponent(width)
    return EMAModel(parameters, decay=1.0, use_ema_warmup=True, inv_gamma=exponent + 1, power=1.0, foreach=True)


def _ema_exponent(width: float) -> float:
    """The g > 0 of `power_ema`, by bisection: the width falls as g grows."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        of_middle = math.sqrt((middle + 1) / ((middle + 2) ** 2 * (middle + 3)))
        low, high = (middle, high) if of_middle > width else (low, middle)
    return low
