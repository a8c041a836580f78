"""What commands say and show: results on standard output, progress and remarks on standard error."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, Progress as Bars, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ddkit.progress import Progress

_SECONDS_BETWEEN_LINES = 15.0  # of progress where standard error is no terminal


class Surface:
    """The one way from a command to the person or program that called it.

    as_json: results go to standard output as JSON and not as pictures for the eye.
    quiet: nothing on standard error but errors.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, verbosity: int = 0) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.out = Console(highlight=False)
        self.err = Console(stderr=True, highlight=False)
        self._verbosity = verbosity
        self._bars: Bars | None = None
        self._task: tuple[str, Any] | None = None
        self._lines = _ProgressLines(self.err)

    def __enter__(self) -> Surface:
        level = logging.ERROR if self.quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(self._verbosity, 2)]
        logging.basicConfig(
            level=logging.WARNING if self._verbosity < 2 else logging.INFO,
            format="%(message)s",
            handlers=[RichHandler(console=self.err, show_time=False, show_path=False)],
            force=True,
        )
        logging.getLogger("ddkit").setLevel(level)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_bars()

    def say(self, text: str) -> None:
        """A remark for the person, on standard error. `text` may hold rich markup; escape what is not ours."""
        if not self.quiet:
            self.err.print(text)

    def listen(self, progress: Progress) -> None:
        """The listener to hand to a long computation: a live bar, or a line every so often without a terminal."""
        if self.quiet:
            return
        if not self.err.is_terminal:
            self._lines.show(progress)
            return
        if self._bars is None:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                _CountColumn(),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                TextColumn("{task.fields[figures]}"),
                console=self.err,
            )
            self._bars.start()
        if self._task is None or self._task[0] != progress.task:
            self._task = (
                progress.task,
                self._bars.add_task(escape(progress.task), total=progress.total, unit=progress.unit, figures=""),
            )
        self._bars.update(
            self._task[1], completed=progress.done, total=progress.total, figures=_figures_text(progress)
        )

    def result(self, data: Any, shown: RenderableType | None = None) -> None:
        """The command's result: `data` as JSON, or `shown` (rich) for the eye; both on standard output."""
        self._end_bars()
        if self.as_json:
            click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))
        elif shown is not None:
            self.out.print(shown)

    def done(self, outputs: Sequence[object], next_command: str = "") -> None:
        """Ends a command: where its output is, and what to type next."""
        self._end_bars()
        for output in outputs:
            self.say(f"[green]wrote[/green] {escape(str(output))}")
        if next_command:
            self.say(f"[dim]next:[/dim] {escape(next_command)}")

    def _end_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._task = None


class _CountColumn(ProgressColumn):
    """`1,234/50,000 images`, or the count alone where the total cannot be known."""

    def render(self, task: Task) -> Text:
        total = f"/{task.total:,.0f}" if task.total is not None else ""
        return Text(f"{task.completed:,.0f}{total} {task.fields['unit']}", style="progress.percentage")


class _ProgressLines:
    """Progress for logs: the first and last report of a task, and one every so often between them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._task = ""
        self._began = self._shown = 0.0

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        finished = progress.total is not None and progress.done >= progress.total
        if progress.task != self._task:
            self._task, self._began = progress.task, now
        elif now - self._shown < _SECONDS_BETWEEN_LINES and not finished:
            return
        self._shown = now
        total = f"/{progress.total:,.0f}" if progress.total is not None else ""
        text = f"{progress.task}: {progress.done:,.0f}{total} {progress.unit}".rstrip()
        if progress.total and 0 < progress.done < progress.total and now > self._began:
            text += f", about {_span((now - self._began) * (progress.total / progress.done - 1))} left"
        figures = _figures_text(progress)
        self._console.print(escape(f"{text}  {figures}".rstrip()), soft_wrap=True)


def _figures_text(progress: Progress) -> str:
    return escape("  ".join(f"{name} {value:.4g}" for name, value in progress.figures.items()))


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
