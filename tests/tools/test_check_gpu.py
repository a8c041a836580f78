"""The check of a GPU: steps that fail or hang do not stop it, and a table ends it."""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import processes
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
    found = tool.run(tool.Step("hangs", 3, (sys.executable, "-c", code)), 3)
    assert found["status"] == "stopped after 3 s"
    child = int(started.read_text())
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the step had started still runs")


@pytest.mark.slow
def test_every_command_of_a_small_check_works_on_a_cpu_and_prints_its_figures(tool, tmp_path):
    options = argparse.Namespace(small=True, device="cpu", official=None)
    environment = os.environ | {"PYTHONPATH": str(tool.ROOT), "OMP_NUM_THREADS": "1"}
    titles = []
    for step in tool.steps(options, tmp_path):
        done = processes.run(*step.command[1:], cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        assert re.findall(step.figures, done.stdout, re.MULTILINE), done.stdout
        titles.append(step.title)
    assert titles == ["machine", "sampling, preset tiny", "training, preset tiny", "minimax criteria"]


@pytest.mark.parametrize(("code", "status", "said"), [("print('9 images/s')", 0, "ok"), ("raise SystemExit(3)", 1, "3")])
def test_check_writes_a_line_for_each_step_and_its_status_says_if_one_failed(
    tool, tmp_path, monkeypatch, capsys, code, status, said
):
    chosen = [tool.Step(title, 60, (sys.executable, "-c", words)) for title, words in (("works", ""), ("other", code))]
    monkeypatch.setattr(tool, "steps", lambda options, folder: iter(chosen))
    out = tmp_path / "gpu.jsonl"
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--seconds", "400", "--out", str(out)])
    assert tool.main() == status
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["step"], line["status"]) for line in lines] == [("works", 0), ("other", 3 * status)]
    shown = capsys.readouterr().out
    assert "| works | ok |" in shown and f"| other | {said} |" in shown.splitlines()[-1]


def test_steps_without_time_left_are_in_the_file_and_in_the_table(tool, tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.jsonl"
    words = ["--device", "cpu", "--small", "--seconds", "0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *words])
    assert tool.main() == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["step"] for line in lines[:2]] == ["machine", "sampling, preset tiny"] and len(lines) == 4
    assert {line["status"] for line in lines} == {"no time left"}
    assert "| machine | no time left | 0.0 |  |" in capsys.readouterr().out
