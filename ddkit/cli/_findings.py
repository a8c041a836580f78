"""How findings of a check are shown."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ddkit.sets.findings import Report

_COLORS = {"error": "red", "warning": "yellow", "info": "cyan"}


def findings_table(report: Report, path: object) -> RenderableType:
    """The verdict in one line, and under it a table of the findings."""
    counts = {level: sum(f.level == level for f in report.findings) for level in _COLORS}
    color = "green" if report.ok else "red"
    verdict = Text.from_markup(
        f"[bold {color}]{'acceptable' if report.ok else 'unacceptable'}[/]  {escape(str(path))}"
        f"  [dim]{counts['error']} errors, {counts['warning']} warnings[/]"
    )
    if not report.findings:
        return verdict
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for finding in report.findings:
        table.add_row(
            Text(finding.level, style=_COLORS[finding.level]), finding.code, Text(finding.where), Text(finding.message)
        )
    return Group(verdict, table)
