"""Which device is taken, what is said where a GPU cannot be, and which errors of PyTorch mean that memory is short."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch

from ddkit.errors import ComputeError, UsageError
from ddkit.runtime import container
from ddkit.runtime.device import (
    explain_gpu_error,
    free_memory,
    is_out_of_memory,
    larger_gpu,
    release_memory,
    resolve_device,
    shared_gpus,
    upload,
)

GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]


def refused(name):
    with pytest.raises(ComputeError) as caught:
        resolve_device(name)
    return str(caught.value)


def test_auto_is_a_gpu_where_there_is_one(gpu):
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:0").index == 0


def test_unknown_device_raises_usage_error_that_lists_the_known_ones():
    with pytest.raises(UsageError, match="Known: auto, cpu, cuda, cuda:N, mps"):
        resolve_device("gpu")


def test_number_of_a_gpu_that_is_not_there_says_which_are(gpu):
    assert refused("cuda:1") == (
        "There is no GPU 'cuda:1': PyTorch can use only cuda:0 here. Try --device cuda:0, or check CUDA_VISIBLE_DEVICES."
    )
    gpu.memory *= 3
    assert "PyTorch can use 3 here, from cuda:0 to cuda:2." in refused("cuda:3")


def test_larger_gpu_is_named_where_one_has_enough_memory(gpu, second_gpu):
    gpu.memory = [(3 * GIB, 4 * GIB), (20 * GIB, 24 * GIB)]
    assert larger_gpu(torch.device("cuda"), 10 * GIB) == " Try --device cuda:1, which has 24.0 GiB."
    assert larger_gpu(torch.device("cuda"), 30 * GIB) == larger_gpu(torch.device(second_gpu), 10 * GIB) == ""
    assert larger_gpu(torch.device("cpu"), 10 * GIB) == ""


def test_free_memory_is_what_the_container_leaves(tmp_path, monkeypatch):
    files = {"cgroup": "0::/\n", "mountinfo": f"30 23 0:28 / {tmp_path} rw - cgroup2 cgroup2 rw\n", "memory.max": "9000000",
             "memory.current": "1000000", "memory.stat": "inactive_file 0\n"}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(container.free_memory, "__defaults__", (tmp_path,))
    assert free_memory(torch.device("cpu")) == 8_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_memory(torch.device("cpu")) == 4_000_000


def test_processes_started_together_share_the_first_gpus(gpu, second_gpu, monkeypatch):
    assert shared_gpus(torch.device("cuda")) == [torch.device("cuda:0")]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert shared_gpus(torch.device("cuda")) == [torch.device("cuda:0"), torch.device("cuda:1")]


@pytest.fixture(scope="session")
def old_driver(tmp_path_factory):
    """A folder with a driver for CUDA 11.4, as far as PyTorch looks at it before it refuses."""
    compiler = shutil.which("cc")
    if compiler is None or not torch.version.cuda or sys.platform != "linux":
        pytest.skip("needs cc and a PyTorch for CUDA on Linux")
    folder = tmp_path_factory.mktemp("driver")
    sources = {
        "libcuda.so.1": "int cuInit(unsigned f) { return 0; }\nint cuDeviceGetCount(int *n) { *n = 1; return 0; }\n"
        "int cuDriverGetVersion(int *v) { *v = 11040; return 0; }\n",
        "libnvidia-ml.so.1": "int nvmlInit(void) { return 0; }\nint nvmlDeviceGetCount_v2(unsigned *n) { *n = 1; return 0; }\n",
    }
    for name, source in sources.items():
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", str(folder / name)]
        subprocess.run(command, input=source, text=True, check=True)
    return folder


CHOOSE = """
import sys
from ddkit.runtime.device import resolve_device
print(*(resolve_device("auto") for _ in range(3)))
sys.path[:0] = ["submission/track2", "ddkit/generator"]  # a bundle has the files of both in one folder
from types import SimpleNamespace as Job
from worker import choose_device
print(choose_device(Job(device="auto"), 0))
from ddkit.cli import main
main(["evaluate", "any.pt", "--device", "cuda:0"])
"""


# What LD_LIBRARY_PATH does for a process that Python itself starts, as it must to look for GPUs in earnest.
LOAD_DRIVER = """
import ctypes, sys
for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
    ctypes.CDLL(f"{sys.argv[1]}/{name}", ctypes.RTLD_GLOBAL)
"""


def choice(done):
    """The devices that a process takes, what it says, and what it says where a GPU is asked for; there it ends with 3."""
    assert done.returncode == 3, done.stderr
    *said, error, remedy = done.stderr.splitlines()
    return done.stdout.split(), said, f"{error} {remedy}"


@pytest.mark.slow
def test_driver_older_than_the_build_is_said_once_with_a_remedy(old_driver):
    environment = os.environ | {"LD_LIBRARY_PATH": str(old_driver)}
    done = subprocess.run([sys.executable, "-c", CHOOSE], capture_output=True, text=True, env=environment, cwd=ROOT)
    devices, said, error = choice(done)
    assert devices == ["cpu"] * 4
    reason = (
        "PyTorch cannot use the GPU: the NVIDIA driver is for CUDA 11 at most, and this PyTorch is built for CUDA "
        f"{torch.version.cuda}."
    )
    remedy = "Update the driver, or install an older build from https://pytorch.org; until then, try --device cpu."
    assert said == [f"{reason} Everything is computed on the CPU, much more slowly. {remedy}"]
    assert error == f"Error: {reason} {remedy}"


@pytest.mark.slow
def test_hidden_gpus_are_said_only_where_one_is_asked_for(old_driver):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    devices, said, error = choice(processes.run("-c", LOAD_DRIVER + CHOOSE, old_driver, env=environment, cwd=ROOT))
    assert devices == ["cpu"] * 4 and not said
    assert error == (
        "Error: PyTorch finds no GPU, and CUDA_VISIBLE_DEVICES is set to '', which may hide it. "
        "Unset CUDA_VISIBLE_DEVICES or set it to 0, or try --device cpu."
    )


@pytest.mark.parametrize(("error", "said"), [
    (torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "another process has it"),
    (torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"), "no code for this GPU"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory of the device is used up"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), "memory of this machine"),
    (MemoryError(), "memory of this machine is used up"),
])  # fmt: skip
def test_errors_of_a_gpu_are_explained_with_a_remedy(error, said):
    explained = explain_gpu_error(error)
    assert said in explained.message and explained.remedy.endswith(".")


def test_other_errors_are_not_explained_as_those_of_a_gpu():
    assert explain_gpu_error(RuntimeError("CUDA error: device-side assert triggered")) is None


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError(),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."),
], ids=lambda error: str(error)[:40])  # fmt: skip
def test_failed_allocation_is_out_of_memory(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED"),
    RuntimeError("expected scalar type Float but found Double"),
    ValueError("CUDA error: out of memory"),
])  # fmt: skip
def test_other_error_is_not_out_of_memory(error):
    assert not is_out_of_memory(error)


def test_error_while_one_of_memory_is_handled_is_out_of_memory():
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as error:
        assert is_out_of_memory(error)


def test_real_shortage_on_the_cpu_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def test_cached_memory_of_a_gpu_is_released(gpu):
    release_memory(torch.device("cpu"))
    assert gpu.released == 0
    release_memory(torch.device("cuda", 0))
    assert gpu.released == 1


def test_what_is_copied_from_a_gpu_to_the_cpu_is_complete(gpu):
    assert upload(torch.arange(3.0, device="cuda"), torch.device("cpu")).tolist() == [0, 1, 2]


def test_memory_that_pytorch_keeps_for_later_is_free(gpu, second_gpu):
    gpu.kept = 3 * GIB
    assert free_memory(torch.device(second_gpu)) == 73 * GIB
