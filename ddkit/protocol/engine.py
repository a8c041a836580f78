"""How a network's loss and gradients are computed: the plain way and faster ways to the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class EnginePlan:
    """Which engine, and how it is set: what has to be the same for the same rounding.

    kind: a name in ENGINES. chunk: images computed at a time; 0 for the whole batch.
    """

    kind: str = "plain"
    precision: str = "float32"
    chunk: int = 0


class Engine(Protocol):
    """A way to compute with one network."""

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the batch, a scalar; leaves its gradients in the parameters' `.grad`."""

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, num_classes) float32, without gradients; the network in its present mode."""


class PlainEngine:
    """Autograd over the whole batch: the reference for every other engine, and the one that fits any network."""

    def __init__(self, network: nn.Module, plan: EnginePlan) -> None:
        self._network = network
        self._plan = plan

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        self._network.zero_grad(set_to_none=True)
        with self._autocast(images):
            loss = F.cross_entropy(self._network(images), labels)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        with self._autocast(images):
            return self._network(images).float()

    def _autocast(self, images: Tensor) -> torch.autocast:
        return torch.autocast(images.device.type, torch.bfloat16, enabled=self._plan.precision == "bfloat16")


def choose_plan(network: nn.Module, precision: str, batch_size: int) -> EnginePlan:
    """The fastest plan for this network on its device."""
    return EnginePlan("plain", precision)


def build_engine(network: nn.Module, plan: EnginePlan) -> Engine:
    """The engine that `plan` describes, for `network`."""
    return PlainEngine(network, plan)
