"""Numbers recorded from the official code: all of them where they are shared, else those small enough to keep here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
_FULL = Path(os.environ.get("DDKIT_TEST_GOLDENS", ROOT.parent / "shared" / "goldens"))
_KEPT = ROOT / "tests" / "fixtures" / "goldens"


class Golden:
    """The tensors of one dataset in a recorded file, read when asked for."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self.prefix = path, prefix

    def __getitem__(self, name):
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(f"{self.prefix}.{name}")

    def __contains__(self, name):
        return name in self.names()

    def names(self):
        with safe_open(self._path, "pt") as file:
            return {key.removeprefix(f"{self.prefix}.") for key in file.keys() if key.startswith(f"{self.prefix}.")}

    def network(self):
        """The official network at its recorded initial weights."""
        from ddkit.network.convnet import ConvNet

        initial = {name.removeprefix("init."): self[name] for name in self.names() if name.startswith("init.")}
        network = ConvNet(len(initial["classifier.bias"]), self["input"].shape[-1])
        network.load_state_dict(initial)
        return network

    def check_gradients(self, gradients, *, float64=False):
        """Compare gradients of the recorded batch, by parameter, with the recorded ones: 1e-4 absolute, except for one ReLU.

        In the recorded 64-pixel batch one value before a ReLU is -1.6e-6, less than the rounding error that the network
        accumulates until there, so that processors and algorithms differ in its sign: its path then has a gradient or
        none, up to 1.2e-3 in a weight, 0.2 % of a gradient's norm. In float64 the sign is certain, and so are gradients.
        """
        for key, gradient in gradients.items():
            recorded = self[f"grad.{key}"]
            error = gradient[: len(recorded)].float() - recorded
            if error.abs().max() > 1e-4:
                assert not float64 and error.norm() <= 3e-3 * recorded.norm(), key


def _open(name: str, prefix: str) -> Golden:
    for path in (_FULL / name, _KEPT / name):
        if path.is_file() and Golden(path, prefix).names():
            return Golden(path, prefix)
    pytest.skip(f"recorded numbers for {prefix} missing: {_FULL / name} (set DDKIT_TEST_GOLDENS to their folder)")


@pytest.fixture
def convnet_golden():
    return lambda name: _open("convnet.safetensors", name)


@pytest.fixture
def augment_golden():
    return lambda size: _open("augment.safetensors", f"s{size}")
