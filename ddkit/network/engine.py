"""Engines compute a network's loss and gradients: the plain way, and faster ways to the same numbers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddkit.network.convnet import ConvNet
from ddkit.network.cuda_graph import CudaGraphEngine, autocast, memory_format
from ddkit.network.plan import EnginePlan
from ddkit.network.winograd import WinogradEngine


class Engine(Protocol):
    """Computes with one network."""

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the batch, a scalar; leaves its gradients in the parameters' `.grad`."""

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

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        self._network.zero_grad(set_to_none=True)
        losses = []
        for part, of_part in zip(self._split(images), self._split(labels), strict=True):
            with autocast(images.device, self._plan):
                loss = F.cross_entropy(self._network(part), of_part, reduction="sum") / len(images)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        with autocast(images.device, self._plan):
            return torch.cat([self._network(chunk).float() for chunk in self._split(images)])

    def _split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(self._plan.chunk or len(tensor))


def build_engine(network: nn.Module, plan: EnginePlan) -> Engine:
    """The engine that `plan` describes, for `network`, whose weights get the plan's memory layout.

    Raises CompileError if the plan needs a C++ compiler that does not work.
    """
    if plan.kind == "winograd":
        assert isinstance(network, ConvNet)
        return WinogradEngine(network, plan)
    network.to(memory_format=memory_format(plan))
    return CudaGraphEngine(network, plan) if plan.needs_gpu else PlainEngine(network, plan)


def close_engine(engine: Engine) -> None:
    """Give back the GPU memory that an engine holds. It cannot be used after this."""
    if isinstance(engine, CudaGraphEngine):
        engine.close()
