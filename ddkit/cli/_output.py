"""What commands say and show: results on standard output, progress and remarks on standard error.

Progress looks the same everywhere: what runs, how far it is, how fast it goes, how long it still takes.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import click
from rich import box
from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from ddkit.runtime.progress import Progress

_SECONDS_BETWEEN_LINES = 15.0  # of progress where standard error is no terminal
_WIDTH_WITHOUT_TERMINAL = 160  # columns of a result that goes to a file or another program
_MOST_BARS = 5
_NARROW = 80  # columns, below which the counts stand without a bar


class Output:
    """The one way from a command to the person or program that called it.

    as_json: results go to standard output as JSON and not as pictures for the eye.
    quiet: nothing on standard error but errors.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, verbosity: int = 0) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)
        self.verbosity = verbosity
        self._began = time.monotonic()
        self._live = _ProgressBars(self.err)
        self._lines = _ProgressLines(self.err)

    def __enter__(self) -> Output:
        ours, everyone = logging.getLogger("ddkit"), logging.getLogger()
        self._logger = everyone if self.verbosity >= 2 else ours
        self._levels = {logger: logger.level for logger in (ours, everyone)}
        self._handler = RichHandler(console=self.err, show_time=False, show_path=False)
        self._handler.setFormatter(logging.Formatter("%(message)s"))
        # The demo's commands run within one that speaks already: a warning is for telling once.
        self._outer = [handler for handler in self._logger.handlers if isinstance(handler, RichHandler)]
        for handler in self._outer:
            self._logger.removeHandler(handler)
        self._logger.addHandler(self._handler)
        chosen = (logging.WARNING, logging.INFO, logging.DEBUG)[min(self.verbosity, 2)]
        ours.setLevel(logging.ERROR if self.quiet else chosen)
        everyone.setLevel(logging.INFO if self.verbosity >= 2 else logging.WARNING)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._live.stop()
        # Commands follow one another in one process in the demo, in notebooks and in tests.
        self._logger.removeHandler(self._handler)
        for handler in self._outer:
            self._logger.addHandler(handler)
        for logger, level in self._levels.items():
            logger.setLevel(level)

    def say(self, text: str) -> None:
        """A remark for the person, on standard error. `text` may hold rich markup; escape what is not ours."""
        if not self.quiet:
            # In a log a line is a line, however long.
            self.err.print(text, soft_wrap=not self.err.is_terminal)

    def listen(self, progress: Progress) -> None:
        """The listener to hand to a long computation: a live bar, or a line every so often without a terminal."""
        if self.quiet:
            return
        if self.err.is_terminal and not self.err.is_dumb_terminal:
            self._live.show(progress)
        else:
            self._lines.show(progress)

    def result(self, data: Any, shown: RenderableType | None = None) -> None:
        """The command's result: `data` as JSON, or `shown` (rich) for the eye; both on standard output."""
        self._live.stop()
        if self.as_json:
            click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))
        elif shown is not None:
            self.out.print(shown)

    def page(self, shown: RenderableType) -> None:
        """A result that may be longer than the screen: through the user's pager on a terminal, else as it is."""
        self._live.stop()
        if not self.out.is_terminal:
            self.out.print(shown)
            return
        with self.out.capture() as captured:
            self.out.print(shown)
        text = captured.get()
        if text.count("\n") < self.out.height:
            click.echo(text, nl=False)
        else:
            click.echo_via_pager(text)

    def done(self, outputs: Sequence[object], next_command: str = "") -> None:
        """Ends a command: how long it took, where its output is, and what to type next."""
        self._live.stop()
        if self.quiet:
            return
        if self.err.is_terminal and outputs:
            self.err.print(_summary(time.monotonic() - self._began, outputs, next_command))
            return
        for output in outputs:
            self.say(f"wrote {escape(str(output))}")
        if next_command:
            self.say(f"next: {escape(next_command)}")


def span_text(seconds: float) -> str:
    """A length of time for the eye: `0.4 s`, `75 s`, `12 min`, `2.5 h`."""
    if seconds < 0.95:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        # A character that the other side cannot write is no reason to lose the result.
        stream.reconfigure(errors="replace")
    console = Console(stderr=stderr, highlight=False)
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
    # No lines at the sides: paths and commands can be copied whole.
    return Panel(lines, title=f"done in {span_text(seconds)}", title_align="left", box=box.HORIZONTALS, style="none",
                 border_style="dim", padding=(0, 1))  # fmt: skip


class _ProgressBars:
    """Progress for the eye: a live bar for each task, the latest few of them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}

    def show(self, progress: Progress) -> None:
        if self._bars is None:
            self._bars = _bars(self._console)
            self._bars.start()
        task = self._task(self._bars, progress)
        if progress.done < self._bars.tasks[self._bars.task_ids.index(task)].completed:
            # The same work begins anew, the next round for example: its own speed and time.
            self._bars.reset(task, total=progress.total)
        self._bars.update(task, completed=progress.done, total=progress.total, figures=_figures_text(progress))

    def stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks = {}

    def _task(self, bars: Bars, progress: Progress) -> TaskID:
        if progress.task not in self._tasks:
            while len(self._tasks) >= _MOST_BARS:
                bars.remove_task(self._tasks.pop(next(iter(self._tasks))))
            # Begun where the work is found, so that what an earlier run did does not count as speed.
            self._tasks[progress.task] = bars.add_task(
                escape(progress.task), total=progress.total, completed=progress.done, unit=progress.unit, figures=""
            )
        return self._tasks[progress.task]


def _bars(console: Console) -> Bars:
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", table_column=_one_line(ratio=1 if console.width < _NARROW else None)),
        _CountColumn(table_column=_one_line()),
        _PaceColumn(table_column=_one_line()),
    ]
    if console.width >= _NARROW:
        columns.insert(1, BarColumn(bar_width=30))
        columns.append(TextColumn("{task.fields[figures]}", table_column=_one_line()))
    return Bars(*columns, console=console)


def _one_line(ratio: int | None = None) -> Column:
    return Column(no_wrap=True, overflow="ellipsis", ratio=ratio)


class _CountColumn(ProgressColumn):
    """`1,234/50,000 images`, or the count alone where the total cannot be known."""

    def render(self, task: Task) -> Text:
        return Text(_count_text(task.completed, task.total, task.fields["unit"]), style="progress.percentage")


class _PaceColumn(ProgressColumn):
    """`403/s, 2 min left`; `in 75 s` once finished."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"in {span_text(task.finished_time or 0.0)}", style="progress.elapsed")
        return Text(_pace_text(task.speed, task.time_remaining, task.fields["unit"]), style="progress.remaining")


class _ProgressLines:
    """Progress for logs: the first and last report of a task, and one every so often between them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._task = ""
        self._began = self._shown = 0.0
        self._first = self._last = 0.0  # done, when the task was met and when it was last heard of

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        finished = progress.total is not None and progress.done >= progress.total
        anew = progress.task != self._task or progress.done < self._last
        self._last = progress.done
        if anew:
            self._task, self._began, self._first = progress.task, now, progress.done
        elif now - self._shown < _SECONDS_BETWEEN_LINES and not finished:
            return
        self._shown = now
        parts = [f"{progress.task}: {_count_text(progress.done, progress.total, progress.unit)}"]
        if pace := self._pace(progress, now - self._began):
            parts.append(pace)
        figures = _figures_text(progress)
        self._console.print(f"{escape(', '.join(parts))}  {figures}".rstrip(), soft_wrap=True)

    def _pace(self, progress: Progress, elapsed: float) -> str:
        here = progress.done - self._first  # what an earlier run did is no speed of ours
        if here <= 0 or elapsed <= 0:
            return ""
        speed = here / elapsed
        if progress.total is None:
            return _pace_text(speed, None, progress.unit)
        if progress.done >= progress.total:
            return f"in {span_text(elapsed)}"
        return _pace_text(speed, (progress.total - progress.done) / speed, progress.unit)


def _count_text(done: float, total: float | None, unit: str) -> str:
    count = f"{done:,.0f}" if total is None else f"{done:,.0f}/{total:,.0f}"
    return f"{count} {unit}".rstrip()


def _pace_text(speed: float | None, seconds_left: float | None, unit: str) -> str:
    parts = []
    if speed and unit != "s":  # seconds pass at one a second
        parts.append(f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s" if speed >= 0.95 else f"{1 / speed:.1f} s each")
    if seconds_left is not None:
        parts.append(f"{span_text(seconds_left)} left")
    return ", ".join(parts)


def _figures_text(progress: Progress) -> str:
    return escape("  ".join(f"{name} {value:.4g}" for name, value in progress.figures.items()))
