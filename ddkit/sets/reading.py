"""Reading files that others made: nothing in them is executed, and memory stays bounded whatever they claim.

A `.pt` file is a zip of a pickle and raw storages. The pickle is first scanned without being run, then
interpreted by PyTorch's restricted loader onto the "meta" device, which builds shapes and strides but no
data. Only when all of that is what it should be are the numbers read.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.runtime.files import ZIP_ERRORS, why_not_a_file
from ddkit.runtime.tensor_files import UnloadableError, load_restricted
from ddkit.sets.findings import Finding
from ddkit.sets.pickles import PickleFacts, scan_pickle

_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of torch.save before PyTorch 1.6
_LARGEST_PICKLE = 64 * 1024  # bytes; that of a bare tensor has about 200
_LARGEST_DIRECTORY = 1 << 20  # bytes of a zip's list of members
_END_RECORD = struct.Struct("<4s4H2LH")  # APPNOTE.TXT 4.3.16
_END_RECORD_64 = struct.Struct("<4sQ2H2L4Q")  # APPNOTE.TXT 4.3.14
_LOCATOR_64 = struct.Struct("<4sLQL")  # APPNOTE.TXT 4.3.15


def read_tensor(path: str | os.PathLike[str], spec: DatasetSpec, *, ipc: int | None) -> tuple[Tensor | None, list[Finding]]:
    """Read a submitted tensor, or say why not.

    spec: what the images should be. ipc: images per class there must be; None for any whole number.
    Returns the contiguous float32 tensor (N, 3, S, S), or None where findings hold an error that forbids
    reading it, and the findings F004-F009 and T001-T008.
    """
    where = Path(path).name
    try:
        if problem := why_not_a_file(path):
            return None, [Finding("error", "F004", f"{path} {problem}.", where)]
        with open(path, "rb") as file:
            return _read_open(file, where, spec, ipc)
    except FileNotFoundError:
        return None, [Finding("error", "F001", f"{path} does not exist.", where)]
    except OSError as error:
        return None, [Finding("error", "F004", f"{path} cannot be read: {error.strerror or error}.", where)]


def read_tensor_bytes(data: bytes, where: str, spec: DatasetSpec, *, ipc: int | None) -> tuple[Tensor | None, list[Finding]]:
    """Like `read_tensor`, of a file's bytes in memory."""
    return _read_open(io.BytesIO(data), where, spec, ipc)


def directory_problem(file: BinaryIO) -> str:
    """Why a zip's list of members must not be read; empty where it may.

    `zipfile` reads the whole list into memory before it looks at it, so its size is looked at here first.
    """
    size = file.seek(0, os.SEEK_END)
    tail_size = min(size, _END_RECORD.size + 0xFFFF)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END_RECORD.size:
        return "it has no list of members, so it is cut short or not a zip"
    directory_size = _END_RECORD.unpack_from(tail, at)[5]
    at_locator = at - _LOCATOR_64.size
    if at_locator >= 0 and tail[at_locator : at_locator + 4] == b"PK\x06\x07":
        # Some programs look where the locator points, others right before it: in an honest file that is one place.
        expected = size - tail_size + at_locator - _END_RECORD_64.size
        if _LOCATOR_64.unpack_from(tail, at_locator)[2] != expected:
            return "its list of members is damaged"
        file.seek(expected)
        record = file.read(_END_RECORD_64.size)
        if len(record) < _END_RECORD_64.size or record[:4] != b"PK\x06\x06":
            return "its list of members is damaged"
        directory_size = _END_RECORD_64.unpack(record)[8]
    file.seek(0)
    if directory_size > _LARGEST_DIRECTORY:
        return f"its list of members claims {directory_size:,} bytes"
    return ""


def _read_open(file: BinaryIO, where: str, spec: DatasetSpec, ipc: int | None) -> tuple[Tensor | None, list[Finding]]:
    findings = _look_outside(file, where)
    if not findings:
        findings, meta, stored = _look_inside(file, where)
        if meta is not None:
            findings += _look_at_claims(meta, stored, where, spec, ipc)
    if any(finding.level == "error" for finding in findings):
        return None, findings
    try:
        tensor = load_restricted(file)
    except UnloadableError as error:
        return None, [Finding("error", "F005", f"The file is damaged: {error}. Save or copy it again.", where)]
    return tensor, findings


def _look_outside(file: BinaryIO, where: str) -> list[Finding]:
    """Whether it is the kind of file that torch.save writes."""
    head = file.read(len(_LEGACY_MAGIC))
    if not head:
        return [Finding("error", "F005", "The file is empty. Save or copy it again.", where)]
    if head == _LEGACY_MAGIC:
        message = (
            "The file is in torch.save's legacy format, which cannot be checked without trusting it. "
            "Save it with a PyTorch of 1.6 or later and default options."
        )
        return [Finding("error", "F007", message, where)]
    if not head.startswith(b"PK"):
        if head[0] == 0x80:
            return [Finding("error", "F006", "The file is a bare pickle, which can run code. Use torch.save.", where)]
        return [Finding("error", "F004", "The file was not written by torch.save.", where)]
    if problem := directory_problem(file):
        return [Finding("error", "F005", f"The file is damaged: {problem}. Save or copy it again.", where)]
    return []


def _look_inside(file: BinaryIO, where: str) -> tuple[list[Finding], Tensor | None, int]:
    """Scan the pickle, then load onto the meta device. Returns findings, the dataless tensor, bytes stored."""
    try:
        pickled, stored = _pickle_and_stored_bytes(file)
        facts = scan_pickle(pickled)
    except (*ZIP_ERRORS, OSError) as error:
        return [Finding("error", "F005", f"The file is damaged: {error}. Save or copy it again.", where)], None, 0
    if facts.foreign:
        named = ", ".join(sorted(name.replace(" ", ".") for name in facts.foreign)[:5])
        message = (
            f"The file is a pickle that refers to {named}: whoever loads it plainly may run code. "
            "It was not executed. Save nothing but the tensor."
        )
        return [Finding("error", "F006", message, where)], None, 0
    findings = _look_at_pickle(facts, where)
    if any(finding.level == "error" for finding in findings):
        return findings, None, 0
    try:
        loaded = load_restricted(file, device="meta")
    except UnloadableError as error:
        return [Finding("error", "F005", f"The file is damaged: {error}. Save or copy it again.", where)], None, 0
    if not isinstance(loaded, Tensor):
        return [Finding("error", "T001", f"The file holds {_described(loaded)}. {_BARE}", where)], None, 0
    return findings, loaded, stored


_BARE = "The scorer takes one bare tensor: torch.save(tensor, path)."


def _look_at_pickle(facts: PickleFacts, where: str) -> list[Finding]:
    findings = []
    if facts.sparse:
        findings.append(Finding("error", "T008", f"The tensor is sparse. {_BARE} Save tensor.to_dense().", where))
    if facts.quantized:
        findings.append(Finding("error", "T008", f"The tensor is quantized. Save tensor.dequantize(). {_BARE}", where))
    if devices := sorted(facts.locations - {"cpu"}):
        message = (
            f"The tensor was saved on {', '.join(devices)}: loading it fails on a machine without such a device. "
            "Save tensor.cpu()."
        )
        findings.append(Finding("error", "T004", message, where))
    return findings


def _pickle_and_stored_bytes(file: BinaryIO) -> tuple[bytes, int]:
    """The bytes of data.pkl, and how many bytes all storages hold. Raises ValueError for what torch.save never writes."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len({member.filename.lower() for member in members}) != len(members):
            # PyTorch finds members whatever their case, and so might load another pickle than the one that is scanned.
            raise ValueError("it holds two members of the same name, which torch.save never writes")
        if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
            raise ValueError("its members are compressed or encrypted, which torch.save never does")
        pickles = [member for member in members if member.filename.count("/") == 1 and member.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it holds no data.pkl, so torch.save did not write it")
        if pickles[0].file_size > _LARGEST_PICKLE:
            raise ValueError(f"its pickle has {pickles[0].file_size:,} bytes, that of a bare tensor about 200")
        root = pickles[0].filename.split("/")[0]
        stored = sum(member.file_size for member in members if member.filename.startswith(f"{root}/data/"))
        with archive.open(pickles[0]) as member:
            return member.read(_LARGEST_PICKLE + 1), stored


def _look_at_claims(meta: Tensor, stored: int, where: str, spec: DatasetSpec, ipc: int | None) -> list[Finding]:
    """Whether the tensor that the file describes is the one wanted, before a number of it is read."""
    findings = describe_tensor(meta, spec, where, ipc=ipc)
    claimed = meta.untyped_storage().nbytes()
    if claimed != stored:
        message = f"The file is damaged: it describes {claimed:,} bytes and holds {stored:,}. Save or copy it again."
        findings.append(Finding("error", "F005", message, where))
    elif claimed != (needed := meta.numel() * meta.element_size()):
        kind = "a view" if claimed > needed else "expanded from fewer numbers"
        message = (
            f"The tensor is {kind}: its elements take {needed:,} bytes, and {claimed:,} were saved with it. "
            "Save tensor.clone(memory_format=torch.contiguous_format)."
        )
        findings.append(Finding("error", "T006", message, where))
    return findings


def describe_tensor(tensor: Tensor, spec: DatasetSpec, where: str, *, ipc: int | None) -> list[Finding]:
    """Findings T002, T003, T005 and T007 on a tensor's type, shape and layout; its values are not looked at."""
    findings = []
    if tensor.dtype != torch.float32:
        dtype = str(tensor.dtype).removeprefix("torch.")
        findings.append(Finding("error", "T002", f"The tensor is {dtype}; the challenge's are float32.", where))
    if problem := _shape_problem(tuple(tensor.shape), spec, ipc):
        findings.append(Finding("error", "T003", problem, where))
    if tensor.requires_grad:
        message = "The tensor requires gradients, which the scorer's training would compute. Save tensor.detach()."
        findings.append(Finding("warning", "T005", message, where))
    if not tensor.is_contiguous():
        message = "The tensor's memory is not in the order of its dimensions. Save tensor.contiguous()."
        findings.append(Finding("warning", "T007", message, where))
    return findings


def _shape_problem(shape: tuple[int, ...], spec: DatasetSpec, ipc: int | None) -> str:
    side, classes = spec.image_size, spec.num_classes
    rows = f"{ipc * classes:,}" if ipc else f"a multiple of {classes}"
    wanted = f"({rows}, 3, {side}, {side})"
    if len(shape) == 4 and shape[1:] == (side, side, 3):
        return f"The shape is {shape}: channels last. The scorer takes {wanted}: save tensor.permute(0, 3, 1, 2)."
    if len(shape) != 4 or shape[1:] != spec.image_shape:
        return f"The shape is {shape}; for {spec.name} it must be {wanted}."
    if ipc is None and (shape[0] == 0 or shape[0] % classes):
        return f"The tensor has {shape[0]:,} rows, no multiple of the {classes} classes of {spec.name}."
    if ipc is not None and shape[0] != ipc * classes:
        per_class = f" ({shape[0] // classes} a class)" if shape[0] % classes == 0 else ""
        return (
            f"The tensor has {shape[0]:,} rows{per_class}; track 1 takes {ipc} images for each of "
            f"{classes} classes, {ipc * classes:,} rows."
        )
    return ""


def _described(value: Any) -> str:
    if isinstance(value, dict):
        keys = ", ".join(map(_shown_key, list(value)[:5]))
        return f"a dict with {'the keys ' + keys if keys else 'no keys'}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _shown_key(key: Any) -> str:
    """A stranger's key, which may be of any size and depth, in a few letters."""
    return f"{key[:40]!r}" if isinstance(key, str) else f"one of type {type(key).__name__}"
