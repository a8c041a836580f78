"""`cifar-100-python`: the pickles in which CIFAR-100 is distributed, read without unpickling anything but data.

torchvision reads them too, but only unpacked, under one folder name, and with an unpickler that runs whatever code
a pickle asks for. Here a pickle may build arrays, numbers, texts, lists and dicts, and is refused for anything else;
torchvision's checksums tell the official files from others.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ddkit.errors import BadDataError
from ddkit.runtime.files import explain_os_error

FILES = ("train", "test", "meta")
# As torchvision.datasets.CIFAR100 states them; importing it for three numbers would take seconds.
OFFICIAL_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
_SIDE = 32
_MAX_BYTES = 1 << 30  # of one pickle; the official training one has 155 MB
_BLOCK = 1 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CifarSplit:
    """images: (N, 3, 32, 32) uint8. labels: (N,) int64, of the fine classes. names: file names; may be empty."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: tuple[str, ...]


@dataclass(frozen=True)
class CifarArchive:
    """class_names: of the fine labels, in label order. splits: "train" and "test"."""

    class_names: tuple[str, ...]
    splits: dict[str, CifarSplit]


def cifar_folder(path: Path) -> Path | None:
    """The folder with the files train, test and meta: `path` itself or the only folder in it; None if neither."""
    for folder in (path, *([only] if (only := _only_folder(path)) else [])):
        if all((folder / name).is_file() for name in FILES):
            return folder
    return None


def read_folder(folder: Path) -> CifarArchive:
    """Read an unpacked archive. Raises BadDataError, or BadFileError for what the system refuses."""

    def files() -> Iterator[tuple[str, BinaryIO]]:
        for name in FILES:
            with (folder / name).open("rb") as file:
                yield name, file

    try:
        return _read(files(), folder)
    except OSError as error:
        raise explain_os_error(error, error.filename or folder) from error


def read_tar(path: Path) -> CifarArchive:
    """Read the packed archive from front to back. Raises BadDataError, or BadFileError for what the system refuses."""
    try:
        with _unpacked(path) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                content = _read(_members(archive), path)
            # To the very end, where gzip's own checksum is.
            while stream.read(_BLOCK):
                pass
        return content
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise BadDataError(f"{path} is not a whole archive: {error}.", "It may be half downloaded: get it again.") from error
    except OSError as error:
        if error.errno is not None:
            raise explain_os_error(error, path) from error
        # gzip's own complaint about a damaged file is an OSError without a number.
        raise BadDataError(f"{path} is damaged: {error}.", "Get it again.") from error


def _unpacked(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else path.open("rb")


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, BinaryIO]]:
    for member in archive:
        name = member.name.rpartition("/")[2]
        # Only plain files are looked at, and only in memory, so links and paths lead nowhere.
        if name in FILES and member.isfile() and (file := archive.extractfile(member)) is not None:
            yield name, file


def _read(files: Iterator[tuple[str, BinaryIO]], path: Path) -> CifarArchive:
    splits: dict[str, CifarSplit] = {}
    class_names: tuple[str, ...] | None = None
    for name, file in files:
        value = _load_pickle(name, file, path)
        try:
            if name == "meta":
                class_names = tuple(_text(item) for item in value["fine_label_names"])
            else:
                splits[name] = _split(value)
        except (KeyError, TypeError, ValueError) as error:
            raise BadDataError(f"{path}: '{name}' does not hold what cifar-100-python has there ({error!r}).") from error
    if missing := [name for name in FILES if name not in splits and not (name == "meta" and class_names)]:
        raise BadDataError(f"{path} is not a whole cifar-100-python: it lacks {', '.join(missing)}.", "Get all of it again.")
    for split, content in splits.items():
        if not 0 <= content.labels.min(initial=0) <= content.labels.max(initial=0) < len(class_names):
            raise BadDataError(f"{path}: '{split}' has labels beyond its {len(class_names)} class names.")
    return CifarArchive(class_names, splits)


def _split(value: dict[str, Any]) -> CifarSplit:
    images = np.asarray(value["data"])
    labels = np.asarray(value["fine_labels"], np.int64)
    if images.dtype != np.uint8 or images.shape != (len(labels), 3 * _SIDE**2):
        raise ValueError(f"data of {images.dtype} {images.shape} for {len(labels)} labels")
    names = tuple(_text(name) for name in value.get("filenames", ()))
    return CifarSplit(images.reshape(-1, 3, _SIDE, _SIDE), labels, names if len(names) == len(labels) else ())


def _load_pickle(name: str, file: BinaryIO, path: Path) -> dict[str, Any]:
    hashed = _Hashed(file)
    try:
        # Written by Python 2, whose texts and pixels are both byte strings to us.
        value = _DataUnpickler(hashed, encoding="bytes").load()
    except (
        pickle.UnpicklingError, ValueError, LookupError, AttributeError, TypeError, ImportError, EOFError, OverflowError,
        MemoryError,
    ) as error:  # fmt: skip
        raise BadDataError(f"{path}: '{name}' is not a data pickle: {error}.", "Get the archive again.") from error
    if hashed.finish() != OFFICIAL_MD5[name]:
        _log.warning("%s: '%s' is not the official file; its checksum differs.", path, name)
    if not isinstance(value, dict):
        raise BadDataError(f"{path}: '{name}' holds a {type(value).__name__}, not the dict of cifar-100-python.")
    return {_text(key): item for key, item in value.items()}


class _DataUnpickler(pickle.Unpickler):
    """Builds Python's plain types and arrays of integers; refuses every other class or function by name.

    None of numpy's own are handed out: called with what a pickle chooses, they make objects of any address. What stands
    in for them are methods, which a pickle can call and not change.
    """

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct": _Array.empty, "_frombuffer": _Array.of, "ndarray": None, "dtype": _IntegerType.of}
        if module.partition(".")[0] == "numpy" and name in allowed:
            return allowed[name]
        if (module, name) == ("_codecs", "encode"):
            # How Python 3 writes bytes in the older pickle formats.
            return _encode_latin1
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")


class _IntegerType:
    """What a pickle says of an array's numbers: the only ones there are, integers."""

    def __init__(self, code: str | bytes) -> None:
        self.numpy = np.dtype(_text(code))
        if self.numpy.kind not in "ui":
            raise pickle.UnpicklingError(f"it holds numbers of type {self.numpy}")

    @classmethod
    def of(cls, code: str | bytes, *_: Any) -> _IntegerType:
        return cls(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = _text(state[1])
        if order in "<>":
            self.numpy = self.numpy.newbyteorder(order)


class _Array:
    """An array in the making, in the ways that numpy's own are pickled; `numpy.asarray` gives what it came to."""

    def __init__(self) -> None:
        self._values = np.zeros(0, np.uint8)

    @classmethod
    def empty(cls, *_: Any) -> _Array:
        return cls()

    @classmethod
    def of(cls, data: bytes, numbers: _IntegerType, shape: tuple[int, ...], order: str) -> _Array:
        array = cls()
        array.__setstate__((1, shape, numbers, order == "F", data))
        return array

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, numbers, by_columns, data = state
        self._values = np.frombuffer(data, numbers.numpy).reshape(shape, order="F" if by_columns else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self._values, dtype)


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the text encoding {encoding}")
    return text.encode("latin1")


class _Hashed:
    """A file that is read once, from front to back, with the MD5 of what went by."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.md5(usedforsecurity=False)
        self._bytes = 0

    def read(self, size: int = -1) -> bytes:
        return self._note(self._file.read(size))

    def readline(self) -> bytes:
        return self._note(self._file.readline())

    def finish(self) -> str:
        """Read the rest; the hexadecimal MD5 of everything."""
        while self.read(_BLOCK):
            pass
        return self._digest.hexdigest()

    def _note(self, data: bytes) -> bytes:
        self._bytes += len(data)
        if self._bytes > _MAX_BYTES:
            raise pickle.UnpicklingError(f"it is larger than {_MAX_BYTES:,} bytes")
        self._digest.update(data)
        return data


def _only_folder(path: Path) -> Path | None:
    inside = [item for item in path.iterdir() if not item.name.startswith(".")] if path.is_dir() else []
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else None


def _text(value: str | bytes) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
