"""The description of an engine, by which it can be remembered and built again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class EnginePlan:
    """The way to compute a network's loss and gradients: everything that must be equal for equal rounding.

    kind: "plain"; on a CPU "winograd"; on a GPU "cuda_graph", or "compiled" for a graph of compiled kernels.
    precision: "float32" or "bfloat16".
    chunk: images computed at a time; 0 for the whole batch. workers: threads that work on separate chunks.
    products: of "winograd": "torch" has PyTorch multiply matrices, "own" winograd.cpp.
    channels_last: on a GPU, the memory layout of images and weights.
    """

    kind: str = "plain"
    precision: str = "float32"
    chunk: int = 0
    workers: int = 1
    products: str = "torch"
    channels_last: bool = False

    @property
    def needs_gpu(self) -> bool:
        return self.kind in ("cuda_graph", "compiled")

    def suits(self, device_type: str) -> bool:
        """True if the plan's engine computes on such devices: "cpu", "cuda" or "mps"."""
        return self.kind == "plain" or device_type == ("cuda" if self.needs_gpu else "cpu")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EnginePlan:
        """The plan of which `dataclasses.asdict` made `values`, in this version or an earlier one.

        Raises TypeError for unknown keys.
        """
        # Earlier versions had another word for CUDA graphs, and only one layout on a GPU, which they did not write.
        kind = "cuda_graph" if values.get("kind") == "graphed" else values.get("kind", cls.kind)
        on_gpu = kind in ("cuda_graph", "compiled")
        return cls(**{"channels_last": on_gpu, **values, "kind": kind})
