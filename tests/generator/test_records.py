"""The records of a training."""

import json

import pytest

from ddkit.errors import BadFile
from ddkit.generator.records import read_records


def test_records_are_read_once_each_and_a_torn_line_is_left_out(tmp_path):
    log = tmp_path / "metrics.jsonl"
    lines = [{"stage": "denoiser", "step": step, "loss": loss} for step, loss in ((10, 1.0), (20, 0.9), (10, 0.8))]
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "den')
    assert [(record["step"], record["loss"]) for record in read_records(log)] == [(10, 0.8), (20, 0.9)]
    assert read_records(tmp_path / "none.jsonl") == []
    with pytest.raises(BadFile):
        read_records(tmp_path)
