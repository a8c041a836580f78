"""The check of a GPU: steps that fail or hang do not stop it, and a table ends it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_gpu.py"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import check_gpu

    return check_gpu


def test_step_that_fails_is_reported_with_its_output(tool):
    found = tool.run(tool.Step("broken", 60, (sys.executable, "-c", "print('why'); raise SystemExit(3)")), 60)
    assert found["status"] == 3 and found["output"] == ["why"]


def test_figures_of_a_step_are_in_its_row_of_the_table(tool):
    command = (sys.executable, "-c", "print(' ddkit:  12.5 images/s\\nnoise\\nratio:   2.00    and more')")
    found = tool.run(tool.Step("sampling", 60, command, r".*images/s$|ratio: *[\d.]+"), 60)
    row = tool.table([found]).splitlines()[-1]
    assert row.startswith("| sampling | ok |") and row.endswith("| ddkit: 12.5 images/s, ratio: 2.00 |")


@pytest.mark.slow
def test_step_that_hangs_is_killed_with_its_children(tool, tmp_path):
    started = tmp_path / "pid"
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(started)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    found = tool.run(tool.Step("hangs", 5, (sys.executable, "-c", code)), 5)
    assert found["status"] == "stopped after 5 s"
    child = int(started.read_text())
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the step had started still runs")


@pytest.mark.slow
def test_small_check_on_a_cpu_writes_a_line_for_each_step(tmp_path):
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, str(TOOL), "--device", "cpu", "--small", "--seconds", "400", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["step"] for line in lines[:2]] == ["machine", "sampling, preset tiny"] and len(lines) == 4
    assert done.returncode == 0, done.stdout
    assert all(line["status"] == 0 for line in lines) and "| machine | ok |" in done.stdout
    assert "images/s" in done.stdout.splitlines()[-3]


def test_steps_without_time_left_are_in_the_file_and_in_the_table(tool, tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.jsonl"
    words = ["--device", "cpu", "--small", "--seconds", "0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *words])
    assert tool.main() == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["step"] for line in lines[:2]] == ["machine", "sampling, preset tiny"] and len(lines) == 4
    assert {line["status"] for line in lines} == {"no time left"}
    assert "| machine | no time left | 0.0 |  |" in capsys.readouterr().out
