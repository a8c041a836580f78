"""The output of commands: results on standard output, progress and notes on standard error.

Progress looks the same everywhere: the task, how much of it is done, how fast, and how long it will still take.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any

import click
from rich import box
from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.panel import Panel
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from ddkit.runtime.environment import is_main
from ddkit.runtime.progress import Progress, span_text

_SECONDS_BETWEEN_LINES = 15.0  # of progress, if standard error is not a terminal
_SECONDS_OF_RATE = 60.0  # over which speed and remaining time are estimated
_SECONDS_OF_PAUSE = 10.0  # without a report of a task, in which another one reports: they do not count for its speed
_WIDTH_WITHOUT_TERMINAL = 160  # columns of a result that goes to a file or another program
_MOST_BARS = 5
_NARROW = 80  # columns; narrower terminals show counts without a bar


class Output:
    """Prints a command's results, notes and progress, for the person or the program that called it.

    Of processes that were launched together the main one prints, and the others print errors only.
    as_json: print results as JSON. quiet: print nothing but errors on standard error.
    verbosity: 1 for ddkit's own log, 2 for those of the libraries as well.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, verbosity: int = 0) -> None:
        self.as_json = as_json
        self.quiet = quiet or not is_main()
        self.verbosity = verbosity
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)
        self._began = time.monotonic()
        self._tasks: dict[str, Task] = {}  # the latest few
        self._latest = ""  # name of the task that reported last
        self._bars: Bars | None = None

    def __enter__(self) -> Output:
        if self.quiet or not self.err.is_terminal:
            # Read once, when its library is loaded, which is later. Its bars would fill a log with lines.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        ours, everyone = logging.getLogger("ddkit"), logging.getLogger()
        self._logger = everyone if self.verbosity >= 2 else ours
        self._levels = {logger: logger.level for logger in (ours, everyone)}
        self._handler = RichHandler(console=self.err, show_time=False, show_path=False)
        self._handler.setFormatter(logging.Formatter("%(message)s"))
        self._logger.addHandler(self._handler)
        chosen = (logging.WARNING, logging.INFO, logging.DEBUG)[min(self.verbosity, 2)]
        ours.setLevel(logging.ERROR if self.quiet else chosen)
        everyone.setLevel(logging.INFO if self.verbosity >= 2 else logging.WARNING)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop_bars()
        # Commands follow one another in one process in tests.
        self._logger.removeHandler(self._handler)
        for logger, level in self._levels.items():
            logger.setLevel(level)

    def note(self, text: str, *, label: str = "") -> None:
        """Print a note on standard error. label: what it begins with in yellow, such as "warning"."""
        if not self.quiet:
            # A line of a log stays one line, however long it is.
            self.err.print(Text.assemble((f"{label} " if label else "", "yellow"), text), soft_wrap=not self.err.is_terminal)

    def progress(self, progress: Progress) -> None:
        """Show how far a long computation is: as a bar on a terminal, otherwise as a line every few seconds."""
        if self.quiet:
            return
        now = time.monotonic()
        task = self.track(progress, now)
        if self.err.is_terminal and not self.err.is_dumb_terminal:
            self._show_bar(task, progress, now)
        elif _is_finished(progress) or now - task.shown >= _SECONDS_BETWEEN_LINES:
            task.shown = now
            parts = [f"{progress.task}: {count_text(progress)}", task.pace(now, progress)]
            line = f"{', '.join(filter(None, parts))}  {figures_text(progress)}"
            self.err.print(line.rstrip(), soft_wrap=True)

    def track(self, progress: Progress, now: float) -> Task:
        """The task that a report is of, after taking note of it."""
        task = self._tasks.get(progress.task)
        if task is None or progress.done < task.done:  # a new task, or the same one from the start: the next round
            task = self._begin(progress.task, Task(now, progress.done))
        task.advance(now, progress.done, resumed=self._latest != progress.task)
        self._latest = progress.task
        return task

    def result(self, data: Any, shown: RenderableType | None = None, *, paged: bool = False) -> None:
        """Print the command's result on standard output: `data` as JSON, or `shown`, which rich renders.

        paged: through the user's pager if it is longer than the screen of a terminal.
        """
        self._stop_bars()
        if not is_main():
            return
        if self.as_json:
            click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))
        elif paged and self.out.is_terminal:
            with self.out.capture() as captured:
                self.out.print(shown)
            text = captured.get()
            if text.count("\n") < self.out.height:
                click.echo(text, nl=False)
            else:
                click.echo_via_pager(text)
        elif shown is not None:
            self.out.print(shown, soft_wrap=isinstance(shown, str) and not self.out.is_terminal)

    def finish(self, outputs: Sequence[object], next_command: str = "", *arguments: object) -> None:
        """Print at a command's end how long it took, which files it wrote, and what to type next.

        arguments: of the next command, such as a path, which are quoted for the shell where that is needed.
        """
        self._stop_bars()
        next_command = " ".join([next_command, *(shlex.quote(str(each)) for each in arguments)])
        if self.quiet:
            return
        if self.err.is_terminal and outputs:
            self.err.print(_summary(time.monotonic() - self._began, outputs, next_command))
            return
        for output in outputs:
            self.note(f"wrote {output}")
        if next_command:
            self.note(f"next: {next_command}")

    def _begin(self, name: str, task: Task) -> Task:
        earlier = self._tasks.get(name)
        task.bar = earlier.bar if earlier else None
        if earlier is None and len(self._tasks) >= _MOST_BARS:
            oldest = self._tasks.pop(next(iter(self._tasks)))
            if self._bars is not None and oldest.bar is not None:
                self._bars.remove_task(oldest.bar)
        self._tasks[name] = task
        return task

    def _show_bar(self, task: Task, progress: Progress, now: float) -> None:
        if self._bars is None:
            self._bars = _bars(self.err)
            self._bars.start()
        if task.bar is None:
            task.bar = self._bars.add_task(progress.task, total=progress.total, count="", pace="", figures="")
        self._bars.update(
            task.bar,
            completed=progress.done,
            total=progress.total,
            count=count_text(progress),
            pace=task.pace(now, progress),
            figures=figures_text(progress),
        )

    def _stop_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._tasks = None, {}


def plain_table(*headings: str, right: Collection[str] = ()) -> Table:
    """A table without lines, in which long cells are folded. right: headings of columns of numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="right" if heading in right else "left")
    return table


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        # A character that the encoding does not have must not cost the result.
        stream.reconfigure(errors="replace")
    # Names of files and sets may look like markup. Where something is styled, it is a Text.
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_WITHOUT_TERMINAL
    return console


def _summary(seconds: float, outputs: Sequence[object], next_command: str) -> Panel:
    lines = Table.grid(padding=(0, 1))
    lines.add_column()
    lines.add_column(overflow="fold")
    for output in outputs:
        lines.add_row(Text("wrote", style="green"), Text(str(output)))
    if next_command:
        lines.add_row(Text("next", style="cyan"), Text(next_command, style="bold"))
    # Without lines at the sides, so that paths and commands can be copied.
    return Panel(lines, title=f"done in {span_text(seconds)}", title_align="left", box=box.HORIZONTALS, style="none",
                 border_style="dim", padding=(0, 1))  # fmt: skip


class Task:
    """A running task: since when it has been watched, and how far it was at moments of the last minute."""

    def __init__(self, now: float, done: float) -> None:
        self.began = now
        self.done = done
        self._reported = now
        self.shown = -math.inf  # when a line of a log was last printed of it
        self.bar: TaskID | None = None
        self._samples = deque([(now, done)])

    def advance(self, now: float, done: float, *, resumed: bool) -> None:
        """Take note of how far it is. resumed: another task has reported since the last call, such as a validation."""
        pause = now - self._reported
        if resumed and pause > _SECONDS_OF_PAUSE:
            self._samples = deque((time + pause, done) for time, done in self._samples)
        self.done, self._reported = done, now
        if now - self._samples[-1][0] >= 1:
            self._samples.append((now, done))
        # The oldest one that stays is a minute old or older, so that there is a rate however rare the reports are.
        while len(self._samples) > 1 and self._samples[1][0] <= now - _SECONDS_OF_RATE:
            self._samples.popleft()

    def pace(self, now: float, progress: Progress) -> str:
        """`403/s, 2 min left` by the rate of the last minute; `in 75 s` if finished; empty if nothing is known."""
        if _is_finished(progress) and now > self.began:
            return f"in {span_text(now - self.began)}"
        since, done = self._samples[0]
        if now <= since or progress.done <= done:
            return ""
        speed = (progress.done - done) / (now - since)
        parts = []
        if progress.unit != "s":  # seconds pass at one a second
            parts.append(f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s" if speed >= 0.95 else f"{1 / speed:.1f} s each")
        if progress.total is not None:
            parts.append(f"{span_text((progress.total - progress.done) / speed)} left")
        return ", ".join(parts)


def _bars(console: Console) -> Bars:
    def column(field: str, style: str = "none", ratio: int | None = None) -> TextColumn:
        return TextColumn(field, style=style, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=ratio))

    count, pace = column("{task.fields[count]}", "progress.percentage"), column("{task.fields[pace]}", "progress.remaining")
    if console.width < _NARROW:
        return Bars(column("{task.description}", ratio=1), count, pace, console=console)
    bar = BarColumn(bar_width=30)
    return Bars(column("{task.description}"), bar, count, pace, column("{task.fields[figures]}"), console=console)


def has_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _is_finished(progress: Progress) -> bool:
    return progress.total is not None and progress.done >= progress.total


def count_text(progress: Progress) -> str:
    total = "" if progress.total is None else f"/{progress.total:,.0f}"
    return f"{progress.done:,.0f}{total} {progress.unit}".rstrip()


def figures_text(progress: Progress) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in progress.figures.items())
