"""Compiling where it can work."""

import logging

import pytest
import torch
from torch import nn

from ddkit.generator.compiling import can_compile, compiled


@pytest.fixture(autouse=True)
def tried_anew():
    can_compile.cache_clear()
    yield
    can_compile.cache_clear()


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_compiled_without_a_working_compiler_warns_and_returns_the_module(compiler, monkeypatch, caplog):
    monkeypatch.setenv("CXX", compiler)
    module = nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING):
        assert compiled(module) is module
    assert "No working C++ compiler" in caplog.text


@pytest.mark.slow
def test_compiled_module_computes_the_same():
    if not can_compile():
        pytest.skip("no C++ compiler with Python's headers")
    module, x = nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.ones(2, 4)
    torch.testing.assert_close(compiled(module)(x), module(x))
