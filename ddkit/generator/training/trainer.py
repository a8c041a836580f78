"""The training loop of one stage: the same for the autoencoder, the denoiser and fine-tuning.

A stage defines a step's global batch, as a function of (seed, step), and the loss. The trainer handles the processes,
the precision, accumulation, averaged weights, checkpoints, and stopping and resuming.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ddkit.errors import ComputeError, InterruptedRunError, UsageError, counted
from ddkit.generator.compiling import compiled
from ddkit.generator.config import OptimizerConfig
from ddkit.generator.training.checkpoints import Checkpoint, list_checkpoints, load_latest, save_checkpoint
from ddkit.generator.training.stages import Stage
from ddkit.runtime.device import is_out_of_memory, shortage_explained
from ddkit.runtime.interrupt import StopRequest, stop_requests
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.runtime.threads import cores_for, parallel_map

log = logging.getLogger(__name__)

# Images, latents and targets have a variance of about one or two, so predicting zeros costs at most that much.
_LARGEST_ERROR = 20.0
_RECORD_EVERY, _RECORD_EVERY_ON_GPU = 10, 50  # steps; reading a loss makes the host wait for the GPU
_AGREE_EVERY_SECONDS, _AGREE_EVERY_STEPS = 1.0, 100  # several processes agree on stopping, at most so far apart


@dataclass(frozen=True)
class StepRecord:
    """The training up to a step. loss, figures: means since the previous record. images: images seen so far."""

    stage: str
    step: int
    loss: float
    figures: Mapping[str, float]
    rate: float
    images: int
    seconds: float


class Callback:
    """Functions that a Trainer calls on the main process. every: steps between two calls of `on_interval`; 0 for never."""

    every = 0

    def on_record(self, trainer: Trainer, record: StepRecord) -> None:
        """After every few steps."""

    def on_save(self, trainer: Trainer) -> None:
        """After a checkpoint was written."""

    def on_interval(self, trainer: Trainer) -> None:
        """After every `every` steps."""


class Trainer:
    """Trains one stage. Make it, then call `run`; `ema_weights` is the result.

    folder: where checkpoints go. steps: of the stage in all. seconds: of training in all, over every run of the stage;
    None for no limit. compile_after: use torch.compile after that many steps, as long as it works; None for never.
    Raises UsageError when a batch cannot be split among the processes.
    """

    def __init__(
        self,
        stage: Stage,
        accelerator: Accelerator,
        folder: Path,
        *,
        steps: int,
        seconds: float | None = None,
        save_every_seconds: float = 300.0,
        compile_after: int | None = None,
        progress: Listener = ignore,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.stage, self.accelerator, self.folder = stage, accelerator, folder
        self.steps, self.limit_seconds, self.save_every_seconds = steps, seconds, save_every_seconds
        self._progress, self._callbacks = progress, callbacks
        self.step = 0
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
        self._workers = workers_for(stage, accelerator.device, accelerator.num_processes)
        self._ema = averaging(self._parameters, stage.ema_width, stage.ema_decay)
        self._resume()
        self._agreed_step, self._agreed_at = self.step, time.monotonic()
        self._next_agreement = self.step + 1
        self._compile_at = None if compile_after is None else max(self.step, compile_after)
        self._compiling = False

    @property
    def seconds(self) -> float:
        """Seconds spent on this stage by all runs so far, including saving and callbacks."""
        return self._seconds_before + time.monotonic() - self._began

    def run(self) -> None:
        """Train until a limit is reached.

        Raises InterruptedRunError once asked to stop, with the state saved, and ComputeError when the training
        diverges or memory runs out.
        """
        self._began = time.monotonic()
        self._show({})  # even if nothing is left to do
        with stop_requests() as stop:
            for record in self._train(stop):
                if self.accelerator.is_main_process:
                    for callback in self._callbacks:
                        callback.on_record(self, record)
                self._show({"loss": record.loss, **record.figures})
            # A request during the last step must not be forgotten, or the next stage would begin.
            (stopping,) = self._vote(bool(stop))
            if stopping:
                raise self._interrupted()

    def save(self) -> None:
        """Write a checkpoint and call the callbacks, on the main process; the others wait. Raises BadFileError."""
        if self.accelerator.is_main_process:
            checkpoint = Checkpoint(
                step=self.step,
                seconds=self.seconds,
                network=self.stage.network.state_dict(),
                ema=self._ema.state_dict(),
                optimizer=self._optimizer.state_dict(),
                memory={} if self.stage.memory is None else self.stage.memory.state_dict(),
                scaler={} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            )
            save_checkpoint(self.folder, self.stage.name, checkpoint)
            for callback in self._callbacks:
                callback.on_save(self)
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

    def _train(self, stop: StopRequest) -> Iterator[StepRecord]:
        """Train, yielding a record every few steps and before each save and interval, so that no broken state is kept."""
        saved = time.monotonic()
        losses: list[Tensor] = []
        on_gpu = self.accelerator.device.type == "cuda"
        record_every = _RECORD_EVERY_ON_GPU if on_gpu else _RECORD_EVERY
        # However short the time, a stage takes at least one step, or there would be nothing to continue from.
        over = self.step >= self.steps or (self.step > 0 and self._out_of_time())
        while not over:
            with shortage_explained(self._shortage):
                losses.append(self._compiling_step() if self.step == self._compile_at else self._train_step())
            self.step += 1
            stopping, out_of_time, save_due = self._agreed(
                bool(stop), self._out_of_time(), time.monotonic() - saved > self.save_every_seconds
            )
            over = out_of_time or self.step >= self.steps
            due = [callback for callback in self._callbacks if callback.every and self.step % callback.every == 0]
            if over or stopping or save_due or due or self.step % record_every == 0:
                yield self._record(losses)
                losses = []
            if over or stopping or save_due:  # before callbacks, which may take minutes
                self.save()
                saved = time.monotonic()
            if stopping and not over:
                raise self._interrupted()
            if due:
                if self.accelerator.is_main_process:
                    for callback in due:
                        callback.on_interval(self)
                self.accelerator.wait_for_everyone()

    def _interrupted(self) -> InterruptedRunError:
        return InterruptedRunError(
            f"Stopped after {counted(self.step, 'step', 'steps')} of {self.stage.name} training; the state is saved.",
            "Run the same command again, without --fresh, to continue.",
        )

    def _shortage(self) -> ComputeError:
        optimizer = self.stage.optimizer
        parts = f" in {optimizer.accumulation} parts" if optimizer.accumulation > 1 else ""
        return ComputeError(
            f"Out of memory during {self.stage.name} training with batches of {optimizer.batch_size} images{parts} "
            f"on {self.accelerator.device}.",
            self.stage.smaller.format(accumulation=2 * optimizer.accumulation),
        )

    def _compiling_step(self) -> Tensor:
        """The step that compiles; without compilation if that fails."""
        self._compiling, plain, self._loss = True, self._loss, compiled(self._loss)
        memory = None if self.stage.memory is None else copy.deepcopy(self.stage.memory.state_dict())
        try:
            value = self._train_step()
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("torch.compile failed, so the training continues without it, more slowly: %s", reason)
            self._loss = plain
            self._optimizer.zero_grad()
            if memory is not None and self.stage.memory is not None:
                self.stage.memory.load_state_dict(memory)
            value = self._train_step()
        self._compiling = False
        return value

    def _train_step(self) -> Tensor:
        """One optimizer step. Returns this process's mean loss and figures and the gradient's norm, (2 + figures,)
        float32 on the device."""
        rate = self.stage.optimizer.rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        # This process's share of the global batch, in as many parts as the step is computed in.
        batch = self.stage.draw(self.step, self.accelerator.device)
        accumulation = self.stage.optimizer.accumulation
        size = self.stage.optimizer.batch_size // (self.accelerator.num_processes * accumulation)
        starts = [(self.accelerator.process_index * accumulation + part) * size for part in range(accumulation)]
        parts = [{name: values[start : start + size] for name, values in batch.items()} for start in starts]
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
        """Like `_backward`, with every part cut into one piece for each core.

        Gradients are added in a fixed order, so that the sums do not depend on which core is faster.
        """
        pieces = [piece for part in parts for piece in cut(part, self._workers)]

        def work(piece: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            loss, *figures = self._loss(**piece)
            gradients = torch.autograd.grad(loss / len(pieces), self._parameters, allow_unused=True)
            return _detached(loss, *figures), gradients

        values = []
        for value, gradients in parallel_map(work, pieces, self._workers, first_alone=self._compiling):
            values.append(value)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if parameter.grad is not None and gradient is not None:
                    parameter.grad.add_(gradient)
                elif gradient is not None:
                    # In the layout of the parameter, which fused AdamW requires: those of linear layers come transposed.
                    parameter.grad = torch.empty_like(parameter).copy_(gradient)
        return values

    def _record(self, losses: list[Tensor]) -> StepRecord:
        """The means since the last record over all processes. Raises ComputeError when the training diverges."""
        means = self.accelerator.reduce(torch.stack(losses).mean(dim=0), reduction="mean")
        # The loss belongs to the weights before the step; the weights after it are kept.
        sound = torch.stack(torch._foreach_norm([*self._parameters])).isfinite().all()
        loss, *figures, length, good = torch.cat([means, sound.to(means).view(1)]).tolist()
        if not math.isfinite(loss):
            raise self._diverged("The loss", "NaN or infinite")
        if figures[0] > _LARGEST_ERROR:
            raise self._diverged("The loss", "too large")
        # Clipping turns an infinite gradient into zeros, and training would go on and learn nothing. The scaler of float16
        # meets infinite gradients by design and skips those steps.
        if self.accelerator.scaler is None and not math.isfinite(length):
            raise self._diverged("The gradient", "NaN or infinite")
        if not good:
            raise self._diverged("A weight", "NaN or infinite")
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
        return self.limit_seconds is not None and self.seconds >= self.limit_seconds

    def _agreed(self, *requests: bool) -> tuple[bool, ...]:
        """True for each request that any process has. Several processes ask each other only about once a second."""
        if self.accelerator.num_processes == 1:
            return requests
        if self.step < self._next_agreement and self.step < self.steps:
            return (False,) * len(requests)
        per_step = (time.monotonic() - self._agreed_at) / max(1, self.step - self._agreed_step)
        *agreed, total = self._vote(*requests, per_step)
        # All processes know the same mean time of a step, and so choose the same step to ask again.
        mean = max(total / self.accelerator.num_processes, 1e-4)
        self._next_agreement = self.step + max(1, min(_AGREE_EVERY_STEPS, int(_AGREE_EVERY_SECONDS / mean)))
        self._agreed_step, self._agreed_at = self.step, time.monotonic()
        return tuple(value > 0 for value in agreed)

    def _vote(self, *values: float) -> tuple[float, ...]:
        """The sums of each value over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        votes = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device)
        return tuple(self.accelerator.reduce(votes, reduction="sum").tolist())

    def _show(self, figures: Mapping[str, float]) -> None:
        if self.limit_seconds is None:
            self._progress(Progress(self.stage.task, self.step, self.steps, "steps", figures))
        else:
            seconds = min(self.seconds, self.limit_seconds)
            figures = {"step": self.step, **figures}
            self._progress(Progress(self.stage.task, round(seconds), round(self.limit_seconds), "s", figures))

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
        log.info("Continuing %s training after %d steps", self.stage.name, self.step)

    def _diverged(self, what: str, how: str) -> ComputeError:
        good = list_checkpoints(self.folder, self.stage.name)
        state = f"The last good state is {good[-1]}. " if good else "There is no checkpoint yet. "
        return ComputeError(f"{what} of {self.stage.name} training is {how} after step {self.step}.", state + self.stage.remedy)


def require_even_parts(optimizer: OptimizerConfig, processes: int) -> None:
    """Raise UsageError when a batch cannot be split evenly among processes and accumulated parts."""
    parts = processes * optimizer.accumulation
    if optimizer.batch_size % parts:
        raise UsageError(
            f"A batch of {optimizer.batch_size} cannot be split evenly into {parts} parts "
            f"({processes} processes, {optimizer.accumulation} accumulated).",
            "Launch a number of processes that divides it, or choose another --batch-size or --accumulation.",
        )


def workers_for(stage: Stage, device: torch.device, processes: int = 1) -> int:
    """The number of cores that share a step: the largest that cuts a part into equal pieces.

    A stage with a memory needs its parts whole, and several processes share the cores already.
    """
    if processes > 1 or stage.memory is not None:
        return 1
    part = stage.optimizer.batch_size // stage.optimizer.accumulation
    return max(workers for workers in range(1, cores_for(device) + 1) if part % workers == 0)


def cut(part: Mapping[str, Tensor], pieces: int) -> list[dict[str, Tensor]]:
    """The part in equal pieces along the first dimension of its tensors, which has to be a multiple of their number."""
    chunks = {name: values.chunk(pieces) for name, values in part.items()}
    return [{name: values[k] for name, values in chunks.items()} for k in range(pieces)]


def averaging(parameters: Sequence[nn.Parameter], width: float, decay: float | None) -> EMAModel:
    """The moving average of the weights: with a constant decay, or without one by the power function of EDM2.

    width: the standard deviation of that average's profile relative to the training so far, sigma_rel of Karras et al.
    2024 (arXiv 2312.02696, equations 3 and 126): sigma_rel = sqrt((g + 1) / ((g + 2)^2 (g + 3))) is solved for g > 0.
    diffusers' decay 1 - 1 / (1 + step / inv_gamma) is that profile when inv_gamma = g + 1.
    """
    if decay is not None:
        # Without min_decay diffusers would begin with a lower decay to forget the initial weights.
        return EMAModel(parameters, decay=decay, min_decay=decay, foreach=True)
    # As a cubic: g^3 + 7 g^2 + (16 - t) g + (12 - t) = 0 for t = width**-2.
    exponent = float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())
    return EMAModel(parameters, decay=1.0, use_ema_warmup=True, inv_gamma=exponent + 1, power=1.0, foreach=True)


def _detached(*values: Tensor) -> Tensor:
    """Scalars as (n,) float32."""
    return torch.stack([value.detach().float() for value in values])
