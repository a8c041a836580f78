"""Read a submission zip member by member, with bounded memory and without extracting anything."""

from __future__ import annotations

import os
import shlex
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from ddkit.runtime.archives import ZIP_ERRORS, is_ordinary, member_path, zip_problem
from ddkit.runtime.files import why_not_a_file
from ddkit.sets.findings import Finding

_LEFTOVERS = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")
_BUNDLE_FILES = {"generate.py", "SHA256SUMS"}  # at the root of a zip that ddkit pack --track 2 wrote
_MOST_MEMBERS = 1000
_LARGEST = 1 << 30  # bytes of a member; an honest one of TinyImageNet has a tenth
TENSOR_ENDINGS = (".pt", ".pth")  # of files that are meant to be tensors


@dataclass(frozen=True)
class Member:
    """A file at the root of a zip. data: its bytes; None if they were not wanted or were refused."""

    name: str
    data: bytes | None


def read_members(
    path: str | os.PathLike[str], wanted: Callable[[str], bool], *, largest_bytes: int = _LARGEST
) -> Iterator[Member | Finding]:
    """Yield the files at a zip's root, one in memory at a time, and findings F004, F005 and F009-F019.

    wanted: tells from a name whether to read the member. largest_bytes: no member is read beyond this.
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
    if _BUNDLE_FILES <= counts.keys():
        evaluate = f"ddkit evaluate --track 2 {shlex.quote(str(archive.filename))}"
        message = f"The zip is a track 2 bundle; only the tensors of track 1 are checked. Evaluate it: {evaluate}"
        yield Finding("error", "F018", message, zip_name)
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
            message = f"'{name}' does not belong in the zip, whose root must hold the two tensors only."
            yield Finding("error", "F009", message, zip_name)


def _name_of(info: zipfile.ZipInfo) -> str:
    """A member's name without "./" and backslashes, or as written if it leads out of the folder."""
    try:
        return str(member_path(info.filename))
    except ValueError:
        return info.filename


def _member_finding(info: zipfile.ZipInfo) -> Finding | None:
    """The finding on a member's name, kind and compression, before its content is read; None if all are right."""
    name, path = info.filename, PurePosixPath(_name_of(info))
    if any(part in _LEFTOVERS or part.startswith("._") for part in path.parts):
        message = "The zip holds a file that macOS or Windows added. Pack with ddkit pack, or with zip -X."
        return Finding("error", "F017", message, name)
    try:
        member_path(name)
    except ValueError:
        return Finding("error", "F012", "The name points outside the folder that the zip is unpacked into.", name)
    if not is_ordinary(info):
        kind = "a link" if stat.S_ISLNK(info.external_attr >> 16) else "a pipe or a device"
        return Finding("error", "F013", f"The member is marked as {kind}, not as a file. Pack with ddkit pack.", name)
    if info.flag_bits & 1:
        return Finding("error", "F015", "The member is encrypted, so that the scorer cannot open it.", name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # The first bytes of such a member can ask for gigabytes of memory.
        message = "The member is compressed with a method that some programs cannot read. Pack with ddkit pack."
        return Finding("error", "F019", message, name)
    if not path.parts:
        return Finding("error", "F009", "The zip has a member without a name.", repr(name))
    if name.endswith("/") or len(path.parts) > 1 or "\\" in name:
        message = "The zip holds a folder, but the scorer looks for the files at its root. Pack with ddkit pack."
        if "\\" in name:
            message = "The name holds a backslash, so other systems do not unpack it to the root. Pack with ddkit pack."
        return Finding("error", "F010", message, name)
    return None


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, largest_bytes: int) -> Iterator[Member | Finding]:
    if info.file_size > largest_bytes:
        message = f"The member claims {info.file_size:,} bytes, far more than a submission has."
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
