"""The images of a set as data URIs, class by class."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

_MOST_PER_CLASS = 10  # pictures
_LARGEST_LOSSLESS = 48  # pixels; larger pictures are compressed with losses, so that the page stays small


@dataclass(frozen=True)
class ClassPictures:
    """The pictures of one class, as data URIs."""

    name: str
    pictures: tuple[str, ...]


def pictures_by_class(
    images: Tensor, labels: Tensor, name: Callable[[int], str], *, most: int = _MOST_PER_CLASS
) -> tuple[ClassPictures, ...]:
    """The first `most` pictures of each class. images: (N, 3, S, S) uint8. labels: (N,) int64."""
    rows = []
    for label in labels.unique().tolist():
        members = images[labels == label][:most]
        rows.append(ClassPictures(name(label), tuple(_data_uri(picture) for picture in members)))
    return tuple(rows)


def _data_uri(picture: Tensor) -> str:
    """A picture, (3, S, S) uint8, as WebP; small ones without losses."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    image.save(buffer, format="WEBP", lossless=max(image.size) <= _LARGEST_LOSSLESS, quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
