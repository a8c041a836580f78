"""Pieces of HTML for notebooks and the report. All text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_LONGEST_SIDE = 16383  # pixels of WebP


def html_table(rows: Iterable[Sequence[object]], headings: Sequence[str] = ()) -> str:
    """A table of plain text."""

    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f'<{tag} style="text-align: left">{escape(str(cell))}</{tag}>' for cell in cells) + "</tr>"

    head = f"<thead>{line(headings, 'th')}</thead>" if headings else ""
    return f"<table>{head}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def data_uri(picture: Image, lossless: bool = False) -> str:
    """The picture as WebP in a data URI; with losses by default, so that a page stays small.

    A picture with a side that WebP cannot hold is made smaller.
    """
    buffer = io.BytesIO()
    if max(picture.size) > _LONGEST_SIDE:
        picture = picture.copy()
        picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    picture.save(buffer, format="WEBP", lossless=lossless, quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
