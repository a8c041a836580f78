"""A network on a GPU whose training step is launched as one CUDA graph, compiled first where that is faster.

The graph holds the kernels that autograd would launch one by one; compiling fuses the elementwise ones. Results differ
from the plain way by rounding only. Convolutions use TF32 where PyTorch's default does, as in the official code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddkit.network.plan import EnginePlan

_WARM_UPS = 3  # before a capture: libraries allocate and choose algorithms at their first calls


@dataclass(frozen=True)
class _Capture:
    """A recorded pass over batches of one size, the tensors that it reads, and those that it writes."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    labels: Tensor
    loss: Tensor
    gradients: tuple[Tensor, ...]


class CudaGraphEngine:
    """Computes with one network on its GPU. plan.kind: "cuda_graph", or "compiled" to compile before recording.

    The graphs hold memory on the GPU until `close`.
    """

    def __init__(self, network: nn.Module, plan: EnginePlan) -> None:
        self._network = network
        self._plan = plan
        self._parameters = list(network.parameters())
        # A bound method would make a reference cycle, which keeps the graphs' memory until Python collects garbage.
        loss = _loss_of(network, plan)
        self._loss = torch.compile(loss, dynamic=False) if plan.kind == "compiled" else loss
        self._captures: dict[int, _Capture] = {}  # by batch size: the last batch of an epoch is a short one
        self._pool = torch.cuda.graph_pool_handle()  # one for all sizes, which never run at the same time
        self._stream = torch.cuda.Stream(self._parameters[0].device)

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
        with autocast(images.device, self._plan):
            return self._network(images.contiguous(memory_format=memory_format(self._plan))).float()

    def close(self) -> None:
        """Give the graphs' memory back, and the gradients that lie in it. The engine cannot be used after this."""
        for parameter in self._parameters:
            parameter.grad = None
        for capture in self._captures.values():
            capture.graph.reset()
        self._captures.clear()

    def _record(self, images: Tensor, labels: Tensor) -> _Capture:
        images = images.clone(memory_format=memory_format(self._plan))
        labels = labels.clone()
        device = images.device
        for _ in range(_WARM_UPS):
            self._backward(images, labels)
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
            loss = self._backward(images, labels)
        gradients = tuple(parameter.grad for parameter in self._parameters if parameter.grad is not None)
        return _Capture(graph, images, labels, loss, gradients)

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss; leaves new tensors in the parameters' `.grad`."""
        for parameter in self._parameters:
            parameter.grad = None
        losses = []
        chunk = self._plan.chunk or len(images)
        for part, of_part in zip(images.split(chunk), labels.split(chunk), strict=True):
            loss = self._loss(part, of_part, len(images))
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()


def memory_format(plan: EnginePlan) -> torch.memory_format:
    """The layout of weights and images with which `plan` computes."""
    return torch.channels_last if plan.channels_last else torch.contiguous_format


def autocast(device: torch.device, plan: EnginePlan) -> torch.autocast:
    """The context in which `plan` computes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bfloat16")


def _loss_of(network: nn.Module, plan: EnginePlan) -> Callable[[Tensor, Tensor, int], Tensor]:
    def loss(images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """A chunk's part of the batch's mean cross-entropy."""
        with autocast(images.device, plan):
            return F.cross_entropy(network(images), labels, reduction="sum") / batch_size

    return loss
