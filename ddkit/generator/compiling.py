"""torch.compile if it works, and plain PyTorch if it does not."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

log = logging.getLogger(__name__)


@functools.cache
def can_compile() -> bool:
    """Return whether torch.compile has the C++ compiler and the Python headers that it needs. The check runs once."""
    if sys.platform == "win32":
        return False
    compiler = shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))
    if compiler is None:
        return False
    headers = f"-I{sysconfig.get_path('include')}"
    program = "#include <Python.h>\n#include <vector>\n"
    command = [compiler, "-fsyntax-only", headers, "-x", "c++", "-"]
    return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0


def compiled_for_inference(module: nn.Module, device: torch.device) -> nn.Module:
    """`module`, whose parameters never change again, compiled for inference, or itself if there is no compiler.

    On a CPU the parameters are packed for its matrix products, and calls from several threads run at the same time.
    """
    # Without the C++ wrapper, compiled code holds Python's lock.
    return compiled(module, {"freezing": True, "cpp_wrapper": True} if device.type == "cpu" else {})


def compiled(module: nn.Module, options: Mapping[str, bool] | None = None) -> nn.Module:
    """`module` compiled for fixed shapes, or itself if there is no compiler. The parameters are shared.

    options: of torch's compiler.
    """
    if not can_compile():
        log.warning("No working C++ compiler was found, so torch.compile is not used and the computation is slower.")
        return module
    # It warns on machines without a GPU that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return cast(nn.Module, torch.compile(module, dynamic=False, options=dict(options) if options else None))
