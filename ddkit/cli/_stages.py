"""The stages of an entry on the screen: one live table on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ddkit.cli._output import Output, Task, count_text, figures_text, has_unicode
from ddkit.runtime.progress import Progress, span_text

if TYPE_CHECKING:
    from ddkit.entering.entry import StageState

_MARKS = {"to come": "", "running": "▶", "done": "✓", "stopped": "‖", "left out": "–"}
_ASCII_MARKS = {"to come": "", "running": ">", "done": "x", "stopped": "!", "left out": "-"}
_STYLES = {"to come": "dim", "running": "bold", "done": "green", "stopped": "yellow", "left out": "yellow"}
_REFRESHES_PER_SECOND = 2


class StageView:
    """Shows stages and the progress of the one that runs. A context manager."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._states: tuple[StageState, ...] = ()
        self._began = time.monotonic()  # of the stage that runs
        self._report: Progress | None = None
        self._task: Task | None = None  # that the report is of
        self._live: Live | None = None
        if output.err.is_terminal and not output.err.is_dumb_terminal and not output.quiet:
            self._live = Live(
                console=output.err, get_renderable=self._shown, refresh_per_second=_REFRESHES_PER_SECOND, redirect_stdout=False
            )

    def __enter__(self) -> StageView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._report = None
            self._live.stop()

    def watch(self, states: Sequence[StageState]) -> None:
        """Take the new state of all stages."""
        before, self._states = self._states, tuple(states)
        running = {state.name for state in before if state.status == "running"}
        if any(state.status == "running" and state.name not in running for state in states):
            self._began, self._report = time.monotonic(), None
        if self._live is None:
            self._print_changes({state.name: state.status for state in before})

    def progress(self, report: Progress) -> None:
        """Take a report of the stage that runs."""
        if self._live is None:
            self._output.progress(report)
            return
        self._task, self._report = self._output.track(report, time.monotonic()), report

    def _print_changes(self, before: dict[str, str]) -> None:
        if not before and (done := [state.name for state in self._states if state.status == "done"]):
            self._output.note(f"Done already: {', '.join(done)}.")
        for number, state in enumerate(self._states, start=1):
            if state.status in ("to come", before.get(state.name)) or not before and state.status == "done":
                continue
            place = f"[{number}/{len(self._states)}] {state.name}"
            if state.status == "running":
                self._output.note(f"{place}: about {span_text(state.expected)}, {span_text(self._left())} left in all.")
            elif state.seconds is not None and state.status != "left out":
                self._output.note(f"{place}: {state.status} after {span_text(state.seconds)}.")
            else:
                self._output.note(f"{place}: {state.status}.")

    def _left(self) -> float:
        """Seconds that the stages to come and the rest of the one that runs will take, about."""
        left = sum(state.expected for state in self._states if state.status == "to come")
        running = time.monotonic() - self._began
        rests = (each.expected - (each.seconds or 0.0) - running for each in self._states if each.status == "running")
        return left + sum(max(0.0, rest) for rest in rests)

    def _shown(self) -> RenderableType:
        if not self._states:  # while the machine is measured
            return Text("" if self._report is None else f"{self._report.task}: {count_text(self._report)}")
        table = stage_table(self._states, self._output, running=time.monotonic() - self._began)
        parts: list[RenderableType] = [table]
        if self._task is not None and self._report is not None:
            line = Table.grid(padding=(0, 1))
            line.add_row(
                Text(self._report.task),
                ProgressBar(self._report.total, self._report.done, width=24) if self._report.total else Text(),
                Text(count_text(self._report), style="progress.percentage"),
                Text(self._task.pace(time.monotonic(), self._report), style="progress.remaining"),
                Text(figures_text(self._report)),
            )
            parts.append(line)
        if any(state.status in ("to come", "running") for state in self._states):
            parts.append(Text(f"about {span_text(self._left())} left", style="dim"))
        return Group(*parts)


def stage_table(states: Sequence[StageState], output: Output, *, running: float | None = None) -> Table:
    """Stages with what they take. running: seconds of the stage that runs in this call, if one does."""
    marks = _MARKS if has_unicode(output.err) else _ASCII_MARKS
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    table.add_column("stage", overflow="fold")
    table.add_column("state")
    table.add_column("time", justify="right")
    for state in states:
        took = state.seconds
        if state.status == "running" and running is not None:
            took = running + (took or 0.0)
        if state.status == "to come":
            shown = f"about {span_text(state.expected)}"
        elif state.status == "running" and took is not None:
            shown = f"{span_text(took)} of about {span_text(state.expected)}"
        else:
            shown = "" if took is None else span_text(took)
        table.add_row(marks[state.status], state.name, state.status, shown, style=_STYLES[state.status])
    return table
