"""The one look of progress and endings, as a person sees it on a terminal and as a log gets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from ddkit.cli import _output as _output
from ddkit.cli._output import Output, span_text
from ddkit.runtime.progress import Progress

SCRIPT = """
import time
from ddkit.cli._output import Output
from ddkit.runtime.progress import Progress

with Output({options}) as output:
    output.note("About to train [b].")
    for step in range(40, 101, 20):
        output.progress(Progress("Training [b]", step, 100, "images", {{"loss": 2.5 - step / 100}}))
        time.sleep(0.02)
    output.progress(Progress("Looking", 7, None, "files"))
    output.finish(["out/[x].pt", "out/" + "long" * 50], "ddkit check", "my set.pt")
    output.result({{"accuracy": 0.25}}, "0.25 [b]" + " long" * 50)
"""


def run(options: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """The script with pipes for output and errors."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(options=options)],
        capture_output=True, text=True, check=True, env={**os.environ, **env},
    )  # fmt: skip


def run_on_terminal(columns: int, **env: str) -> str:
    """All that the script writes to a terminal of that width."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update({"COLUMNS": str(columns), "TERM": "xterm-256color", **env})
        os.execv(sys.executable, [sys.executable, "-c", SCRIPT.format(options="")])
    with open(terminal, "rb", buffering=0) as screen:
        written = b""
        try:
            while block := screen.read(4096):
                written += block
        except OSError:
            pass  # how Linux says that the other side has closed
    os.waitpid(child, 0)
    return written.decode()


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


def test_results_and_progress_never_mix():
    ran = run()
    assert ran.stdout == "0.25 [b]" + " long" * 50 + "\n"
    assert "About to train [b]." in ran.stderr and "Training [b]" in ran.stderr


def test_a_log_has_whole_lines_without_color():
    lines = run().stderr.splitlines()
    assert lines[0] == "About to train [b]."
    assert lines[1] == "Training [b]: 40/100 images  loss 2.1"
    assert re.fullmatch(r"Training \[b\]: 100/100 images, in [\d.]+ m?s  loss 1.5", lines[2])
    assert lines[3:] == ["Looking: 7 files", "wrote out/[x].pt", "wrote out/" + "long" * 50, "next: ddkit check 'my set.pt'"]


def test_json_is_all_of_the_output():
    assert json.loads(run("as_json=True").stdout) == {"accuracy": 0.25}


def test_quiet_says_nothing():
    ran = run("quiet=True")
    assert ran.stderr == ""
    assert ran.stdout.startswith("0.25 [b]")


def test_of_processes_launched_together_the_main_one_speaks():
    ran = run(RANK="1", WORLD_SIZE="2")
    assert (ran.stdout, ran.stderr) == ("", "")


def test_a_terminal_shows_what_how_far_how_fast_and_the_summary():
    shown = visible(run_on_terminal(110))
    assert re.search(r"Training \[b\] +━+ +100/100 images +in [\d.]+ s +loss 1.5", shown)
    assert "7 files" in shown
    assert re.search(r"─ done in [\d.]+ s ─", shown)
    assert re.search(r"wrote +out/\[x\]\.pt", shown) and re.search(r"next +ddkit check", shown)


def test_a_narrow_terminal_keeps_each_bar_on_one_line():
    shown = visible(run_on_terminal(60))
    assert max(map(len, shown.splitlines())) <= 60
    assert re.search(r"Training \[b\] +100/100 images +in [\d.]+ s", shown)


def test_no_color_is_respected():
    assert "\x1b[3" in run_on_terminal(100)
    assert "\x1b[3" not in run_on_terminal(100, NO_COLOR="1")


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that stands still until the test moves it."""
    now = [1000.0]
    monkeypatch.setattr(_output.time, "monotonic", lambda: now[0])
    return now


def test_lines_of_a_log_are_far_apart_and_count_only_this_run(clock, capsys):
    output = Output()
    for done in (500, 510, 520, 560):
        output.progress(Progress("Training", done, 1000, "steps"))
        clock[0] += 10
    assert capsys.readouterr().err.splitlines() == [
        "Training: 500/1,000 steps",
        # 20 steps in 20 s, not 520; the report 10 s after the first is left out.
        "Training: 520/1,000 steps, 1.0/s, 8 min left",
    ]


def test_rate_and_time_left_are_those_of_the_last_minute(clock, capsys):
    output = Output()
    for step in range(31):  # 10 images a second for five minutes, then a tenth of that
        output.progress(Progress("Training", 100 * step, 10_000, "images"))
        clock[0] += 10
    for step in range(1, 13):
        output.progress(Progress("Training", 3000 + 10 * step, 10_000, "images"))
        clock[0] += 10
    lines = capsys.readouterr().err.splitlines()
    assert "Training: 2,800/10,000 images, 10/s, 12 min left" in lines
    assert lines[-1] == "Training: 3,120/10,000 images, 1.0/s, 1.9 h left"


def test_time_spent_in_another_task_does_not_count_for_the_rate(clock, capsys):
    output = Output()
    for step in range(1, 21):  # a step a second, and after ten of them a validation of a minute
        output.progress(Progress("Refining", step, 1000, "steps"))
        if step == 10:
            for epoch in range(1, 13):
                clock[0] += 5
                output.progress(Progress("Validating", epoch, 12, "epochs"))
        clock[0] += 1
    refining = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Refining")]
    assert refining[-1].startswith("Refining: 11/1,000 steps, 1.1/s, 15 min left"), refining


def test_rate_of_reports_that_are_rare_is_that_since_the_last_one(clock, capsys):
    output = Output()
    for done in (0, 1, 3):
        output.progress(Progress("Epochs", done, 10, "epochs"))
        clock[0] += 200
    assert capsys.readouterr().err.splitlines()[1:] == [
        "Epochs: 1/10 epochs, 200.0 s each, 30 min left", "Epochs: 3/10 epochs, 100.0 s each, 12 min left",
    ]  # fmt: skip


def test_seconds_have_no_speed(clock, capsys):
    output = Output()
    for done in (0, 20):
        output.progress(Progress("Refining", done, 60, "s"))
        clock[0] += 20
    assert capsys.readouterr().err.splitlines()[1] == "Refining: 20/60 s, 40 s left"


def test_rate_of_a_task_that_begins_again_is_measured_again(clock, capsys):
    output = Output()
    for done in (1, 3, 1, 3):
        output.progress(Progress("Round", done, 3))
        clock[0] += 4
    assert capsys.readouterr().err.splitlines() == [
        "Round: 1/3", "Round: 3/3, in 4 s", "Round: 1/3", "Round: 3/3, in 4 s",
    ]  # fmt: skip


@pytest.mark.parametrize(("seconds", "text"), [(0.42, "0.4 s"), (3.2, "3 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")])
def test_spans_read_well(seconds, text):
    assert span_text(seconds) == text
