"""Training one network on a labeled set as the challenge trains it.

Source: PROTOCOL.md, "Training one network on a submission".
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddkit.challenge import (
    BATCH_SIZE,
    LEARNING_RATE,
    LEARNING_RATE_AFTER_DROP,
    MOMENTUM,
    WEIGHT_DECAY,
    DatasetSpec,
    epoch_of_drop,
)
from ddkit.data.images import normalize_
from ddkit.errors import ComputeError, UsageError
from ddkit.network import winograd
from ddkit.network.augment import random_augment
from ddkit.network.autotune import choose_plan, with_smaller_chunks
from ddkit.network.convnet import ConvNet
from ddkit.network.engine import Engine, build_engine, close_engine
from ddkit.network.kernels import CompileError
from ddkit.network.plan import PRECISIONS, EnginePlan
from ddkit.runtime.device import is_out_of_memory, release_memory, upload

_log = logging.getLogger(__name__)

# Batches of so few images are trained on sooner than plans are compared. The plain way computes them whole, and so rounds as
# the official code does, which decides on which side of a ReLU a value near zero falls.
_FEW = 16


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training; the defaults are the protocol's values.

    epochs_setting: E; E + 1 epochs run. precision: "float32" or "bfloat16" (autocast).
    Raises UsageError for values that make no sense.
    """

    epochs_setting: int
    batch_size: int = BATCH_SIZE
    augment: bool = True
    shuffle: bool = True
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.epochs_setting < 0:
            raise UsageError(f"The epochs setting must not be negative, got {self.epochs_setting}.")
        if self.batch_size < 1:
            raise UsageError(f"The batch size must be positive, got {self.batch_size}.")
        if self.precision not in PRECISIONS:
            raise UsageError(f"Unknown precision '{self.precision}'.", f"Choose one of: {', '.join(PRECISIONS)}.")

    @property
    def epochs(self) -> int:
        """Epochs that run: 0 ... E."""
        return self.epochs_setting + 1


class TrainingRun:
    """The training of one network, which can be saved and continued between any two batches.

    network: trained in place; on the device where it is to be trained.
    images: (N, 3, S, S) float, normalized; or uint8 pixels, which are normalized a batch at a time.
    labels: (N,) int64. Both on the network's device.
    generator: on the CPU; draws the order of the images and the augmentation.
    plan: of the engine that computes gradients. None takes the fastest one on this machine by measurement, or, once a
        state is loaded, the one that the state was trained with.
    spec: the dataset, whose constants normalize pixels; needed for uint8 images only.
    Call `close` after use on a GPU, where the engine may hold memory.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        settings: TrainingSettings,
        generator: torch.Generator,
        plan: EnginePlan | None = None,
        spec: DatasetSpec | None = None,
    ) -> None:
        if len(images) != len(labels) or len(images) == 0:
            raise UsageError(f"Cannot train on {len(images)} images with {len(labels)} labels.")
        if isinstance(network, ConvNet):
            _require_inputs_of(network, images, labels)
        if images.dtype == torch.uint8 and spec is None:
            raise UsageError("Training on uint8 pixels needs the dataset's constants.")
        self.network = network
        self.settings = settings
        self.epochs_done = 0
        self._order: Tensor | None = None  # of the images in the epoch that was begun, (N,) int64 on the CPU
        self._losses: list[Tensor] = []  # of its batches so far
        self._images, self._labels = images.detach(), labels  # which may be parameters of somebody's optimization
        self._spec = spec
        self._generator = generator
        self._plan = plan
        self._engine: Engine | None = None
        self._optimizer = _optimizer(network, LEARNING_RATE)
        self._stream = torch.cuda.Stream(images.device) if images.is_cuda else None
        self._wait_for_others()

    @property
    def finished(self) -> bool:
        return self.epochs_done >= self.settings.epochs

    @property
    def engine(self) -> Engine:
        """Computes the gradients; chosen when it is first needed."""
        if self._engine is None:
            self._plan = self._plan or self._fastest_plan()
            self._engine = build_engine(self.network, self._plan)
            # Fused optimizers require momentum in the weights' memory layout; engines and states may change either.
            for parameter, state in self._optimizer.state.items():
                momentum = state.get("momentum_buffer")
                if momentum is not None and momentum.stride() != parameter.stride():
                    state["momentum_buffer"] = torch.empty_like(parameter, requires_grad=False).copy_(momentum)
        return self._engine

    def close(self) -> None:
        """Give back the GPU memory that the engine holds. If the run continues, it builds a new engine."""
        if self._engine is not None:
            close_engine(self._engine)
            self._engine = None
        release_memory(self._images.device)

    def _fastest_plan(self) -> EnginePlan:
        precision, batch_size = self.settings.precision, min(self.settings.batch_size, len(self._images))
        if batch_size <= _FEW and precision == "float32":
            return EnginePlan("plain", precision)
        images_left = (self.settings.epochs - self.epochs_done) * len(self._images)
        return choose_plan(self.network, precision, batch_size, images_left=images_left)

    def epoch(self) -> list[float]:
        """Train for one epoch; returns the mean loss of each batch. Raises ComputeError if a loss is NaN or infinite."""
        (losses,) = epoch_side_by_side([self])
        return losses

    def steps(self) -> Iterator[None]:
        """Begin an epoch, or continue one, and train on one batch at each step; call `end_epoch` after the last.

        On a GPU a step only queues work, on this run's own stream, and waits for nothing.
        """
        self.network.train()
        if self._order is None:
            n = len(self._images)
            self._order = torch.randperm(n, generator=self._generator) if self.settings.shuffle else torch.arange(n)
        with self._on_own_stream():
            batches = upload(self._order, self._images.device).split(self.settings.batch_size)
        for indices in batches[len(self._losses) :]:
            with self._on_own_stream():
                images, labels = self._images[indices], self._labels[indices]
                if self._spec and images.dtype == torch.uint8:
                    images = normalize_(images.float(), self._spec)
                if self.settings.augment:
                    images = random_augment(images, self._generator)
                self._losses.append(self._gradients(images, labels))
                self._optimizer.step()
            yield

    def end_epoch(self) -> list[float]:
        """The mean loss of each of the epoch's batches. Raises ComputeError if a loss is NaN or infinite."""
        if self.epochs_done == epoch_of_drop(self.settings.epochs_setting):
            # A new optimizer, not only a new rate: momentum starts again from zero.
            self._optimizer = _optimizer(self.network, LEARNING_RATE_AFTER_DROP)
        self.epochs_done += 1
        # One transfer an epoch: a GPU is waited for here, and where a state is saved.
        with self._on_own_stream():
            values = torch.stack(self._losses).tolist()
        self._order, self._losses = None, []
        if not all(map(math.isfinite, values)):
            raise ComputeError(
                f"The training loss is NaN or infinite in epoch {self.epochs_done}.",
                "Check the set's values: they must be normalized with the dataset's constants.",
            )
        return values

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on, as tensors and plain numbers."""
        if self._stream:
            self._stream.synchronize()
        return {
            "epochs_done": self.epochs_done,
            "order": self._order,
            "losses": [loss.item() for loss in self._losses],
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "plan": dataclasses.asdict(self._plan) if self._plan else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, on this or another kind of device, with the same settings and images."""
        self.epochs_done, self._order = state["epochs_done"], state["order"]
        self._losses = [torch.tensor(loss, device=self._images.device) for loss in state["losses"]]
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"].cpu())
        self.close()
        # Another engine would round differently: the rest of a run is computed as its beginning was, on the same device.
        self._plan = EnginePlan.from_dict(state["plan"]) if state["plan"] else None
        if self._plan and not self._plan.suits(self._images.device.type):
            self._plan = None
        if self._plan and self._plan.kind == "winograd":
            try:
                winograd.load()
            except CompileError as error:  # begun on a machine with a compiler
                _log.warning("The rest of the training rounds otherwise, as the engine of its beginning is missing: %s", error)
                self._plan = None
        self._wait_for_others()

    def _wait_for_others(self) -> None:
        """On a GPU, queue this run's work after what was queued so far, such as copies of data."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def _on_own_stream(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()

    def _gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute gradients; after a failure of memory, graph or compiler, by a plan that needs less."""
        while True:
            try:
                return self.engine.gradients(images, labels)
            except Exception as error:
                plan = self._plan
                failure = "" if is_out_of_memory(error) else str(error).split("\n")[0] or type(error).__name__
                if plan is None or (failure and not plan.needs_gpu):
                    raise
            # Outside the handler, and without the error, whose tracebacks hold on to the memory.
            self._use_less(plan, len(images), failure)

    def _use_less(self, plan: EnginePlan, batch_size: int, failure: str) -> None:
        """failure: what graph or compiler said; empty where memory is short."""
        smaller: EnginePlan | None
        if failure:
            smaller = dataclasses.replace(plan, kind="cuda_graph" if plan.kind == "compiled" else "plain")
            what = "torch.compile" if plan.kind == "compiled" else "A CUDA graph"
            _log.warning("%s does not work here and is left out: %s", what, failure)
        elif smaller := with_smaller_chunks(plan, batch_size):
            instead = f"{smaller.chunk} images at a time" if smaller.chunk != plan.chunk else "without a CUDA graph"
            _log.warning("Not enough memory: computing %s from now on.", instead)
        else:
            raise ComputeError(
                "There is not enough memory to train the network even on one image at a time.",
                "Close other programs, or use another --device.",
            )
        self.close()
        self._plan = smaller


def epoch_side_by_side(runs: Sequence[TrainingRun], between: Callable[[], None] = lambda: None) -> list[list[float]]:
    """Train several runs for one epoch, a batch of each in turn; returns each one's losses, as its own `epoch` would.

    between: called after each turn, when all of them can be saved.
    The runs share nothing, so each computes what it computes alone. On a GPU their work overlaps, which fills the gaps
    that one small network leaves.
    """
    for _ in itertools.zip_longest(*(run.steps() for run in runs)):
        between()
    return [run.end_epoch() for run in runs]


def train_network(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs_setting: int,
    batch_size: int = BATCH_SIZE,
    augment: bool = True,
    shuffle: bool = True,
    generator: torch.Generator | None = None,
    precision: str = "float32",
) -> list[float]:
    """Train `network` in place as the protocol does, for E + 1 epochs; returns every batch's mean loss in order.

    images: (N, 3, S, S) float, normalized. labels: (N,) int64, below the network's number of classes. Both on any device.
    epochs_setting: E of PROTOCOL.md. generator: on the CPU; one seeded with 0 when None.
    Raises UsageError for settings that make no sense and for images or labels that a ConvNet does not take, ComputeError if
    a loss is NaN or infinite.
    """
    settings = TrainingSettings(epochs_setting, batch_size, augment, shuffle, precision)
    images, labels = (tensor.to(next(network.parameters()).device) for tensor in (images, labels))
    run = TrainingRun(network, images, labels, settings, generator or torch.Generator().manual_seed(0))
    losses: list[float] = []
    while not run.finished:
        losses += run.epoch()
    run.close()
    return losses


def _require_inputs_of(network: ConvNet, images: Tensor, labels: Tensor) -> None:
    """Raise UsageError unless the network can be trained on these images and labels."""
    side, classes = network.image_size, network.num_classes
    if images.shape[1:] != (3, side, side):
        raise UsageError(f"The network takes images of shape (N, 3, {side}, {side}), got {tuple(images.shape)}.")
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        raise UsageError(f"The network has {classes} classes, 0 to {classes - 1}, but the labels go from {least} to {most}.")


def _optimizer(network: nn.Module, learning_rate: float) -> torch.optim.SGD:
    parameters = list(network.parameters())
    fused = parameters[0].is_cuda  # one kernel instead of several
    return torch.optim.SGD(parameters, learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=fused)
