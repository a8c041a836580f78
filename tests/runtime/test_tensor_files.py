"""Tensors on disk: the same bytes for the same tensors, and a full disk is one message."""

import os

import processes
import pytest
import torch
from safetensors import safe_open

from ddkit.runtime.tensor_files import UnloadableError, load_restricted, save_safetensors, save_torch


def test_the_bytes_do_not_depend_on_the_name(tmp_path):
    for name in ("one.pt", "another.pt"):
        save_torch({"x": torch.arange(5)}, tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()
    assert torch.load(tmp_path / "one.pt", weights_only=True)["x"].tolist() == [0, 1, 2, 3, 4]


def test_safetensors_with_what_they_are(tmp_path):
    save_safetensors({"x": torch.arange(5)}, tmp_path / "x.safetensors", {"of": "five"})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"of": "five"} and file.get_tensor("x").tolist() == [0, 1, 2, 3, 4]


class Code:
    """A pickle of it would make a folder wherever it is loaded plainly."""

    def __reduce__(self):
        return os.mkdir, ("made-by-code",)


def test_code_is_not_run_and_no_advice_given_to_run_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Code()}, tmp_path / "code.pt")
    with pytest.raises(UnloadableError) as caught:
        load_restricted(tmp_path / "code.pt")
    assert "weights_only" not in str(caught.value) and not (tmp_path / "made-by-code").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02.", b"\x80\x02K\x01R.", b"text"])
def test_file_without_tensors_is_unloadable(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UnloadableError):
        load_restricted(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError):
        load_restricted(tmp_path / "none.pt")


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from ddkit.errors import BadFileError
from ddkit.generator.autoencoder import build_autoencoder
from ddkit.generator.config import AutoencoderConfig
from ddkit.generator.model_folder import _save_part
from ddkit.runtime.tensor_files import save_safetensors, save_torch
tensor = torch.zeros(5000)
autoencoder = build_autoencoder(AutoencoderConfig(channels=(16,), latent_channels=2, norm_groups=4), 16, seed=0)
savings = {
    "torch": lambda path: save_torch(tensor, path),
    "safetensors": lambda path: save_safetensors({"x": tensor}, path),
    "part of a model": lambda path: _save_part(autoencoder, path),
}
for name, save in savings.items():
    save(Path(name))
before = sorted((str(file), file.stat().st_mtime_ns) for file in Path().rglob("*"))
# A limit on the size of files is what a test can have of a full disk without being root.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for name, save in savings.items():
    try:
        save(Path(name))
    except BadFileError as error:
        print(name, error.exit_code, sep=": ")
    assert sorted((str(file), file.stat().st_mtime_ns) for file in Path().rglob("*")) == before, name
"""


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_the_old_file_stays(tmp_path):
    done = processes.run("-c", FULL_DISK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["torch: 3", "safetensors: 3", "part of a model: 3"]
    assert {file.name for file in tmp_path.iterdir()} == {"torch", "safetensors", "part of a model"}
