"""torch.compile where it can work, and plain PyTorch where it cannot."""

from __future__ import annotations

import logging
import os
import shutil
import sys

import torch
from torch import nn

log = logging.getLogger(__name__)


def can_compile() -> bool:
    """Whether torch.compile has the C++ compiler it needs."""
    if sys.platform == "win32":
        return False
    candidates = (os.environ.get("CXX"), "g++", "c++", "clang++")
    return any(shutil.which(name) for name in candidates if name)


def compiled(module: nn.Module) -> nn.Module:
    """`module` compiled for fixed shapes, or itself where there is no compiler; the parameters are shared."""
    return _compiled(module, {})


def compiled_for_inference(module: nn.Module, device: torch.device) -> nn.Module:
    """The same of a module whose parameters never change again: on a CPU they are packed as its matrix products want
    them, and calls from several threads run side by side."""
    # Without the wrapper in C++, compiled code holds Python's lock.
    return _compiled(module, {"freezing": True, "cpp_wrapper": True} if device.type == "cpu" else {})


def _compiled(module: nn.Module, options: dict[str, bool]) -> nn.Module:
    if not can_compile():
        log.info("No C++ compiler was found: going on without torch.compile, which is slower.")
        return module
    return torch.compile(module, options=options or None)
