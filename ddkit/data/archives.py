"""Files of a folder or a zip, by their paths inside it, read one at a time and never unpacked.

Apart from `sources`, which knows what the files mean: a worker that decodes images needs only this.
A zip from somebody else may be hostile, so its members are read into memory under a size limit,
and one that holds links or paths leading out of it is refused whole.
"""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path

from ddkit.errors import BadDataError, MissingDataError
from ddkit.runtime.files import ZIP_ERRORS, explain_os_error, why_not_a_file

MAX_MEMBER_BYTES = 256 << 20  # of one file; the largest photographs are far below
MAX_MEMBERS = 5_000_000

_MAX_DEPTH = 6  # of folders; layouts need four, and a link to a folder above itself would never end

# What systems leave in folders and people never put there.
_CLUTTER = {"thumbs.db", "desktop.ini", "__macosx"}


class DamagedMemberError(Exception):
    """One file of a tree cannot be read; the others may be whole."""


class FolderTree:
    """The files below a folder. Links are followed, as a folder is the user's own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> tuple[list[str], list[str]]:
        """(files, folders) as POSIX paths relative to the folder, sorted; clutter and hidden ones left out."""
        files: list[str] = []
        folders: list[str] = []

        def refuse(error: OSError) -> None:
            raise explain_os_error(error, error.filename or self.path) from error

        for place, below, here in os.walk(self.path, onerror=refuse, followlinks=True):
            inside = Path(place).relative_to(self.path)
            below[:] = [name for name in below if not _is_clutter(name)]
            folders.extend((inside / name).as_posix() for name in below)
            files.extend((inside / name).as_posix() for name in here if not _is_clutter(name))
            if len(inside.parts) >= _MAX_DEPTH:
                below.clear()
        return sorted(files), sorted(folders)

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises DamagedMemberError when it cannot be read or is beyond the size limit."""
        path = self.path / name
        try:
            if problem := why_not_a_file(path):
                raise DamagedMemberError(problem)
            if (size := path.stat().st_size) > MAX_MEMBER_BYTES:
                raise DamagedMemberError(f"{size:,} bytes, more than any image has")
            return path.read_bytes()
        except OSError as error:
            raise DamagedMemberError(error.strerror or str(error)) from error


class ZipTree:
    """The members of a zip. Raises BadDataError for what is no zip, is cut off, or holds links or paths out of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except OSError as error:
            raise explain_os_error(error, path) from error
        except ZIP_ERRORS as error:
            raise BadDataError(
                f"{path} is not a whole zip file: {error}.", "It may be half downloaded: get it again."
            ) from error

    def is_torch_file(self) -> bool:
        """Whether this is what `torch.save` writes, which is a zip too."""
        return any(name.endswith("/data.pkl") or name == "data.pkl" for name in self._zip.namelist())

    def names(self) -> tuple[list[str], list[str]]:
        """(files, folders) as POSIX paths, sorted; folders also where only their files are listed."""
        infos = self._zip.infolist()
        if len(infos) > MAX_MEMBERS:
            raise BadDataError(f"{self.path} lists {len(infos):,} files, more than {MAX_MEMBERS:,}.")
        for info in infos:
            _refuse_hostile(info, self.path)
        kept = [info for info in infos if not any(map(_is_clutter, info.filename.rstrip("/").split("/")))]
        files = {info.filename for info in kept if not info.is_dir()}
        folders = {info.filename.rstrip("/") for info in kept if info.is_dir()}
        parents = files | folders
        while parents := {name.rpartition("/")[0] for name in parents} - {""}:
            folders |= parents
        return sorted(files), sorted(folders)

    def read(self, name: str) -> bytes:
        """The bytes of one member. Raises DamagedMemberError when it cannot be read or is beyond the size limit."""
        try:
            info = self._zip.getinfo(name)
            if info.file_size > MAX_MEMBER_BYTES:
                raise DamagedMemberError(f"{info.file_size:,} bytes unpacked, more than any image has")
            return self._zip.read(info)
        except (*ZIP_ERRORS, OSError, KeyError) as error:
            raise DamagedMemberError(f"damaged in the zip ({error})") from error


Tree = FolderTree | ZipTree


def open_tree(path: str | os.PathLike[str]) -> Tree:
    """The tree of a folder or a zip file. Raises MissingDataError when nothing is there, BadDataError for other files."""
    path = Path(path)
    if path.is_dir():
        return FolderTree(path)
    if not path.exists():
        raise MissingDataError(f"There is no {path}.", "Check the path given to --from.")
    return ZipTree(path)


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _CLUTTER


def _refuse_hostile(info: zipfile.ZipInfo, path: Path) -> None:
    name = info.filename
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\\" in name:
        raise BadDataError(f"{path} holds a path that leads out of it: {name!r}.", "Do not trust that file.")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise BadDataError(f"{path} holds a link: {name!r}.", "Pack the files themselves instead of links to them.")
