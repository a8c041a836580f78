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

_END_RECORD = struct.Struct("<4s4H2LH")  # APPNOTE.TXT 4.3.16


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
    """Why a file is not a zip that ends where it says; empty for a whole one. `zipfile` ignores bytes after the end."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END_RECORD.size - 0xFFFF))
    tail = file.read()
    file.seek(0)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END_RECORD.size:
        return "it has no list of members, so it is cut short or not a zip"
    *_, comment_size = _END_RECORD.unpack_from(tail, at)
    if extra := len(tail) - at - _END_RECORD.size - comment_size:
        return f"{extra:,} bytes follow its end" if extra > 0 else "it is cut short"
    return ""
