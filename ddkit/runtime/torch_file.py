"""Reading what `torch.save` wrote without PyTorch's loader, so that a file from somebody else cannot do harm.

Such a file is a zip of one pickle, `data.pkl`, and of the raw numbers of each storage, `data/<key>`. The pickle's
instructions are carried out here on inert values: what would call a function becomes a `Call` that says so, and nothing
is imported or run. The numbers are taken from the zip only when shape, strides and offset stay within their storage.
Source of the instructions' meaning: CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickletools
import struct
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ddkit.runtime.archives import ZIP_ERRORS, is_ordinary, zip_problem
from ddkit.runtime.files import why_not_a_file

_MAGIC_OF_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of torch.save before PyTorch 1.6
_LARGEST_PICKLE = 1 << 20  # bytes that are looked at; the pickle of a bare tensor has about 200
_MOST_INSTRUCTIONS = 300_000
_BLOCK = 1 << 20  # bytes
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


@dataclass(frozen=True)
class Global:
    """A function or a class that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}".replace("__builtin__.", "builtins.")


@dataclass(eq=False)
class Call:
    """A call that a pickle asks for and that was not made. state: would then be set on the result."""

    function: Any
    arguments: Any
    state: Any = None


@dataclass(eq=False)
class Pairs:
    """A dict of a pickle. Nothing is hashed: a key of a few bytes can unfold into 2 ** 40 parts."""

    items: list[tuple[Any, Any]] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """The last value of a text key; None if there is none."""
        return next((value for name, value in reversed(self.items) if isinstance(name, str) and name == key), None)


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

    value: what it holds, of plain values, lists, tuples, `Pairs`, `Global`, `Call` and `StoredTensor`; the outermost
    part of a large pickle only. whole: whether that is everything. names: all that the pickle refers to.
    protocol: of the pickle. stored_bytes: of all storages together.
    rest: parts of the value that a pickle which was not read to its end left unconnected.
    Raises TorchFileError.
    """

    def __init__(self, file: BinaryIO) -> None:
        _require_zip_of_torch(file)
        with _damage_named():
            self._archive = zipfile.ZipFile(file)
            self._members = _members_of(self._archive)
            pickled = self._read("data.pkl")
            self.byte_order = self._read("byteorder").decode("ascii", "replace")[:20] or "little"  # of PyTorch 2.1 and later
        reader = _PickleReader(pickled, cut_short=self._members["data.pkl"].file_size > len(pickled))
        self.whole, self.protocol, self.rest, self.names = reader.whole, reader.protocol, reader.rest, frozenset(reader.names)
        self.stored_bytes = sum(info.file_size for name, info in self._members.items() if name.startswith("data/"))
        self.value = self.stored_tensor(reader.value) or reader.value
        self._viewed: dict[str, bytearray] = {}

    def load(self, tensor: StoredTensor) -> Tensor:
        """The numbers: a tensor on the CPU that shares memory with nothing else. Raises TorchFileError."""
        numbers = self._viewed.pop(tensor.key, None) or self._storage(tensor.key)
        flat = torch.frombuffer(numbers, dtype=tensor.dtype) if numbers else torch.empty(0, dtype=tensor.dtype)
        try:
            view = flat.as_strided(tensor.shape, tensor.stride, tensor.offset)
        except RuntimeError as error:  # of shapes without elements that torch does not take
            raise TorchFileError("damaged", _first_line(error)) from error
        if view.nbytes == len(numbers):
            return view
        # A list of the images of one tensor has a thousand views of one storage, which follow each other.
        self._viewed = {tensor.key: numbers}
        return view.clone()

    def _storage(self, key: str) -> bytearray:
        info = self._members[f"data/{key}"]
        numbers, at = bytearray(info.file_size), 0
        with _damage_named(), self._archive.open(info) as member:  # which compares the checksum at the end
            while block := member.read(_BLOCK):
                numbers[at : at + len(block)] = block
                at += len(block)
        if at != info.file_size:
            raise TorchFileError("damaged", f"data/{key} is cut short")
        return numbers

    def _read(self, name: str) -> bytes:
        """The first bytes of a member; none if there is no such member."""
        if name not in self._members:
            return b""
        with self._archive.open(self._members[name]) as member:
            return member.read(_LARGEST_PICKLE)

    def stored_tensor(self, value: Any) -> StoredTensor | None:
        """The tensor that a part of the file's value describes; None for any other part.

        Raises TorchFileError if the description contradicts itself or the storage, and for another byte order.
        """
        requires_grad = None
        if calls(value, "torch._utils", "_rebuild_parameter", "_rebuild_parameter_with_state") and value.arguments:
            requires_grad = len(value.arguments) < 2 or value.arguments[1] is True
            value = value.arguments[0]
        if not calls(value, "torch._utils", "_rebuild_tensor_v2"):
            return None
        if self.protocol < 2:  # such a pickle holds the text of a storage's name only, and PyTorch does not read it either
            raise TorchFileError("protocol", f"it was saved with pickle_protocol={self.protocol}", str(self.protocol))
        try:
            storage, offset, shape, stride, tracked, *_ = value.arguments
            (word, kind, key, location, count), called = storage.arguments, storage.function
        except (AttributeError, TypeError, ValueError):
            raise TorchFileError("damaged", "its pickle does not describe a tensor") from None
        dtype = _STORAGES.get(kind.name) if isinstance(kind, Global) and kind.module == "torch" else None
        if dtype is None and isinstance(kind, Global) and kind.module == "torch" and kind.name.endswith("Storage"):
            return None  # of a type that is not for images, such as quantized numbers
        if (
            dtype is None
            or (called, word) != (None, "storage")
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
        held = as_dict(opened.value) or Pairs()
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


def names_in_pickle(file: BinaryIO) -> frozenset[Global]:
    """All that a bare pickle refers to, without running it. Raises TorchFileError."""
    file.seek(0)
    data = file.read(_LARGEST_PICKLE)
    return frozenset(_PickleReader(data, cut_short=len(data) == _LARGEST_PICKLE).names)


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


def as_dict(value: Any) -> Pairs | None:
    """The entries of a dict of a pickle, an OrderedDict included; None for any other value."""
    if calls(value, "collections", "OrderedDict", "defaultdict"):
        value = value.state or Pairs()
    return value if isinstance(value, Pairs) else None


def calls(value: Any, module: str, *names: str) -> bool:
    """True if a value of a pickle is a call of one of these functions or classes."""
    return (
        isinstance(value, Call)
        and isinstance(value.function, Global)
        and value.function.module == module
        and value.function.name in names
        and isinstance(value.arguments, tuple)
    )


@contextlib.contextmanager
def _damage_named() -> Iterator[None]:
    """Turn what zipfile raises over a damaged zip into a TorchFileError."""
    try:
        yield
    except (*ZIP_ERRORS, struct.error, OverflowError) as error:
        raise TorchFileError("damaged", _first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return (str(error).split("\n")[0] or type(error).__name__)[:200]


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _PickleReader:
    """Carries out a pickle's instructions on inert values. Raises TorchFileError for a damaged pickle."""

    def __init__(self, data: bytes, *, cut_short: bool) -> None:
        self.names: set[Global] = set()
        self.protocol = 0
        self.whole = False
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        try:
            for count, (instruction, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
                if count == _MOST_INSTRUCTIONS:
                    break
                self._carry_out(instruction.name, argument)
            else:
                self.whole = True
        except (ValueError, IndexError, KeyError, TypeError, StopIteration, struct.error, OverflowError) as error:
            if not (cut_short and self._stack):
                raise TorchFileError("damaged", f"its pickle is damaged: {_first_line(error)}") from error
        # A pickle begins with what holds everything else, so that is at hand even where the rest was not read.
        self.value, *self.rest = [value for value in self._stack if value is not _MARK] or [None]

    def _carry_out(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name == "PROTO":
            self.protocol = argument
        elif name == "STOP":
            stack[:] = self._pop(1)  # whatever else is there is of no use
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_SET", "EMPTY_DICT"):
            stack.append(() if name == "EMPTY_TUPLE" else Pairs() if name == "EMPTY_DICT" else [])
        elif name in ("TUPLE", "LIST", "FROZENSET", "DICT"):
            items = self._since_mark()
            stack.append(tuple(items) if name == "TUPLE" else Pairs(list(_paired(items))) if name == "DICT" else items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._pop(int(name[-1]))))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = self._pop(1) if name == "APPEND" else self._since_mark()
            if isinstance(stack[-1], list):  # of any other object it would call a method
                stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._since_mark()
            target = stack[-1]
            if isinstance(target, Call) and target.state is None:
                target.state = Pairs()  # of an OrderedDict, for one
            pairs = target.state if isinstance(target, Call) else target
            if isinstance(pairs, Pairs):
                pairs.items.extend(_paired(items))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP":
            self._pop(1)
        elif name == "POP_MARK":
            self._since_mark()
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL", "INST"):
            module, called = str(argument).split(" ", 1) if argument else self._pop(2)
            if not isinstance(module, str) or not isinstance(called, str):
                raise ValueError("it names a function by something that is not text")
            self.names.add(found := Global(module, called))
            stack.append(Call(found, tuple(self._since_mark())) if name == "INST" else found)
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            function, *arguments = self._pop(3 if name == "NEWOBJ_EX" else 2)
            stack.append(Call(function, arguments[0]))
        elif name == "OBJ":
            function, *arguments = self._since_mark()
            stack.append(Call(function, tuple(arguments)))
        elif name == "BUILD":
            (state,) = self._pop(1)
            if isinstance(stack[-1], Call) and stack[-1].state is None:
                stack[-1].state = state
        elif name in ("BINPERSID", "PERSID"):
            stack.append(Call(None, argument if name == "PERSID" else self._pop(1)[0]))
        elif name == "FRAME":
            pass
        elif name.startswith("EXT") or name.endswith("BUFFER"):
            raise ValueError(f"it holds the instruction {name}")
        else:
            stack.append(argument)  # a number, a text or bytes

    def _pop(self, count: int) -> list[Any]:
        items = self._stack[-count:]
        if len(items) < count or any(item is _MARK for item in items):
            raise ValueError("it takes more from its stack than there is")
        del self._stack[-count:]
        return items

    def _since_mark(self) -> list[Any]:
        at = next(i for i in range(len(self._stack) - 1, -1, -1) if self._stack[i] is _MARK)
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items


def _paired(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)
