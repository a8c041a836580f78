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
    epoch_of_drop,
)
from ddkit.errors import ComputeError, UsageError
from ddkit.network.augment import random_augment
from ddkit.network.autotune import choose_plan, smaller
from ddkit.network.engine import Engine, build_engine
from ddkit.network.plan import PRECISIONS, EnginePlan
from ddkit.runtime.device import is_out_of_memory

_log = logging.getLogger(__name__)

# Batches of so few images are trained on sooner than plans are compared; and as the plain way computes them whole, it
# rounds as the official code does, which decides on which side of a ReLU a value near zero falls.
_FEW = 16


@dataclass(frozen=True)
class TrainingSettings:
    """What may differ from the protocol, at its official values where it has them.

    epochs_setting: E; E + 1 epochs run. precision: "float32" or "bfloat16" (autocast).
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
            raise UsageError(f"There is no precision '{self.precision}'.", f"Known: {', '.join(PRECISIONS)}.")

    @property
    def epochs(self) -> int:
        """Epochs that run: 0 ... E."""
        return self.epochs_setting + 1


class TrainingRun:
    """The training of one network, which can be saved and continued between any two batches.

    network: trained in place; on the device where it is to be trained.
    images: (N, 3, S, S) float, normalized. labels: (N,) int64. Both on the network's device.
    generator: on the CPU; draws the order of the images and the augmentation.
    plan: of the engine that computes gradients; when None, the one measured to be fastest on this machine, or,
        once a state is loaded, the one that the state was trained with.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        settings: TrainingSettings,
        generator: torch.Generator,
        plan: EnginePlan | None = None,
    ) -> None:
        if len(images) != len(labels) or len(images) == 0:
            raise UsageError(f"Cannot train on {len(images)} images with {len(labels)} labels.")
        self.network = network
        self.settings = settings
        self.epochs_done = 0
        self._order: Tensor | None = None  # of the images in the epoch that was begun, (N,) int64 on the CPU
        self._losses: list[Tensor] = []  # of its batches so far
        self._images, self._labels = images, labels
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
        """What computes gradients; chosen when it is first needed."""
        if self._engine is None:
            self._plan = self._plan or self._fitting_plan()
            self._engine = build_engine(self.network, self._plan)
        return self._engine

    def _fitting_plan(self) -> EnginePlan:
        precision, batch_size = self.settings.precision, self.settings.batch_size
        if batch_size <= _FEW and precision == "float32":
            return EnginePlan("plain", precision)
        return choose_plan(self.network, precision, batch_size)

    def epoch(self) -> list[float]:
        """Train for one epoch; returns the mean loss of each batch. Raises ComputeError when it is no number."""
        (losses,) = epoch_side_by_side([self])
        return losses

    def steps(self) -> Iterator[None]:
        """Begin an epoch, or go on with one, and train on one batch at each turn; `end_epoch` is to follow the last.

        On a GPU a turn only queues work, on this run's own stream, and waits for nothing.
        """
        self.network.train()
        if self._order is None:
            self._order = self._draw_order()
        with self._on_own_stream():
            batches = self._order.to(self._images.device).split(self.settings.batch_size)
        for indices in batches[len(self._losses) :]:
            with self._on_own_stream():
                self._losses.append(self._step(indices))
            yield

    def end_epoch(self) -> list[float]:
        """The mean loss of each of the epoch's batches. Raises ComputeError when it is no number."""
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
                f"The training loss is no number in epoch {self.epochs_done}.",
                "Check the set's values: they must be normalized with the dataset's constants.",
            )
        return values

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest depends on, as tensors and plain numbers."""
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
        """Continue from what `state_dict` gave."""
        self.epochs_done, self._order = state["epochs_done"], state["order"]
        self._losses = [torch.tensor(loss, device=self._images.device) for loss in state["losses"]]
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"].cpu())
        # Another engine would round differently: the rest of a run is computed as its beginning was.
        self._plan, self._engine = EnginePlan(**state["plan"]) if state["plan"] else None, None
        self._wait_for_others()

    def _wait_for_others(self) -> None:
        """On a GPU: what was queued elsewhere so far, such as copying data, comes before this run's own work."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def _on_own_stream(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()

    def _draw_order(self) -> Tensor:
        n = len(self._images)
        return torch.randperm(n, generator=self._generator) if self.settings.shuffle else torch.arange(n)

    def _step(self, indices: Tensor) -> Tensor:
        images, labels = self._images[indices], self._labels[indices]
        if self.settings.augment:
            images = random_augment(images, self._generator)
        loss = self._gradients(images, labels)
        self._optimizer.step()
        return loss

    def _gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """As the engine does, with ever smaller chunks while the memory does not suffice."""
        while True:
            try:
                return self.engine.gradients(images, labels)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._use_smaller_chunks(len(images), error)

    def _use_smaller_chunks(self, batch_size: int, error: RuntimeError) -> None:
        plan = self._plan and smaller(self._plan, batch_size)
        if plan is None:
            raise ComputeError(
                "There is not enough memory to train the network even on one image at a time.",
                "Close other programs, or use another --device.",
            ) from error
        _log.warning("Not enough memory: computing %d images at a time from now on.", plan.chunk)
        self._plan, self._engine = plan, None


def epoch_side_by_side(runs: Sequence[TrainingRun], between: Callable[[], None] = lambda: None) -> list[list[float]]:
    """One epoch of several runs, a batch of each in turn; returns each one's losses, as its own `epoch` would.

    between: called after each turn, when all of them can be saved.

    Nothing passes between the runs, so each computes what it computes alone. On a GPU their work overlaps, which
    fills the gaps that one small network leaves.
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

    images: (N, 3, S, S) float, normalized. labels: (N,) int64, below the network's number of classes.
    epochs_setting: E of PROTOCOL.md. generator: on the CPU; one seeded with 0 when None.
    Raises UsageError for settings that cannot be meant, ComputeError when the loss is no number.
    """
    settings = TrainingSettings(epochs_setting, batch_size, augment, shuffle, precision)
    run = TrainingRun(network, images, labels, settings, generator or torch.Generator().manual_seed(0))
    losses: list[float] = []
    while not run.finished:
        losses += run.epoch()
    return losses


def _optimizer(network: nn.Module, learning_rate: float) -> torch.optim.SGD:
    parameters = list(network.parameters())
    fused = parameters[0].is_cuda  # one kernel instead of several
    return torch.optim.SGD(parameters, learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=fused)
