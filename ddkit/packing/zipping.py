"""Writing zips that are the same, byte for byte, if made of the same files, and unpacking zips from others."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

from ddkit.errors import BadFileError
from ddkit.runtime.archives import ZIP_ERRORS, is_ordinary, member_path
from ddkit.runtime.files import explain_os_error

_BLOCK = 1 << 20  # bytes
# The zip format begins in 1980. One date for all, so that the same files make the same zip.
_DATE = (1980, 1, 1, 0, 0, 0)
_ORDINARY_FILE = 0o100644


def write_zip(members: Mapping[str, Path], path: Path) -> dict[str, str]:
    """Write a zip of files under the given names, in the given order, not compressed. Returns each file's SHA-256 by name."""
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


def unpack(path: Path, folder: Path) -> Path:
    """Unpack a zip into a folder, member by member; returns the folder.

    Leftovers of macOS are left out. Raises BadFileError for a damaged zip, for members whose names lead out of the folder
    or clash with each other, for links, pipes and devices, and if the disk has no room for what the members claim.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir() and "__MACOSX" not in info.filename]
            if sum(info.file_size for info in members) > shutil.disk_usage(folder).free:
                raise BadFileError(f"{path} claims more bytes than there is room for in {folder}.")
            for info in members:
                try:
                    target = folder / member_path(info.filename)
                except ValueError as error:
                    raise BadFileError(f"{path}: the member {error}.") from error
                if not is_ordinary(info):
                    kind = "marked as a link, a pipe or a device, not as a file"
                    raise BadFileError(f"{path}: the member '{info.filename}' is {kind}.")
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    file = target.open("xb")
                except (FileExistsError, NotADirectoryError) as error:
                    raise BadFileError(
                        f"{path}: the member '{info.filename}' clashes with another one.", "Pack it again."
                    ) from error
                with file, archive.open(info) as source:
                    shutil.copyfileobj(source, file)
    except ZIP_ERRORS as error:
        raise BadFileError(f"{path} cannot be unpacked: {error}.", "Pack it again.") from error
    except OSError as error:
        raise explain_os_error(error, error.filename or path) from error
    return folder
