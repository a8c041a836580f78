"""Images and labels as numpy arrays: an .npz, or a folder or archive of .npy files.

Names say which split an array is of (x_train, test_labels, ...), and shapes whether it holds images or labels.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from posixpath import join
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddkit.data.archives import READ_ERRORS, Tree
from ddkit.data.listing import Pixels, Source, choose_splits, numbered_class, pixel_source, split_word
from ddkit.errors import BadDataError

_FEWEST_VALUES = 3 * 8 * 8  # of an image; an array with fewer values a row holds labels


def read_arrays(tree: Tree, folder: str, test_split: str | None) -> Source | None:
    """The splits of the .npy files of a folder, and of its .npz files that are called after a split.

    Raises IncompleteLayoutError if one of the splits is missing, BadDataError for arrays that do not fit together.
    """
    files = [name for name in tree.folders[folder][1] if name.endswith((".npy", ".npz"))]
    if not any(split_word(name) for name in files):
        return None
    arrays: dict[str, NDArray[Any]] = {}
    for name in files:
        if name.endswith(".npy") or split_word(name):
            arrays |= _read(tree, join(folder, name))
    splits = {word: _pixels(tree.path, word, arrays) for word in {split_word(name) for name in arrays} - {""}}
    found = {word: pixels for word, pixels in splits.items() if pixels is not None}
    train, test, notes = choose_splits(found, test_split, tree.path)
    count = 1 + max(int(pixels.labels.max(initial=0)) for pixels in found.values())
    if count > len(found[train].labels):
        message = f"{tree.path}: the labels go up to {count - 1:,}, and there are {len(found[train].labels):,} training images."
        raise BadDataError(message, "Number the classes from 0 without gaps.")
    texts = [array for name, array in arrays.items() if array.dtype.kind in "US" and not split_word(name)]
    class_names: list[str] = next((array.astype(str).tolist() for array in texts if array.shape == (count,)), [])
    pixels = {"train": found[train], "test": found[test]}
    names = class_names or [numbered_class(label, count - 1) for label in range(count)]
    return pixel_source("arrays", tree.path, names, pixels, notes=notes, numbered=not class_names)


def _read(tree: Tree, path: str) -> dict[str, NDArray[Any]]:
    """The arrays of a file by name, except those of Python objects, which only code could read. Raises BadDataError."""
    name, arrays = PurePosixPath(path).stem, {}
    try:
        with tree.open(path) as file, _objects_left_out():
            loaded = np.load(io.BytesIO(file.read()), allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {name: loaded}
            for key in loaded.files:
                with _objects_left_out():
                    arrays[f"{name}_{key}"] = loaded[key]
    except (*READ_ERRORS, SyntaxError, MemoryError) as error:
        raise BadDataError(f"{tree.path}: {path} is damaged: {error}.", "Save or get it again.") from error
    return arrays


@contextlib.contextmanager
def _objects_left_out() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise


def _pixels(path: Path, word: str, arrays: Mapping[str, NDArray[Any]]) -> Pixels | None:
    """The images and labels of one split; None if one of them is missing. Raises BadDataError for what they cannot be."""
    mine = {name: array for name, array in arrays.items() if split_word(name) == word and array.ndim and len(array)}
    images = [name for name in mine if mine[name][0].size >= _FEWEST_VALUES]
    images.sort(key=lambda name: -mine[name].ndim)
    labels = [name for name in mine if name not in images and _is_labels(mine[name])]
    # CIFAR-100 has labels of two kinds; the coarse ones are not the challenge's.
    labels.sort(key=lambda name: ("fine" not in name.lower(), "coarse" in name.lower()))
    if not images or not labels:
        return None
    pixels = _as_uint8(path, images[0], mine[images[0]])
    values = mine[labels[0]]
    if values.ndim == 2:
        values = values.argmax(axis=1) if values.shape[1] > 1 else values[:, 0]
    if len(values) != len(pixels):
        raise BadDataError(f"{path}: {images[0]} has {len(pixels):,} images and {labels[0]} {len(values):,} labels.")
    return Pixels(pixels.__getitem__, values.astype(np.int64))


def _is_labels(array: NDArray[Any]) -> bool:
    """True if these are whole numbers of classes, (N,) or (N, 1), or the rows of one-hot labels."""
    if array.dtype.kind not in "uif" or array.ndim > 2 or not (array == array.round()).all():
        return False
    one_hot = array.ndim == 2 and array.shape[1] > 1
    return bool((array.sum(axis=1) == 1).all()) if one_hot else True


def _as_uint8(path: Path, name: str, images: NDArray[Any]) -> NDArray[np.uint8]:
    """(N, 3, S, S) uint8 from (N, 3, S, S), (N, S, S, 3) or (N, 3 S S), of 8-bit values or of these as [0, 1]."""
    whole = images
    if images.dtype.kind == "f":
        images = images * 255 if images.max() <= 1 else images
        whole = images.round()
    unfit = images.dtype.kind not in "uif" or images.min() < 0 or images.max() > 255
    # What is whole already is not compared with itself, which would take many times its memory.
    if unfit or (whole is not images and not np.abs(images - whole).max() <= 0.01):
        raise BadDataError(f"{path}: {name} does not hold 8-bit images.", "Save them as uint8, without normalization.")
    if images.ndim == 2:  # as CIFAR-100 has them: all red values, all green, all blue
        side = round((images.shape[1] / 3) ** 0.5)
        whole = whole.reshape(len(images), 3, side, side) if 3 * side**2 == images.shape[1] else whole
    if whole.ndim == 4 and whole.shape[-1] == 3:
        whole = whole.transpose(0, 3, 1, 2)
    if whole.ndim != 4 or whole.shape[1] != 3 or whole.shape[2] != whole.shape[3]:
        raise BadDataError(f"{path}: {name} has the shape {images.shape}, which is not of square RGB images.")
    return whole.astype(np.uint8, copy=False)
