"""`ddkit doctor`: a table for the eye, JSON for programs, a status for scripts."""

import json

import pytest
from click.testing import CliRunner

from ddkit.cli import main


@pytest.mark.slow
def test_doctor_prints_json_with_a_status_a_line(work):
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    lines = json.loads(result.stdout)
    assert {line["status"] for line in lines} <= {"ok", "slow"}
    assert {"Python", "cache"} <= {line["what"] for line in lines}


@pytest.mark.slow
def test_doctor_with_a_damaged_dataset_ends_with_status_3(own_cache, work):
    (own_cache / "glyphs").mkdir()
    (own_cache / "glyphs" / "meta.json").write_text("{")
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 3
    assert "broken" in result.stdout and "glyphs" in result.stdout
