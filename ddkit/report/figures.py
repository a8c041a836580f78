"""Pictures: contact sheets."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddkit.files import replacing

_PAPER = (250, 250, 248)
_INK = (40, 40, 40)
_GAP = 2  # pixels between pictures
_NAME_HEIGHT = 15  # pixels of the largest class name
_MAX_ROWS_PER_COLUMN = 50


def contact_sheet(images: Tensor, labels: Tensor, class_names: Sequence[str], *, per_class: int = 10) -> Image.Image:
    """One row a class, its name before it; at most `per_class` pictures a row, in the order given.

    images: (N, 3, S, S) uint8. labels: (N,) int64. More than 50 classes stand in several columns.
    Pictures are enlarged by a whole factor to at least 48 pixels.
    """
    factor = max(1, -(-48 // images.shape[-1]))
    side = images.shape[-1] * factor
    font = ImageFont.load_default(size=_NAME_HEIGHT - 3)
    present = sorted(set(labels.tolist()))
    names = {c: _shorten(class_names[c] if c < len(class_names) else str(c)) for c in present}
    name_width = int(max((font.getlength(name) for name in names.values()), default=0)) + 10
    longest_row = min(per_class, max((int((labels == c).sum()) for c in present), default=1))
    column_width = name_width + longest_row * (side + _GAP) + 12
    columns = max(1, -(-len(present) // _MAX_ROWS_PER_COLUMN))
    rows = max(1, -(-len(present) // columns))

    sheet = Image.new("RGB", (columns * column_width, rows * (side + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, c in enumerate(present):
        left, top = (place // rows) * column_width, (place % rows) * (side + _GAP) + _GAP
        draw.text((left + 6, top + (side - _NAME_HEIGHT) // 2), names[c], fill=_INK, font=font)
        for k, index in enumerate((labels == c).nonzero().flatten()[:per_class].tolist()):
            pixels = np.ascontiguousarray(images[index].permute(1, 2, 0).numpy())
            picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + name_width + k * (side + _GAP), top))
    return sheet


def save_png(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG, atomically."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def _shorten(name: str, limit: int = 18) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
