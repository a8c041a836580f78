"""The table of DD-Ranking's scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from ddkit.cli._output import plain_table

if TYPE_CHECKING:
    from ddkit.metrics.ddranking import Ranking

_TITLE = "DD-Ranking of accuracies as fractions; LRS and ARS lie between 0 and 1, larger is better"


def rankings_table(rankings: Sequence[Ranking]) -> RenderableType:
    """A row for each set, and notes on missing evaluations and on different settings, each once."""
    table = plain_table("set", "dataset", "E")
    for name in rankings[0].scores:
        table.add_column(name, justify="right", no_wrap=True)
    for ranking in rankings:
        subject = ranking.subject
        scores = ["–" if score is None else f"{score:.3f}" for score in ranking.scores.values()]
        table.add_row(subject.source, subject.dataset, str(subject.epochs_setting), *scores)
    missing = dict.fromkeys(str(evaluation) for ranking in rankings for evaluation in ranking.missing)
    notes = [f"Missing: {'; '.join(missing)}. Run them with ddkit evaluate --ranking."] if missing else []
    notes += dict.fromkeys(note for ranking in rankings for note in ranking.notes)
    return Group(Text(f"\n{_TITLE}", style="bold"), table, *(Text(note, style="dim") for note in notes))
