"""Mutated submissions: no traceback, no hang, no growth, nothing executed. More of them: pytest --fuzz-files N."""

import io
import sys
from pathlib import Path

import processes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkit.challenge import DatasetSpec
from ddkit.sets.reading import read_tensor_bytes

WORKER = Path(__file__).with_name("fuzz_worker.py")
SPEC = DatasetSpec("tiny", 2, 4, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the worker limits its memory through /proc")
def test_mutated_files_do_no_harm(tmp_path, pytestconfig):
    count = pytestconfig.getoption("--fuzz-files")
    canary = tmp_path / "canary"
    workers = [processes.start(WORKER, str(seed), str(count // 2), canary) for seed in (1, 2)]
    for worker in workers:
        output, errors = worker.communicate()
        assert worker.returncode == 0, f"ended with {worker.returncode}: {errors[-2000:]}"
        assert int(output) == count // 2
    assert not canary.exists()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=2000))
def test_any_bytes_are_refused_with_a_finding(data):
    tensor, findings = read_tensor_bytes(data, "tiny.pt", SPEC, ipc=10)
    assert tensor is None and findings[0].level == "error"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=5), st.sampled_from([torch.float32, torch.float64, torch.uint8, torch.bool]))
def test_tensors_of_any_shape_and_type_are_judged(shape, dtype):
    if torch.Size(shape).numel() > 1_000_000:
        shape = shape[:2]
    buffer = io.BytesIO()
    torch.save(torch.zeros(shape, dtype=dtype), buffer)
    tensor, findings = read_tensor_bytes(buffer.getvalue(), "tiny.pt", SPEC, ipc=10)
    assert (tensor is not None) == (shape == [20, 3, 4, 4] and dtype == torch.float32)
    assert (tensor is None) == bool(findings)
