"""A network on a GPU with a step's hundred kernels launched as one: CUDA graphs, compiled where that is faster.

The kernels are those that autograd would launch one by one on the whole batch (compiled, their elementwise parts are
fused), so results differ from the plain way by rounding only. Convolutions use TF32 where PyTorch's default does, as
in the official code. Channels-last is the layout that tensor cores read without converting.

Where there are no CUDA graphs, the recorded step is computed anew into the same tensors: nothing is gained by it, but
all the rest of the engine then runs, and is tested, on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddkit.network.plan import EnginePlan

_WARM_UPS = 3  # before a capture: libraries allocate and choose algorithms at their first calls

_Step = Callable[[], list[Tensor]]  # from the same inputs' memory to the loss and the gradients


class _Recording(Protocol):
    """A step that can be run again. outputs: its tensors, written anew by each `replay`."""

    outputs: list[Tensor]

    def replay(self) -> None: ...


class _Graph:
    """A step's kernels as a CUDA graph."""

    def __init__(self, step: _Step, device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        # PyTorch's own stream for captures is on the device that was current at the first of all.
        stream = torch.cuda.Stream(device)
        # Other rounds work on other streams meanwhile; only this thread's calls are recorded.
        with torch.cuda.device(device), torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self.outputs = step()

    def replay(self) -> None:
        self._graph.replay()


class _Again:
    """A step that is computed again, into the tensors it gave first."""

    def __init__(self, step: _Step, device: torch.device) -> None:
        self._step = step
        self.outputs = step()

    def replay(self) -> None:
        for kept, value in zip(self.outputs, self._step(), strict=True):
            kept.copy_(value)


@dataclass(frozen=True)
class _Capture:
    """A recorded pass over batches of one size, and the tensors it reads."""

    images: Tensor
    labels: Tensor
    recording: _Recording


class CudaGraphEngine:
    """Computes with one network on its GPU. plan.kind: "graphed", or "compiled" to compile before recording."""

    def __init__(self, network: nn.Module, plan: EnginePlan) -> None:
        self._network = network.to(memory_format=torch.channels_last)
        self._plan = plan
        self._parameters = list(network.parameters())
        self._loss_of = torch.compile(self._plain_loss, dynamic=False) if plan.kind == "compiled" else self._plain_loss
        self._captures: dict[int, _Capture] = {}  # by batch size: the last batch of an epoch is a short one

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the batch, a scalar; leaves its gradients in the parameters' `.grad`."""
        capture = self._captures.get(len(images))
        if capture is None:
            capture = self._captures[len(images)] = self._record(images, labels)
        capture.images.copy_(images)
        capture.labels.copy_(labels)
        capture.recording.replay()
        loss, *gradients = capture.recording.outputs
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        # The next replay writes over the recorded one.
        return loss.clone()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, num_classes) float32, without gradients; the network in its present mode."""
        with self._autocast(images):
            return self._network(images.contiguous(memory_format=torch.channels_last)).float()

    def _record(self, images: Tensor, labels: Tensor) -> _Capture:
        images = images.clone(memory_format=torch.channels_last)
        labels = labels.clone()
        for _ in range(_WARM_UPS):
            self._backward(images, labels)
        record = _Graph if images.is_cuda else _Again
        return _Capture(images, labels, record(lambda: self._backward(images, labels), images.device))

    def _backward(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """The loss and the parameters' gradients, in tensors of their own."""
        for parameter in self._parameters:
            parameter.grad = None
        loss = self._loss_of(images, labels)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in self._parameters)]

    def _plain_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._autocast(images):
            return F.cross_entropy(self._network(images), labels)

    def _autocast(self, images: Tensor) -> torch.autocast:
        return torch.autocast(images.device.type, torch.bfloat16, enabled=self._plan.precision == "bfloat16")
