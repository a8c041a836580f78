"""`cifar-100-python`: the pickles in which CIFAR-100 is distributed, read without executing anything.

torchvision reads them too, but only unpacked, under one folder name, and with an unpickler that runs whatever code a pickle
asks for. Here a pickle may build arrays of integers, numbers, texts, lists and dicts, and is refused for anything else;
torchvision's checksums tell the official files from others, which are read with a warning.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from posixpath import join
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddkit.data.archives import READ_ERRORS, Tree
from ddkit.data.listing import IncompleteLayoutError, Pixels, Source, choose_splits, pixel_source
from ddkit.errors import BadDataError

FILES = ("train", "test", "meta")
# As torchvision.datasets.CIFAR100 states them; importing it for three numbers would take seconds.
OFFICIAL_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
_SIDE = 32
_MAX_BYTES = 1 << 30  # of one pickle; the official training one has 155 MB

_log = logging.getLogger(__name__)


def read_cifar(tree: Tree, folder: str, test_split: str | None) -> Source | None:
    """CIFAR-100 if `folder` has the files train, test and meta.

    Raises IncompleteLayoutError if one of them is missing, UsageError for another test split than "test", BadDataError for
    what is damaged or hostile.
    """
    present = [name for name in FILES if name in tree.folders[folder][1]]
    if len(present) < 2:
        return None
    if missing := [name for name in FILES if name not in present]:
        raise IncompleteLayoutError(
            f"{tree.path} is not a complete cifar-100-python: {missing[0]} is missing.", "Download it again."
        )
    choose_splits(("train", "test"), test_split, tree.path)
    contents = {name: _load(tree, join(folder, name), name) for name in FILES}
    for name, value in contents.items():
        if not isinstance(value, dict):
            raise BadDataError(f"{tree.path}: '{name}' holds a {type(value).__name__}, not the dict of cifar-100-python.")
    class_names = _parsed(tree.path, contents, "meta", lambda value: [_text(name) for name in value["fine_label_names"]])
    splits = {split: _parsed(tree.path, contents, split, _pixels) for split in ("train", "test")}
    return pixel_source("cifar-100-python", tree.path, class_names, splits)


def _load(tree: Tree, path: str, name: str) -> Any:
    """The contents of a pickle. Raises BadDataError."""
    try:
        if (size := tree.size(path)) > _MAX_BYTES:
            raise pickle.UnpicklingError(f"it has {size:,} bytes")
        with tree.open(path) as file:
            data = file.read()
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != OFFICIAL_MD5[name]:
            _log.warning("%s: '%s' is not the official file; its checksum differs.", tree.path, name)
        # Written by Python 2, whose texts and pixels are both byte strings to us.
        return _DataUnpickler(io.BytesIO(data), encoding="bytes").load()
    except (
        *READ_ERRORS, pickle.UnpicklingError, LookupError, AttributeError, TypeError, ImportError, OverflowError, MemoryError,
    ) as error:  # fmt: skip
        raise BadDataError(f"{tree.path}: '{name}' is not a data pickle: {error}.", "Download the archive again.") from error


def _parsed(path: Path, contents: dict[str, Any], name: str, parse: Callable[[dict[str, Any]], Any]) -> Any:
    try:
        return parse({_text(key): item for key, item in contents[name].items()})
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadDataError(f"{path}: '{name}' does not have the contents of cifar-100-python ({error!r}).") from error


def _pixels(value: dict[str, Any]) -> Pixels:
    images, labels = _array(value["data"]), _array(value["fine_labels"]).astype(np.int64)
    if images.dtype != np.uint8 or images.shape != (len(labels), 3 * _SIDE**2) or labels.ndim != 1:
        raise ValueError(f"data of {images.dtype} {images.shape} for {len(labels)} labels")
    names = [_text(name) for name in value.get("filenames", ())]
    images = images.reshape(-1, 3, _SIDE, _SIDE)
    return Pixels(images.__getitem__, labels, names if len(names) == len(labels) else ())


class _DataUnpickler(pickle.Unpickler):
    """Builds Python's plain types; of arrays it notes what a pickle says, and refuses every other class or function by name.

    None of numpy's own functions is handed out: called with what a pickle chooses, they make objects of any address.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in ("_reconstruct", "_frombuffer", "ndarray", "dtype"):
            return type(name, (_Noted,), {})
        if (module, name) == ("_codecs", "encode"):
            return str.encode  # how Python 3 writes bytes in the older pickle formats
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")


class _Noted:
    """A call with its arguments, and the state given to what it would have made."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _array(value: Any) -> NDArray[Any]:
    """The array that was noted, or that a list holds. Raises ValueError or TypeError for anything but integers."""
    if not isinstance(value, _Noted):
        array = np.asarray(value)
    elif type(value).__name__ == "_frombuffer":  # protocol 5
        data, numbers, shape, order = value.arguments
        array = np.frombuffer(data, _dtype(numbers)).reshape(shape, order=order)
    else:
        _, shape, numbers, by_columns, data = value.state
        array = np.frombuffer(data, _dtype(numbers)).reshape(shape, order="F" if by_columns else "C")
    if array.dtype.kind not in "ui":
        raise ValueError(f"it holds numbers of type {array.dtype}")
    return array


def _dtype(noted: _Noted) -> np.dtype[Any]:
    dtype = np.dtype(_text(noted.arguments[0]))
    if dtype.kind not in "ui":
        raise ValueError(f"it holds numbers of type {dtype}")
    order = _text(noted.state[1]) if noted.state else "="
    return dtype.newbyteorder(">") if order == ">" else dtype


def _text(value: str | bytes) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
