"""How DD-Ranking's scores are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ddkit.metrics.ddranking import Ranking

_TITLE = "DD-Ranking, on fractions; LRS and ARS lie in 0 to 1, where more is better"


def rankings_table(rankings: Sequence[Ranking]) -> RenderableType:
    """A row a set, and below what the scores lack and where their settings differ."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("set", "dataset", "E"):
        table.add_column(heading, overflow="fold")
    for name in rankings[0].scores:
        table.add_column(name, justify="right", no_wrap=True)
    for ranking in rankings:
        subject = ranking.subject
        scores = ["–" if score is None else f"{score:.3f}" for score in ranking.scores.values()]
        table.add_row(escape(subject.source), escape(subject.dataset), str(subject.epochs_setting), *scores)
    return Group(Text(f"\n{_TITLE}", style="bold"), table, *(Text(line, style="dim") for line in _remarks(rankings)))


def _remarks(rankings: Sequence[Ranking]) -> list[str]:
    """Each remark once, however many sets it is on."""
    missing = dict.fromkeys(str(need) for ranking in rankings for need in ranking.missing)
    lines = [f"Missing: {'; '.join(missing)}. ddkit evaluate --ranking runs what is missing."] if missing else []
    return [*lines, *dict.fromkeys(remark for ranking in rankings for remark in ranking.notes)]
