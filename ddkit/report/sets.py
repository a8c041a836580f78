"""A distilled set as pictures: from the bare, normalised tensor of a submission back to bytes and labels."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from torch import Tensor

from ddkit.data.images import denormalise, to_uint8
from ddkit.data.store import dataset_spec
from ddkit.errors import BadFile
from ddkit.files import explain_os_error


def read_set(path: str | os.PathLike[str], dataset: str) -> tuple[Tensor, Tensor]:
    """The images (N, 3, S, S) uint8 and labels (N,) int64 of a submission's file for `dataset`.

    The file holds one tensor, normalised with the dataset's constants, the same number of images of each class
    one class after another (PROTOCOL.md). Values outside the range of pixels are clamped.
    Raises BadFile for what is no such file; nothing in it is executed.
    """
    path, spec = Path(path), dataset_spec(dataset)
    try:
        images = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise explain_os_error(error, path) from error
    except (RuntimeError, pickle.UnpicklingError, ValueError, EOFError) as error:
        raise BadFile(f"{path} is no tensor that can be read safely.") from error
    if not isinstance(images, Tensor) or images.shape[1:] != spec.image_shape or len(images) % spec.num_classes:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise BadFile(
            f"{path} holds {found}, not a tensor of (n x {spec.num_classes}, 3, {spec.image_size}, {spec.image_size})."
        )
    labels = torch.arange(spec.num_classes).repeat_interleave(len(images) // spec.num_classes)
    return to_uint8(denormalise(images, spec)), labels
