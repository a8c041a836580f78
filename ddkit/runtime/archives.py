"""Archives from others: whether a zip may be read at all, and the names and kinds of its members."""

from __future__ import annotations

import lzma
import os
import re
import stat
import struct
import zipfile
import zlib
from pathlib import PurePosixPath
from typing import BinaryIO

# Errors of zipfile for a damaged or hostile zip. RuntimeError: it needs a password; NotImplementedError: a compression or
# a version that this Python does not have; ValueError: an impossible directory.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError, ValueError)

_LARGEST_DIRECTORY = 16 << 20  # bytes of a zip's list of members; a set of 1,000 tensors in a list has about 80,000
_END_RECORD = struct.Struct("<4s4H2LH")  # APPNOTE.TXT 4.3.16
_END_RECORD_64 = struct.Struct("<4sQ2H2L4Q")  # APPNOTE.TXT 4.3.14
_LOCATOR_64 = struct.Struct("<4sLQL")  # APPNOTE.TXT 4.3.15


def member_path(name: str) -> PurePosixPath:
    """The relative path of an archive's member, whatever program wrote its name.

    Backslashes become slashes, and parts that are "." are left out; "" and "./" give PurePosixPath(".").
    Raises ValueError for an absolute path, one that begins with a drive's letter, and one with a part that is "..": these
    lead out of the folder that the archive is unpacked into.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", str(path)):
        raise ValueError(f"{name!r} leads out of the folder that it is unpacked into")
    return path


def is_ordinary(info: zipfile.ZipInfo) -> bool:
    """True if a member of a zip is a file or a folder, not marked as a link, a pipe or a device."""
    mode = stat.S_IFMT(info.external_attr >> 16)
    return mode in (0, stat.S_IFREG) or (mode == stat.S_IFDIR and info.is_dir())


def zip_problem(file: BinaryIO) -> str:
    """Why a zip's list of members must not be read, or its end is not where the list says; empty for a sound zip.

    `zipfile` reads the whole list into memory before it looks at it, and ignores bytes before and after it.
    """
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - _END_RECORD.size - 0xFFFF)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END_RECORD.size:
        return "it has no list of members, so it is cut short or not a zip"
    *_, directory_size, offset, comment_size = _END_RECORD.unpack_from(tail, at)
    end = start + at
    at_locator = at - _LOCATOR_64.size
    if at_locator >= 0 and tail[at_locator : at_locator + 4] == b"PK\x06\x07":
        # Some programs look where the locator points, others right before it: in an honest file that is one place.
        end = start + at_locator - _END_RECORD_64.size
        if _LOCATOR_64.unpack_from(tail, at_locator)[2] != end:
            return "its list of members is damaged"
        file.seek(end)
        record = file.read(_END_RECORD_64.size)
        if len(record) < _END_RECORD_64.size or record[:4] != b"PK\x06\x06":
            return "its list of members is damaged"
        *_, directory_size, offset = _END_RECORD_64.unpack(record)
    file.seek(0)
    if directory_size > _LARGEST_DIRECTORY:
        return f"its list of members claims {directory_size:,} bytes"
    if offset + directory_size != end:
        return "its list of members is not where it is said to be"
    if extra := len(tail) - at - _END_RECORD.size - comment_size:
        return f"{extra:,} bytes follow its end" if extra > 0 else "it is cut short"
    return ""
