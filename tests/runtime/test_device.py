"""Which errors of PyTorch mean that memory is short."""

import pytest
import torch

from ddkit.runtime.device import is_out_of_memory, release_memory


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
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
