"""Compiling where it cannot work. Where it can, `test_sampling.py` compiles a model."""

import logging

import pytest
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
