"""What describes an engine, so that it can be remembered and built again."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class EnginePlan:
    """Which engine, and how it is set: what has to be the same for the same rounding.

    kind: "plain"; on a CPU "winograd"; on a GPU "graphed" or "compiled". precision: "float32" or "bfloat16".
    chunk: images computed at a time; 0 for the whole batch. workers: threads that work on chunks of their own.
    products: of "winograd": "torch" has PyTorch multiply matrices, "own" winograd.cpp.
    """

    kind: str = "plain"
    precision: str = "float32"
    chunk: int = 0
    workers: int = 1
    products: str = "torch"
