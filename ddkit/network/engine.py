"""Engines compute a network's loss and gradients: the plain way, and faster ways to the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddkit.network.convnet import ConvNet
from ddkit.network.plan import EnginePlan
from ddkit.network.winograd import WinogradEngine

_WARM_UPS = 3  # before a capture: libraries allocate and choose algorithms at their first calls


class Engine(Protocol):
    """Computes with one network."""

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the batch, a scalar; leaves its gradients in the parameters' `.grad`.

        images: (N, 3, S, S) float, normalized. labels: (N,) int64. Both on the network's device.
        """

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, num_classes) float32, without gradients; the network in its present mode."""


class PlainEngine:
    """Autograd over the whole batch or over chunks of it, for any network: every other engine must agree with it.

    Gradients of chunks add up to the batch's gradient, because the loss is a mean over images and no image's result
    depends on the others. For a network with statistics across images, the plan must have no chunk.
    """

    def __init__(self, network: nn.Module, plan: EnginePlan) -> None:
        self._network = network
        self._plan = plan
        self._loss = _loss_of(network, plan)

    @torch.enable_grad()  # even inside torch.no_grad, where people evaluate
    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the batch, a scalar; leaves its gradients, new tensors, in the parameters' `.grad`."""
        self._network.zero_grad(set_to_none=True)
        losses = []
        for part, of_part in zip(self._split(images), self._split(labels), strict=True):
            loss = self._loss(part, of_part, len(images))
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, num_classes) float32, without gradients; the network in its present mode."""
        with _autocast(images.device, self._plan):
            return torch.cat([self._network(chunk).float() for chunk in self._split(images)])

    def _split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(self._plan.chunk or len(tensor))


@dataclass(frozen=True)
class _Capture:
    """A recorded pass over batches of one size, the tensors that it reads, and those that it writes."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    labels: Tensor
    loss: Tensor
    gradients: tuple[Tensor, ...]


class CudaGraphEngine(PlainEngine):
    """Launches the plain engine's step on a GPU as one CUDA graph. plan.kind: "cuda_graph", or "compiled" to compile first.

    The graph holds the kernels that autograd would launch one by one; compiling fuses the elementwise ones. Results differ
    from the plain way by rounding only. Convolutions use TF32 where PyTorch's default does, as in the official code.
    The graphs hold memory on the GPU until `close`.
    """

    def __init__(self, network: nn.Module, plan: EnginePlan) -> None:
        super().__init__(network, plan)
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if plan.kind == "compiled":
            self._loss = torch.compile(self._loss, dynamic=False)
        self._captures: dict[int, _Capture] = {}  # by batch size: the last batch of an epoch is a short one
        self._pool = torch.cuda.graph_pool_handle()  # one for all sizes, which never run at the same time
        self._stream = torch.cuda.Stream(next(network.parameters()).device)

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the batch, a scalar; leaves its gradients in the parameters' `.grad`."""
        capture = self._captures.get(len(images))
        if capture is None:
            capture = self._captures[len(images)] = self._record(images, labels)
        capture.images.copy_(images)
        capture.labels.copy_(labels)
        capture.graph.replay()
        for parameter, gradient in zip(self._parameters, capture.gradients, strict=True):
            parameter.grad = gradient
        # The next replay overwrites the recorded one.
        return capture.loss.clone()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, num_classes) float32, without gradients; the network in its present mode."""
        with _autocast(images.device, self._plan):
            return self._network(images.contiguous(memory_format=_memory_format(self._plan))).float()

    def close(self) -> None:
        """Give the graphs' memory back, and the gradients that lie in it. The engine cannot be used after this."""
        for parameter in self._parameters:
            parameter.grad = None
        for capture in self._captures.values():
            capture.graph.reset()
        self._captures.clear()

    def _record(self, images: Tensor, labels: Tensor) -> _Capture:
        images = images.clone(memory_format=_memory_format(self._plan))
        labels = labels.clone()
        device = images.device
        for _ in range(_WARM_UPS):
            super().gradients(images, labels)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        current = torch.cuda.current_stream(device)
        # torch.cuda.graph does not leave its stream where a capture fails; the context around it does.
        # Other rounds work on other streams meanwhile, so only this thread's calls are recorded.
        with (
            torch.cuda.device(device),
            torch.cuda.stream(current),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            loss = super().gradients(images, labels)
        gradients = tuple(parameter.grad for parameter in self._parameters if parameter.grad is not None)
        return _Capture(graph, images, labels, loss, gradients)


def build_engine(network: nn.Module, plan: EnginePlan) -> Engine:
    """The engine that `plan` describes, for `network`, whose weights get the plan's memory layout.

    Raises CompileError if the plan needs a C++ compiler that does not work.
    """
    if plan.kind == "winograd":
        assert isinstance(network, ConvNet)
        return WinogradEngine(network, plan)
    network.to(memory_format=_memory_format(plan))
    return CudaGraphEngine(network, plan) if plan.needs_gpu else PlainEngine(network, plan)


def close_engine(engine: Engine) -> None:
    """Give back the GPU memory that an engine holds. It cannot be used after this."""
    if isinstance(engine, CudaGraphEngine):
        engine.close()


def _memory_format(plan: EnginePlan) -> torch.memory_format:
    return torch.channels_last if plan.channels_last else torch.contiguous_format


def _autocast(device: torch.device, plan: EnginePlan) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bfloat16")


def _loss_of(network: nn.Module, plan: EnginePlan) -> Callable[[Tensor, Tensor, int], Tensor]:
    # A bound method would make a reference cycle, which keeps a graph's memory until Python collects garbage.
    def loss(images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """A chunk's part of the batch's mean cross-entropy."""
        with _autocast(images.device, plan):
            return F.cross_entropy(network(images), labels, reduction="sum") / batch_size

    return loss
