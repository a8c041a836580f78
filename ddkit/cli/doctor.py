"""`ddkit doctor`: what this machine has, and what that means."""

from __future__ import annotations

import click
from rich.text import Text

from ddkit.cli._options import example, output_options
from ddkit.cli._output import Output, plain_table

_COLORS = {"ok": "green", "slow": "yellow", "broken": "red"}


@click.command(epilog=example("ddkit doctor --json"), short_help="Say what this machine has and what that means for ddkit.")
@output_options
@click.pass_context
def doctor(ctx: click.Context, output: Output) -> None:
    """Examine this machine: libraries, GPU, processor, compiler, speed of an evaluation, memory, disk, cache, datasets.

    Each line is ok, slow (it works, and something would make it faster) or broken, with what to do about it. Paste the
    output into a bug report. The status is 3 if a line is broken.
    """
    from ddkit.doctor import diagnose

    lines = diagnose()
    table = plain_table("", "part", "finding")
    for line in lines:
        color = _COLORS[line.status]
        finding = Text(line.finding).append(f"\n{line.remedy}" if line.remedy else "", style=color)
        table.add_row(Text(line.status, style=color), line.what, finding)
    output.result([vars(line) for line in lines], table)
    if any(line.status == "broken" for line in lines):
        ctx.exit(3)
