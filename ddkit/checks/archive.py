"""Reading a submission zip member by member: bounded, nothing extracted, nothing trusted."""

from __future__ import annotations

import os
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from ddkit.runtime.archives import member_path
from ddkit.runtime.files import ZIP_ERRORS, why_not_a_file
from ddkit.runtime.torch_file import is_ordinary, zip_problem
from ddkit.sets.findings import Finding

_LEFTOVERS = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")
_OF_AN_ENTRY = {"generate.py", "SHA256SUMS"}  # what ddkit pack --track 2 puts at the root
_MOST_MEMBERS = 1000
TENSOR_ENDINGS = (".pt", ".pth")  # of names that somebody means for a tensor


@dataclass(frozen=True)
class Member:
    """A file at the root of a zip. data: its bytes; None where it is not one of those wanted or was refused."""

    name: str
    data: bytes | None


def read_members(
    path: str | os.PathLike[str], wanted: Callable[[str], bool], *, largest_bytes: int
) -> Iterator[Member | Finding]:
    """Yield the files at a zip's root, one in memory at a time, and findings F004, F005 and F009-F019.

    wanted: whether a name's bytes are to be read. largest_bytes: no member is read beyond this.
    """
    name = os.path.basename(path)
    try:
        if problem := why_not_a_file(path):
            yield Finding("error", "F018", f"{path} {problem}.", name)
            return
        with open(path, "rb") as file:
            if problem := zip_problem(file):
                yield Finding("error", "F018", f"The file cannot be read as a zip: {problem}.", name)
                return
            with zipfile.ZipFile(file) as archive:
                yield from _members(archive, wanted, largest_bytes, name)
    except ZIP_ERRORS as error:
        yield Finding("error", "F018", f"The file cannot be read as a zip: {error}.", name)
    except OSError as error:
        yield Finding("error", "F004", f"{path} cannot be read: {error.strerror or error}.", name)


def _members(
    archive: zipfile.ZipFile, wanted: Callable[[str], bool], largest_bytes: int, zip_name: str
) -> Iterator[Member | Finding]:
    infos = archive.infolist()
    if len(infos) > _MOST_MEMBERS:
        yield Finding("error", "F009", f"The zip has {len(infos):,} members; it should have two.", zip_name)
        return
    counts = Counter(_name_of(info) for info in infos)
    if _OF_AN_ENTRY <= counts.keys():
        message = "The zip is an entry of track 2, not two tensors. It is tried out by ddkit evaluate --track 2."
        yield Finding("error", "F009", message, zip_name)
        return
    for name in sorted(name for name, count in counts.items() if count > 1):
        message = f"'{name}' is in the zip {counts[name]} times; which one is scored depends on the program."
        yield Finding("error", "F014", message, zip_name)
    for info in infos:
        name = _name_of(info)
        if name == "." and info.filename and info.is_dir():
            continue  # the root itself, which bsdtar lists as "./"
        finding = _member_finding(info)
        if finding is not None:
            yield finding
        elif wanted(name) and counts[name] == 1:
            yield from _content(archive, info, name, largest_bytes)
        elif name.lower().endswith(TENSOR_ENDINGS):
            yield Member(name, None)
        else:
            message = f"'{name}' does not belong into the zip; its root holds the two tensors only."
            yield Finding("error", "F009", message, zip_name)


def _name_of(info: zipfile.ZipInfo) -> str:
    """A member's name without "./" and backslashes; as it is where it leads out of the folder."""
    try:
        return str(member_path(info.filename))
    except ValueError:
        return info.filename


def _member_finding(info: zipfile.ZipInfo) -> Finding | None:
    """What is wrong about a member before its content is looked at."""
    name = info.filename
    path = PurePosixPath(_name_of(info))
    if any(part in _LEFTOVERS or part.startswith("._") for part in path.parts):
        message = "The system's own leftover is in the zip; pack with ddkit pack, or zip -X."
        return Finding("error", "F017", message, name)
    try:
        member_path(name)
    except ValueError:
        return Finding("error", "F012", "The name leads out of the folder that the zip is unpacked into.", name)
    if not is_ordinary(info):
        kind = "a link" if stat.S_ISLNK(info.external_attr >> 16) else "a pipe or a device"
        return Finding("error", "F013", f"The member is marked as {kind}, not as a file. Pack with ddkit pack.", name)
    if info.flag_bits & 1:
        return Finding("error", "F015", "The member is encrypted; the scorer cannot open it.", name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Nor should we: such a member can ask for gigabytes of memory by its first bytes.
        message = "The member is compressed by a method that not every program reads. Pack with ddkit pack."
        return Finding("error", "F019", message, name)
    if not path.parts:
        return Finding("error", "F009", "The zip has a member without a name.", repr(name))
    if name.endswith("/") or len(path.parts) > 1 or "\\" in name:
        message = "The zip holds a folder; the scorer looks for the files at its root. Pack with ddkit pack."
        if "\\" in name:
            message = "The name holds a backslash, so other systems do not unpack it to the root. Pack with ddkit pack."
        return Finding("error", "F010", message, name)
    return None


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, largest_bytes: int) -> Iterator[Member | Finding]:
    if info.file_size > largest_bytes:
        message = f"The member claims {info.file_size:,} bytes; a submission of ours has at most {largest_bytes // 2:,}."
        yield Finding("error", "F016", message, name)
        yield Member(name, None)
        return
    try:
        with archive.open(info) as member:
            # A member may hold more than it claims; zipfile stops at the claim and compares the checksum.
            data = member.read(largest_bytes + 1)
    except ZIP_ERRORS as error:
        yield Finding("error", "F005", f"The member is damaged: {error}. Pack again.", name)
        yield Member(name, None)
        return
    yield Member(name, data)
