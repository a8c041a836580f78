"""How a network's loss and gradients are computed: the plain way and a faster way to the same numbers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddkit.network.cuda_graph import CudaGraphEngine
from ddkit.network.plan import EnginePlan
from ddkit.network.winograd import WinogradEngine


class Engine(Protocol):
    """A way to compute with one network."""

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the batch, a scalar; leaves its gradients in the parameters' `.grad`."""

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, num_classes) float32, without gradients; the network in its present mode."""


class PlainEngine:
    """Autograd over the whole batch or over chunks of it: the reference for every other engine, for any network.

    Gradients of chunks add up to the batch's, as the loss is a mean over images and no network here has statistics
    across images; the caller gives no chunk to one that has.
    """

    def __init__(self, network: nn.Module, plan: EnginePlan) -> None:
        self._network = network
        self._plan = plan

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        self._network.zero_grad(set_to_none=True)
        losses = [self._chunk(*chunk, len(images)) for chunk in zip(*map(self._split, (images, labels)), strict=True)]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        with self._autocast(images):
            return torch.cat([self._network(chunk).float() for chunk in self._split(images)])

    def _chunk(self, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        with self._autocast(images):
            loss = F.cross_entropy(self._network(images), labels, reduction="sum") / batch_size
        loss.backward()
        return loss.detach()

    def _split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(self._plan.chunk or len(tensor))

    def _autocast(self, images: Tensor) -> torch.autocast:
        return torch.autocast(images.device.type, torch.bfloat16, enabled=self._plan.precision == "bfloat16")


def build_engine(network: nn.Module, plan: EnginePlan) -> Engine:
    """The engine that `plan` describes, for `network`. Raises CompileError where it needs a compiler in vain."""
    kinds = {"plain": PlainEngine, "winograd": WinogradEngine, "graphed": CudaGraphEngine, "compiled": CudaGraphEngine}
    return kinds[plan.kind](network, plan)
