"""Contact sheets: pictures class by class, generated next to real ones, and next to the real images most like them."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddkit.runtime.files import atomic_write

_PAPER = (250, 250, 248)
_INK = (40, 40, 40)
_GAP = 2  # pixels between pictures
_LEAST_SIDE = 48  # pixels of a picture
_NAME_HEIGHT = 15  # pixels of the largest class name
_MAX_ROWS_PER_COLUMN = 50
_PER_CLASS_SIDE_BY_SIDE = 6


def contact_sheet(images: Tensor, labels: Tensor, class_names: Sequence[str], *, per_class: int = 10) -> Image.Image:
    """A sheet with one row for each class, headed by its name; at most `per_class` pictures a row, in the given order.

    images: (N, 3, S, S) uint8. labels: (N,) int64. More than 50 classes are laid out in several columns.
    Pictures are enlarged by a whole factor to at least 48 pixels.
    """
    side = _enlarged(images.shape[-1])
    font = ImageFont.load_default(size=_NAME_HEIGHT - 3)
    present = sorted(set(labels.tolist()))
    names = {c: _shorten(class_names[c] if c < len(class_names) else "") or str(c) for c in present}
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
            sheet.paste(_picture(images[index], side), (left + name_width + k * (side + _GAP), top))
    return sheet


def side_by_side(
    generated: tuple[Tensor, Tensor],
    real: tuple[Tensor, Tensor],
    class_names: Sequence[str],
    *,
    titles: tuple[str, str] = ("generated", "real"),
) -> Image.Image:
    """Two contact sheets under their titles next to each other, the same classes on the same rows.

    generated, real: (N, 3, S, S) uint8 images and (N,) int64 labels; real images of classes that are not
    generated are left out.
    """
    chosen = torch.cat([(real[1] == c).nonzero().flatten()[:_PER_CLASS_SIDE_BY_SIDE] for c in generated[1].unique()])
    left = contact_sheet(*generated, class_names, per_class=_PER_CLASS_SIDE_BY_SIDE)
    right = contact_sheet(real[0][chosen], real[1][chosen], class_names, per_class=_PER_CLASS_SIDE_BY_SIDE)
    top = _NAME_HEIGHT + 8  # of the sheets, below their titles
    paper = Image.new("RGB", (left.width + right.width, max(left.height, right.height) + top), _PAPER)
    for sheet, place, title in ((left, 0, titles[0]), (right, left.width, titles[1])):
        paper.paste(sheet, (place, top))
        ImageDraw.Draw(paper).text((place + 6, 4), title, fill=_INK, font=ImageFont.load_default(size=_NAME_HEIGHT))
    return paper


def neighbor_sheet(
    generated: Tensor, neighbors: Tensor, distances: Tensor, names: Sequence[str], *, most: int = 60
) -> Image.Image:
    """Pairs of a generated image (left) and its nearest real one (right), the closest pairs first.

    generated, neighbors: (N, 3, S, S) uint8. distances: (N,) float, in units in which real images lie about 1
    from one another. names: of the N generated images. At most `most` pairs are shown.
    """
    side = _enlarged(generated.shape[-1])
    cell_width, cell_height = 2 * side + _GAP + 14, side + _NAME_HEIGHT + 6
    order = distances.argsort()[:most].tolist()
    columns = min(6, len(order)) or 1
    sheet = Image.new("RGB", (columns * cell_width, -(-len(order) // columns) * cell_height + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_NAME_HEIGHT - 4)
    for place, index in enumerate(order):
        left, top = place % columns * cell_width + 7, place // columns * cell_height + _GAP
        sheet.paste(_picture(generated[index], side), (left, top))
        sheet.paste(_picture(neighbors[index], side), (left + side + _GAP, top))
        caption = f"{float(distances[index]):.2f}  {_shorten(names[index], limit=12)}"
        draw.text((left, top + side + 1), caption, fill=_INK, font=font)
    return sheet


def save_png(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG, atomically."""
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def _enlarged(side: int) -> int:
    """The side of a picture on a sheet: a multiple of the image's, at least 48 pixels."""
    return side * math.ceil(_LEAST_SIDE / side)


def _picture(image: Tensor, side: int) -> Image.Image:
    """(3, S, S) uint8 -> a picture of that side, pixels kept square."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def _shorten(name: str, limit: int = 18) -> str:
    """What of a name can be drawn: Pillow's own font has no letters beyond ASCII."""
    name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().strip()
    return name if len(name) <= limit else name[: limit - 1] + "…"
