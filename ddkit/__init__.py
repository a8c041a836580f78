"""ddkit: train, generate, refine, evaluate, check and pack tiny datasets for a dataset distillation challenge.

    import ddkit

    ddkit.generate("glyphs", from_real="random", ipc=10, out="submission/glyphs.pt")
    result = ddkit.evaluate("submission/glyphs.pt", rounds=1)
    print(result.mean)

These functions do what the commands of the same names do; see `ddkit.api`. They are loaded when they are first used.

Import ddkit before torch: it sets how OpenMP's threads wait and how many there are (`ddkit.runtime.container`), which torch
reads once, when it is loaded. Environment variables that you have set yourself, such as OMP_NUM_THREADS, are kept.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ddkit.runtime.container import set_defaults as _set_openmp_defaults

if TYPE_CHECKING:
    from ddkit.api import check, enter, evaluate, generate, load_dataset, pack, pull, push, read_set, refine, report, train

__version__ = "0.2.0"
__all__ = [
    "check", "enter", "evaluate", "generate", "load_dataset", "pack", "pull", "push", "read_set", "refine", "report", "train",
]  # fmt: skip

_set_openmp_defaults()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ddkit' has no attribute '{name}'")
    return getattr(importlib.import_module("ddkit.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
