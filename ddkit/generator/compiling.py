"""torch.compile where it can work, and plain PyTorch where it cannot."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import subprocess
import sys
import sysconfig

import torch
from torch import nn

log = logging.getLogger(__name__)


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile has the C++ compiler and Python's headers, which it needs; tried once."""
    if sys.platform == "win32":
        return False
    compiler = shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))
    if compiler is None:
        return False
    headers = f"-I{sysconfig.get_path('include')}"
    program = "#include <Python.h>\n#include <vector>\n"
    command = [compiler, "-fsyntax-only", headers, "-x", "c++", "-"]
    return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0


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
        log.warning("No C++ compiler that works was found: going on without torch.compile, which is slower.")
        return module
    # On a machine without a GPU it would tell people that, in the middle of their output.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return torch.compile(module, options=options or None)
