"""The devices to compute on."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator

import psutil
import torch

from ddkit.errors import ComputeError, UsageError, counted
from ddkit.runtime import container
from ddkit.runtime.container import BFLOAT16_FLAGS, cpu_flags, cpuinfo
from ddkit.runtime.environment import processes_here

_log = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """The device of that name: "auto", "cpu", "cuda", "cuda:N" or "mps".

    "auto" is a CUDA GPU if there is one that PyTorch can use, else the CPU. It is never MPS, on which nothing here has been
    tested. Raises UsageError for another name, and ComputeError for a device that this machine or PyTorch does not have.
    """
    gpus = usable_gpus()
    if name == "auto":
        if not gpus and torch.cuda.device_count():
            finding, remedy = why_no_gpu()
            _warn_once(f"{finding} Everything is computed on the CPU, much more slowly. {remedy}")
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"Unknown device '{name}'.", "Known: auto, cpu, cuda, cuda:N, mps.") from error
    present = {
        "cpu": device.index in (None, 0),
        "cuda": (device.index or 0) < gpus,
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        finding, remedy = f"This machine has no device '{name}' that PyTorch can use.", "Try --device auto."
        if device.type == "cuda" and gpus:
            usable = "only cuda:0 here" if gpus == 1 else f"{gpus} here, from cuda:0 to cuda:{gpus - 1}"
            finding = f"There is no GPU '{name}': PyTorch can use {usable}."
            remedy = "Try --device cuda:0, or check CUDA_VISIBLE_DEVICES."
        elif device.type == "cuda":
            finding, remedy = why_no_gpu()
        raise ComputeError(finding, remedy)
    return device


def usable_gpus() -> int:
    """How many CUDA GPUs PyTorch can use here; 0 with a driver that is too old for it, which PyTorch's own count ignores."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an old driver: callers say it in a sentence
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def why_no_gpu() -> tuple[str, str]:
    """Why PyTorch cannot use a GPU here, and what to do about it; for a machine where `usable_gpus` is 0."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        return (
            f"PyTorch cannot use a GPU: torch {torch.__version__} was built without CUDA.",
            "Install a build with CUDA from https://pytorch.org, or try --device cpu.",
        )
    if visible is not None and not torch.cuda.device_count():
        return (
            f"PyTorch finds no GPU, and CUDA_VISIBLE_DEVICES is set to '{visible}', which may hide it.",
            "Unset CUDA_VISIBLE_DEVICES or set it to 0, or try --device cpu.",
        )
    try:
        torch.cuda.init()
        reason = "none was found"
    except RuntimeError as error:
        reason = str(error).split(". ")[0]
    if "too old" in reason:
        version = re.search(r"version (\d+)\d{3}|$", reason)
        newest = f"is for CUDA {int(version[1])} at most" if version and version[1] else "is too old"
        return (
            f"PyTorch cannot use the GPU: the NVIDIA driver {newest}, and this PyTorch is built for CUDA {torch.version.cuda}.",
            "Update the driver, or install an older build from https://pytorch.org; until then, try --device cpu.",
        )
    return f"PyTorch cannot use a GPU: {reason[:1].lower()}{reason[1:]}.", "Try --device cpu, which --device auto takes here."


def explain_gpu_error(error: Exception) -> ComputeError | None:
    """The error in words for the user, where a GPU refused to work or memory ran out; None for other errors."""
    text = str(error)
    if "busy or unavailable" in text:
        return ComputeError(
            "The GPU is busy: another process has it for itself.",
            "Wait for that process, which nvidia-smi shows, or choose another --device. Saved states are kept.",
        )
    if "no kernel image is available" in text:
        return ComputeError(
            f"torch {torch.__version__} has no code for this GPU.",
            "Install a build for it from https://pytorch.org, or try --device cpu.",
        )
    if is_out_of_memory(error):
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
            return ComputeError(
                "The memory of this machine is used up.", "Close other programs that use it. Saved states are kept."
            )
        return ComputeError(
            "The memory of the device is used up.",
            "Close other programs that use it, which nvidia-smi shows for a GPU, or choose another --device. "
            "Saved states are kept.",
        )
    return None


def own_device(device: torch.device) -> torch.device:
    """The device with its number: for "cuda", the GPU of this process of those that `accelerate launch` started."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate there."""
    if device.type == "cuda":
        device = own_device(device)
        kept_for_later = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept_for_later
    return min(psutil.virtual_memory().available, container.free_memory()) // processes_here()


def shared_gpus(device: torch.device) -> list[torch.device]:
    """The GPUs of all processes that were started together on this machine; `device` alone in a single process."""
    if processes_here() == 1:
        return [own_device(device)]
    return [torch.device("cuda", index) for index in range(min(processes_here(), torch.cuda.device_count()))]


def larger_gpu(device: torch.device, needed: int) -> str:
    """A sentence that names another GPU which has so many bytes of memory, as " Try --device cuda:1 ..."; or ""."""
    if device.type == "cuda" and processes_here() == 1:
        for index in range(torch.cuda.device_count()):
            total = torch.cuda.get_device_properties(index).total_memory
            if index != own_device(device).index and total > needed:
                return f" Try --device cuda:{index}, which has {total / 2**30:.1f} GiB."
    return ""


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device, without waiting for a CUDA GPU; the tensor itself where it is there already."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    # MPS would read memory that is freed meanwhile (PyTorch issue 189690), and the CPU what has not arrived.
    return tensor.to(device, non_blocking=device.type == "cuda")


def describe_device(device: torch.device) -> str:
    """The device's model for records, such as "AMD EPYC, 2 threads" or "NVIDIA H200"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{cpu_model()}, {counted(torch.get_num_threads(), 'thread', 'threads')}"
    return device.type


@functools.cache
def _warn_once(text: str) -> None:
    _log.warning("%s", text)


def is_out_of_memory(error: BaseException) -> bool:
    """True if Python or PyTorch reports by this error that an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # PyTorch has no class for these: the CPU's allocator, contexts, modules and graphs of CUDA, and CUDA's libraries.
    # A capture that runs out of memory raises another error, in whose context is the one that says so.
    text = str(error)
    return (
        (error.__context__ is not None and is_out_of_memory(error.__context__))
        or ("DefaultCPUAllocator" in text and "memory" in text)
        or "CUDA error: out of memory" in text
        or re.search(r"(CUBLAS|CUDNN|CUSOLVER|CUFFT|CUSPARSE)_\w*ALLOC(ATION)?_FAILED", text) is not None
    )


def release_memory(device: torch.device) -> None:
    """Give memory that PyTorch keeps for later back to the GPU, where other processes may need it."""
    # Up to 2.12, PyTorch refuses after a CUDA graph that could not be recorded (its pull request 180395).
    with contextlib.suppress(RuntimeError):
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def shortage_explained(explanation: Callable[[], ComputeError]) -> Iterator[None]:
    """Replace the error of a failed allocation in the context by the one that `explanation` makes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise explanation() from error


def cpu_model() -> str:
    """The processor's model name."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def has_bfloat16(device: torch.device) -> bool:
    """True if the device has instructions for bfloat16, and so computes networks faster in it than in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and bool(BFLOAT16_FLAGS & cpu_flags())
