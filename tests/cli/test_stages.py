"""The stages of an entry on the screen: a live table on a terminal, lines elsewhere, nothing when quiet."""

import dataclasses
import io
import time

import pytest
from rich.console import Console

from ddkit.cli._output import Output
from ddkit.cli._stages import StageView, stage_table
from ddkit.entering.entry import StageState
from ddkit.runtime.progress import Progress

STATES = (
    StageState("prepare cifar100", "done", 60.0),
    StageState("refine cifar100", "running", 600.0),
    StageState("evaluate submission cifar100", "to come", 300.0),
    StageState("report", "to come", 5.0),
)


@pytest.fixture
def written():
    return io.StringIO()


def output_to(file, *, terminal, quiet=False):
    output = Output(quiet=quiet)
    output.err = Console(file=file, force_terminal=terminal, width=110, highlight=False)
    return output


def show(output):
    """What a refinement that is then stopped by the time reports."""
    with StageView(output) as view:
        view.watch(
            tuple(dataclasses.replace(state, status="to come") if state.status == "running" else state for state in STATES)
        )
        view.watch(STATES)
        view.progress(Progress("Refining", 10, 100, "steps", {"loss": 3.5}))
        time.sleep(0.01)
        view.progress(Progress("Validating", 1, 2, "epochs"))
        view.progress(Progress("Refining", 20, 100, "steps", {"loss": 2.5}))
        output.note("a warning in between")
        view.watch((STATES[0], dataclasses.replace(STATES[1], status="stopped", seconds=700.0), *STATES[2:]))
        view.watch((*STATES[:2], dataclasses.replace(STATES[2], status="left out"), STATES[3]))


def test_on_a_terminal_one_table_shows_all_stages_and_the_time_left(written):
    output = output_to(written, terminal=True)
    show(output)
    shown = written.getvalue()
    for text in ("prepare cifar100", "of about 10 min", "left out", "about 5 s", "left", "a warning in between"):
        assert text in shown, text
    assert "\x1b[" in shown


def test_elsewhere_lines_say_what_begins_and_ends(written):
    show(output_to(written, terminal=False))
    lines = written.getvalue().splitlines()
    assert lines[0] == "Done already: prepare cifar100."
    assert lines[1] == "[2/4] refine cifar100: about 10 min, 15 min left in all."
    assert lines[2].startswith("Refining: 10/100 steps") and "loss 3.5" in lines[2]
    assert "[2/4] refine cifar100: stopped after 12 min." in lines
    assert "[3/4] evaluate submission cifar100: left out." in lines


def test_a_stage_that_is_continued_has_its_earlier_time_too(written):
    output = output_to(written, terminal=True)
    continued = (dataclasses.replace(STATES[1], seconds=240.0),)
    output.err.print(stage_table(continued, output, running=60.0))
    with StageView(output) as view:
        view.watch(continued)
    assert "5 min of about 10 min" in written.getvalue() and "about 6 min left" in written.getvalue()


def test_quiet_shows_nothing(written):
    show(output_to(written, terminal=True, quiet=True))
    assert written.getvalue() == ""


def test_marks_of_a_terminal_without_unicode_are_ascii():
    output = Output()
    output.err = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=100)
    printed = Console(file=io.StringIO(), width=100)
    printed.print(stage_table(STATES, output))
    assert "> " in printed.file.getvalue() and "▶" not in printed.file.getvalue()
