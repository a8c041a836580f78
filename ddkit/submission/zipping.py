"""Zips that are the same, byte for byte, whenever and wherever they are made of the same files."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

_BLOCK = 1 << 20  # bytes
# The zip format begins in 1980. One date for all, so that the same files make the same zip.
_DATE = (1980, 1, 1, 0, 0, 0)
_ORDINARY_FILE = 0o100644


def write_zip(members: Mapping[str, Path], path: Path) -> dict[str, str]:
    """Write a zip of files under the given names, in the order given, not compressed.

    Returns the SHA-256 of what was read of each, by name.
    """
    hashes = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, file in members.items():
            info = zipfile.ZipInfo(name, date_time=_DATE)
            info.external_attr = _ORDINARY_FILE << 16
            info.create_system = 3  # Unix, whatever system packs
            info.file_size = file.stat().st_size
            digest = hashlib.sha256()
            with file.open("rb") as source, archive.open(info, "w") as member:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    member.write(block)
            hashes[name] = digest.hexdigest()
    return hashes
