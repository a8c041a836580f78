"""PartialSet of a set that is not finished: what is taken up again, what is not, and that nothing stays behind."""

import logging
import signal
import time

import processes
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from ddkit.cli import main
from ddkit.distill.generate import FromModel, generate
from ddkit.distill.partial_set import PartialSet
from ddkit.generator.config import default_sampling

SHAPE = (3, 4, 4)


def rows(start, count):
    """Images each of which shows its own number."""
    return torch.arange(start, start + count, dtype=torch.uint8)[:, None, None, None].expand(-1, *SHAPE)


def part_files(folder):
    return sorted(folder.glob(".*.parts-*/*.safetensors"))


class TestParts:
    def parts(self, folder, **identity):
        return PartialSet(folder / "set.pt", {"guidance": 2.0, **identity}, SHAPE)

    def test_appended_rows_load_in_order(self, tmp_path):
        assert self.parts(tmp_path).load().shape == (0, *SHAPE)
        for start in (4, 0, 2):
            self.parts(tmp_path).append(start, rows(start, 2))
        assert torch.equal(self.parts(tmp_path).load(), rows(0, 6))

    def test_load_ends_at_a_gap_or_a_damaged_part(self, tmp_path, caplog):
        parts = self.parts(tmp_path)
        for start in (0, 2, 4, 8):
            parts.append(start, rows(start, 2))
        assert torch.equal(parts.load(), rows(0, 6))
        damaged = part_files(tmp_path)[1]
        damaged.write_bytes(damaged.read_bytes()[:50])
        with caplog.at_level(logging.WARNING):
            assert torch.equal(parts.load(), rows(0, 2))
        assert str(damaged) in caplog.text

    def test_parts_of_another_batch_size_hide_nothing(self, tmp_path):
        parts = self.parts(tmp_path)
        for start in (0, 4, 8):
            parts.append(start, rows(start, 4))
        part_files(tmp_path)[1].write_bytes(b"torn")
        for start in (4, 10):
            parts.append(start, rows(start, 6))
        assert torch.equal(parts.load(), rows(0, 16))

    def test_rows_of_other_settings_are_named_and_not_used(self, tmp_path, caplog):
        self.parts(tmp_path, steps=4).append(0, rows(0, 2))
        with caplog.at_level(logging.WARNING):
            ours = self.parts(tmp_path, steps=8)
        assert "steps: 4, not 8" in caplog.text and "guidance" not in caplog.text
        assert len(ours.load()) == 0
        assert len(self.parts(tmp_path, steps=4).load()) == 2
        ours.append(0, rows(0, 2))
        ours.discard()
        assert len(self.parts(tmp_path, steps=4).load()) == 2
        assert len(self.parts(tmp_path, steps=8).load()) == 0

    def test_rows_of_another_number_of_processes_are_not_taken_up_but_go_with_the_others(self, tmp_path):
        of_two = [PartialSet(tmp_path / "set.pt", {}, SHAPE, rank=rank, size=2) for rank in range(2)]
        for parts in of_two:
            parts.append(0, rows(0, 2))
        alone = PartialSet(tmp_path / "set.pt", {}, SHAPE)
        assert [len(parts.load()) for parts in (*of_two, alone)] == [2, 2, 0]
        PartialSet(tmp_path / "set-0.pt", {}, SHAPE).append(0, rows(0, 3))
        alone.discard()
        assert [path.parent.name.partition(".parts")[0] for path in part_files(tmp_path)] == [".set-0"]

    def test_set_names_are_not_patterns(self, tmp_path):
        one, other = (PartialSet(tmp_path / name, {}, SHAPE) for name in ("set[1].pt", "set1.pt"))
        for parts in (one, other):
            parts.append(0, rows(0, 2))
        one.discard()
        assert (len(one.load()), len(other.load())) == (0, 2)


# Plainly, every batch is a part; chosen from candidates, every class.
@pytest.mark.parametrize(
    ("ipc", "choice", "how"),
    [(40, {}, signal.SIGTERM), (10, {"candidates": 40, "select": "random"}, signal.SIGKILL)],
    ids=["plainly", "from candidates"],
)
@pytest.mark.slow
def test_stopped_or_killed_command_continues(colors, colors_model, tmp_path, ipc, choice, how):
    out = tmp_path / "sets" / "set.pt"
    words = [
        "generate", "-v", "--dataset", colors, "--model", str(colors_model), "--out",
        str(out), "--ipc", str(ipc), "--sampling-steps", "60", "--batch-size", "10",
        *(word for name, value in choice.items() for word in (f"--{name}", str(value))),
    ]  # fmt: skip
    said = _stopped(("-m", "ddkit", *words), out.parent, how)
    assert ("Run the same command again" in said) == (how is signal.SIGTERM)
    assert not out.exists()
    rows_kept = sum(len(load_file(path)["images"]) for path in part_files(out.parent))

    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert f"Continuing after {rows_kept} of {2 * ipc} images" in " ".join(done.stderr.split())
    assert {path.name for path in out.parent.iterdir()} == {"set.pt", "set.json", "set.png"}

    source = FromModel(colors_model, default_sampling("flow", steps=60, batch_size=10), **choice)
    at_once = generate(colors, ipc, source, tmp_path / "at-once.pt")
    assert torch.equal(*(torch.load(path, weights_only=True) for path in (out, at_once.tensor)))


def _stopped(command, folder, how):
    """Start it and send a signal once it has kept something; returns what it said."""
    process = processes.start(*command)
    limit = time.monotonic() + 120
    while not part_files(folder) and process.returncode is None:
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(how)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == (-how if how is signal.SIGKILL else 130), said
    return " ".join(said.split())
