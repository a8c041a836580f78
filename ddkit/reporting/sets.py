"""A distilled set as pictures: from the bare, normalized tensor of a submission back to bytes, labels, data URIs."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ddkit.data.images import denormalize, to_uint8
from ddkit.data.store import dataset_spec
from ddkit.sets.distilled import class_labels, load_tensor

_MOST_PER_CLASS = 10  # pictures
_LARGEST_LOSSLESS = 48  # pixels; of larger pictures the page would be too heavy to send


def read_set(path: str | os.PathLike[str], dataset: str) -> tuple[Tensor, Tensor]:
    """The images (N, 3, S, S) uint8 and labels (N,) int64 of a submission's file for `dataset`.

    Values outside the range of pixels are clamped. Raises InvalidSubmissionError for what is no such file, with the first
    thing that `check` would find wrong; nothing in it is executed.
    """
    spec = dataset_spec(dataset)
    images = load_tensor(path, spec)
    return to_uint8(denormalize(images, spec)), class_labels(spec.num_classes, len(images) // spec.num_classes)


@dataclass(frozen=True)
class ClassPictures:
    """One row of a contact sheet. pictures: data URIs."""

    name: str
    pictures: tuple[str, ...]


def pictures_by_class(
    images: Tensor, labels: Tensor, name: Callable[[int], str], *, most: int = _MOST_PER_CLASS
) -> tuple[ClassPictures, ...]:
    """The first pictures of each class, at most `most`. images: (N, 3, S, S) uint8. labels: (N,) int64."""
    rows = []
    for label in labels.unique().tolist():
        members = images[labels == label][:most]
        rows.append(ClassPictures(name(label), tuple(_data_uri(picture) for picture in members)))
    return tuple(rows)


def _data_uri(picture: Tensor) -> str:
    """(3, S, S) uint8 -> a data URI; small pictures without losses."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    image.save(buffer, format="WEBP", lossless=max(image.size) <= _LARGEST_LOSSLESS, quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
