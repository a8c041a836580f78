"""The devices to compute on."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from ddkit.errors import ComputeError, UsageError
from ddkit.runtime.environment import processes_here


def resolve_device(name: str) -> torch.device:
    """The device of that name: "auto", "cpu", "cuda", "cuda:N" or "mps".

    "auto" is a CUDA GPU if there is one, else the CPU. It is never MPS, on which nothing here has been tested.
    Raises UsageError for another name, and ComputeError for a device that this machine or PyTorch does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"Unknown device '{name}'.", "Known: auto, cpu, cuda, cuda:N, mps.") from error
    present = {
        "cpu": device.index in (None, 0),
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        raise ComputeError(f"This machine has no device '{name}' that PyTorch can use.", "Try --device auto.")
    return device


def own_device(device: torch.device) -> torch.device:
    """The device with its number: for "cuda", the GPU of this process of those that `accelerate launch` started."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(own_device(device))[0]
    return psutil.virtual_memory().available // processes_here()


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device, without waiting for a GPU; the tensor itself where it is there already."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def describe_device(device: torch.device) -> str:
    """The device's model for records, such as "AMD EPYC, 2 threads" or "NVIDIA H200"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{cpu_model()}, {torch.get_num_threads()} threads"
    return device.type


def is_out_of_memory(error: BaseException) -> bool:
    """True if PyTorch reports by this error that an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # PyTorch has no class for these: the CPU's allocator, contexts, modules and graphs of CUDA, and CUDA's libraries.
    # A capture that fails for want of memory raises an error that does not name it, while that one is handled.
    text = str(error)
    return (
        (error.__context__ is not None and is_out_of_memory(error.__context__))
        or ("DefaultCPUAllocator" in text and "memory" in text)
        or "CUDA error: out of memory" in text
        or re.search(r"(CUBLAS|CUDNN|CUSOLVER|CUFFT|CUSPARSE)_\w*ALLOC(ATION)?_FAILED", text) is not None
    )


def release_memory(device: torch.device) -> None:
    """Give memory that PyTorch keeps for later back to the GPU, where other processes may need it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def shortage_explained(explanation: Callable[[], ComputeError]) -> Iterator[None]:
    """Replace the error of a failed allocation in the context by the one that `explanation` makes."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise explanation() from error


def cpu_model() -> str:
    """The processor's model name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The names of the processor's instruction sets; empty if the system does not list them."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _cpuinfo(field: str) -> str:
    """A field of Linux's description of the first processor, or an empty text."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == field), "")
