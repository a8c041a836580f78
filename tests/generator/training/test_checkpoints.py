"""Checkpoints: rotation, damage, and that nothing in them is executed."""

import logging
import os
import pickle

import pytest
import torch

from ddkit.errors import BadFileError
from ddkit.generator.training.checkpoints import Checkpoint, list_checkpoints, load_checkpoint, load_latest, save_checkpoint


def checkpoint(step):
    return Checkpoint(step, 1.5, {"weight": torch.full((3,), float(step))}, {"decay": 1.0}, {"state": {}}, {})


@pytest.fixture
def folder(tmp_path):
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, "denoiser", checkpoint(step))
    save_checkpoint(tmp_path, "autoencoder", checkpoint(99))
    return tmp_path


def test_save_checkpoint_keeps_the_newest_two_of_each_stage(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["autoencoder-00000099.pt", "denoiser-00000010.pt", "denoiser-00000015.pt"]


def test_saved_checkpoint_loads_unchanged(folder):
    latest = load_latest(folder, "denoiser")
    assert (latest.step, latest.seconds) == (15, 1.5)
    assert torch.equal(latest.network["weight"], torch.full((3,), 15.0))
    assert load_latest(folder, "tuning") is None


def test_checkpoint_of_version_0_1_is_read(folder):
    newest = list_checkpoints(folder, "denoiser")[-1]
    value = torch.load(newest, weights_only=True)
    value = {name.replace("optimizer", "optimiser"): item for name, item in value.items()}
    torch.save({**value, "finished": True}, newest)
    assert load_latest(folder, "denoiser").optimizer == {"state": {}}


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_truncated_newest_checkpoint_is_skipped(folder, kept, caplog):
    newest = list_checkpoints(folder, "denoiser")[-1]
    newest.write_bytes(newest.read_bytes()[:kept])
    with caplog.at_level(logging.WARNING):
        assert load_latest(folder, "denoiser").step == 10
    assert newest.name in caplog.text


def test_no_readable_checkpoint_raises_bad_file_error_that_names_the_newest(folder, caplog):
    for path in list_checkpoints(folder, "denoiser"):
        path.write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING), pytest.raises(BadFileError, match="denoiser-00000015.pt is damaged") as caught:
        load_latest(folder, "denoiser")
    assert caught.value.remedy == "Start over with --fresh." and not caplog.text


def test_code_in_a_checkpoint_does_not_run(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    path = folder / "denoiser-00000020.pt"
    path.write_bytes(pickle.dumps({"format": 1, "network": Trap()}))
    torch.save({"format": 1, "network": Trap()}, folder / "denoiser-00000030.pt")
    for trap in (path, folder / "denoiser-00000030.pt"):
        with pytest.raises(BadFileError):
            load_checkpoint(trap)
    assert not (tmp_path / "sprung").exists()


def test_other_tensor_file_raises_bad_file_error(folder):
    torch.save({"images": torch.zeros(2)}, folder / "denoiser-00000040.pt")
    with pytest.raises(BadFileError, match="not a checkpoint of this version"):
        load_checkpoint(folder / "denoiser-00000040.pt")
