"""Reading what `torch.save` wrote without PyTorch's loader, so that a file from somebody else cannot do harm.

Such a file is a zip of one pickle, `data.pkl`, and of the raw numbers of each storage, `data/<key>`. Nothing that the pickle
names is imported or called. The numbers are taken from the zip only when shape, strides and offset stay within their storage.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ddkit.runtime.archives import ZIP_ERRORS, is_ordinary, zip_problem
from ddkit.runtime.files import why_not_a_file
from ddkit.runtime.pickles import Call, Storage, read_pickle

_MAGIC_OF_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of torch.save before PyTorch 1.6
_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip


_KINDS = (  # of files, by their first bytes
    (b"\x80", "a pickle"), (b"\x93NUMPY", "a NumPy .npy file"), (b"\x89PNG", "a picture"), (b"\xff\xd8\xff", "a picture"),
    (b"\x1f\x8b", "a gzip archive"), (b"\x89HDF", "an HDF5 file"), (b"version https://git-lfs", "a pointer of Git LFS"),
    (b"<", "a web page"), (b"Rar!", "a RAR archive"), (b"7z", "a 7z archive"),
)  # fmt: skip


class TorchFileError(Exception):
    """A file that cannot be read; the text says why, with the file as "it".

    kind: "damaged"; "legacy", of PyTorch before 1.6; "byte order" or "protocol" of pickle, whose name is the detail;
    "other", not of torch.save; the detail then names what it looks like, or is "".
    """

    def __init__(self, kind: str, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as the pickle describes it: all numbers are checked to lie in its storage.

    offset, stride: in elements. location: of the storage, such as "cpu".
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    requires_grad: bool
    key: str
    location: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def is_contiguous(self) -> bool:
        """True if the elements lie in the order of the dimensions."""
        return self.numel == 0 or all(
            size == 1 or stride == math.prod(self.shape[i + 1 :])
            for i, (size, stride) in enumerate(zip(self.shape, self.stride, strict=True))
        )

    def overlaps(self) -> bool:
        """True if several elements share a place in the storage, as in an expanded tensor."""
        reach = 0
        for stride, size in sorted((st, size) for size, st in zip(self.shape, self.stride, strict=True) if size > 1):
            if stride <= reach:
                return True
            reach += (size - 1) * stride
        return False


class TorchFile:
    """An opened file of `torch.save`, whose pickle was read and whose numbers were not.

    value: what it holds, as `read_pickle` gives it; a `StoredTensor` for a tensor. names: as `read_pickle` gives them.
    protocol: of the pickle. stored_bytes: of all storages together. Raises TorchFileError.
    """

    def __init__(self, file: BinaryIO) -> None:
        _require_zip_of_torch(file)
        with _damage_named():
            self._archive = zipfile.ZipFile(file)
            self._members = _members_of(self._archive)
            pickled = self._read("data.pkl")
            self.byte_order = self._read("byteorder").decode("ascii", "replace")[:20] or "little"  # of PyTorch 2.1 and later
            value, self.names = read_pickle(pickled)
        self.protocol = pickled[1] if pickled.startswith(b"\x80") else 0
        self._storages: dict[str, bytearray] = {}
        self.stored_bytes = sum(info.file_size for name, info in self._members.items() if name.startswith("data/"))
        self.value = self.stored_tensor(value) or value

    def load(self, tensor: StoredTensor) -> Tensor:
        """The numbers, as a tensor on the CPU; tensors of one storage share it. Raises TorchFileError."""
        if tensor.key not in self._storages:
            with _damage_named():
                self._storages[tensor.key] = bytearray(self._archive.read(self._members[f"data/{tensor.key}"]))
        numbers = self._storages[tensor.key]
        flat = torch.frombuffer(numbers, dtype=tensor.dtype) if numbers else torch.empty(0, dtype=tensor.dtype)
        try:
            return flat.as_strided(tensor.shape, tensor.stride, tensor.offset)
        except RuntimeError as error:  # of shapes without elements that torch does not take
            raise TorchFileError("damaged", _first_line(error)) from error

    def _read(self, name: str) -> bytes:
        """The bytes of a member; none if there is no such member."""
        return self._archive.read(self._members[name]) if name in self._members else b""

    def stored_tensor(self, value: Any) -> StoredTensor | None:
        """The tensor that a part of the file's value describes; None for any other part.

        Raises TorchFileError if the description contradicts itself or the storage, and for another byte order.
        """
        requires_grad = None
        if is_call(value, "torch._utils", "_rebuild_parameter", "_rebuild_parameter_with_state") and value.arguments:
            requires_grad = len(value.arguments) < 2 or value.arguments[1] is True
            value = value.arguments[0]
        if not is_call(value, "torch._utils", "_rebuild_tensor_v2"):
            return None
        if self.protocol < 2:  # such a pickle holds the text of a storage's name only, and PyTorch does not read it either
            raise TorchFileError("protocol", f"it was saved with pickle_protocol={self.protocol}", str(self.protocol))
        try:
            storage, offset, shape, stride, tracked, *_ = value.arguments
            ((word, kind, key, location, count),) = storage.arguments
        except (AttributeError, TypeError, ValueError):
            raise TorchFileError("damaged", "its pickle does not describe a tensor") from None
        of_torch = isinstance(kind, type) and issubclass(kind, Call) and kind.module == "torch"
        dtype = _STORAGES.get(kind.name) if of_torch else None
        if dtype is None and of_torch and kind.name.endswith("Storage"):
            return None  # of a type that is not for images, such as quantized numbers
        if (
            dtype is None
            or not (isinstance(storage, Storage) and word == "storage")
            or not (isinstance(key, str) and isinstance(location, str))
            or not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= 64)
            or not all(type(number) is int and 0 <= number < 1 << 62 for number in (offset, count, *shape, *stride))
        ):
            raise TorchFileError("damaged", "its pickle does not describe a tensor")
        storage_info = self._members.get(f"data/{key}")
        claimed, held = count * dtype.itemsize, storage_info.file_size if storage_info else 0
        if claimed != held:
            raise TorchFileError("damaged", f"it describes {claimed:,} bytes and holds {held:,}")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if math.prod(shape) and last >= count:
            raise TorchFileError("damaged", f"its tensor reaches to element {last:,} of a storage of {count:,}")
        if self.byte_order != sys.byteorder:
            raise TorchFileError("byte order", f"its numbers are in {self.byte_order!r} byte order", self.byte_order)
        tracked = tracked if requires_grad is None else requires_grad
        return StoredTensor(dtype, shape, stride, offset, bool(tracked), key, location)


def load_tensors(path: str | os.PathLike[str], *keys: str) -> list[Tensor]:
    """The tensors of these keys of the dict that a file holds, read without executing anything.

    Raises TorchFileError if the file is not readable or does not hold them, and OSError.
    """
    if problem := why_not_a_file(path):
        raise TorchFileError("other", f"it {problem}")
    with open(path, "rb") as file:
        opened = TorchFile(file)
        held = as_dict(opened.value) or {}
        found = [opened.stored_tensor(held.get(key)) for key in keys]
        missing = [key for key, tensor in zip(keys, found, strict=True) if tensor is None]
        if missing:
            raise TorchFileError("other", f"it has no {' and '.join(missing)}")
        return [opened.load(tensor) for tensor in found if tensor is not None]


def _require_zip_of_torch(file: BinaryIO) -> None:
    """Raise TorchFileError if a file is not a whole zip, naming what it is instead. Only its ends are read."""
    file.seek(0)
    head = file.read(512)
    if not head:
        raise TorchFileError("damaged", "it is empty")
    if _MAGIC_OF_LEGACY in head[:32] or head[257:262] == b"ustar":
        raise TorchFileError("legacy", "it is in the format of PyTorch before 1.6")
    if not head.startswith(b"PK"):
        kind = "a safetensors file" if head[8:10] == b'{"' else next((k for start, k in _KINDS if head.startswith(start)), "")
        raise _other(kind)
    if problem := zip_problem(file):
        raise TorchFileError("damaged", problem)


def _members_of(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members by their names in the folder that holds data.pkl. Raises ValueError for what torch.save never writes."""
    infos = archive.infolist()
    if len({info.filename.lower() for info in infos}) != len(infos):
        # PyTorch finds members whatever their case, and so might load another pickle than the one that is read here.
        raise ValueError("it holds two members of the same name, which torch.save never writes")
    members = {info.filename: info for info in infos}
    if any(name.endswith("/constants.pkl") for name in members):
        raise _other("a TorchScript program")
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        if any(name.endswith(".npy") for name in members):
            raise _other("a NumPy .npz file")
        if any(name.endswith(".pt") for name in members):
            raise _other("a zip of .pt files")
        raise ValueError("it holds no data.pkl, so torch.save did not write it")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise ValueError("its members are compressed or encrypted, which torch.save never does")
        if info.header_offset + info.file_size > archive.start_dir:
            raise ValueError(f"its member {info.filename} claims {info.file_size:,} bytes, more than there are")
        if not is_ordinary(info):
            raise ValueError("a member is marked as a link, a pipe or a device, which torch.save never does")
    root = pickles[0].removesuffix("data.pkl")
    return {name.removeprefix(root): info for name, info in members.items() if name.startswith(root)}


def _other(looks_like: str) -> TorchFileError:
    return TorchFileError("other", f"it looks like {looks_like}" if looks_like else "torch.save did not write it", looks_like)


def as_dict(value: Any) -> dict[Any, Any] | None:
    """The entries of a dict of a pickle, an OrderedDict included; None for any other value."""
    if is_call(value, "collections", "OrderedDict", "defaultdict"):
        value = value.entries
    return value if isinstance(value, dict) else None


def is_call(value: Any, module: str, *names: str) -> bool:
    """True if a value of a pickle is a call of one of these functions or classes."""
    return isinstance(value, Call) and value.module == module and value.name in names


@contextlib.contextmanager
def _damage_named() -> Iterator[None]:
    """Turn what zipfile raises over a damaged zip into a TorchFileError."""
    try:
        yield
    except (*ZIP_ERRORS, struct.error, OverflowError) as error:
        raise TorchFileError("damaged", _first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return (str(error).split("\n")[0] or type(error).__name__)[:200]
