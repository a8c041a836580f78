"""Trees of files: a folder, a zip or a tar, listed under plain relative names and read one file at a time.

`sources` knows what the files mean; a process that decodes images needs only this module. An archive from somebody else
may be hostile: its files are read into memory under a size limit, and it is refused as a whole if one of its names leads
out of it or if it holds links.
"""

from __future__ import annotations

import abc
import bz2
import functools
import gzip
import io
import lzma
import os
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from ddkit.errors import BadDataError
from ddkit.runtime.archives import ZIP_ERRORS, member_path
from ddkit.runtime.files import explain_os_error, why_not_a_file

MAX_FILE_BYTES = 256 << 20  # of one image; the largest photographs are far below

_MAX_DEPTH = 8  # of folders; layouts need seven, and a link to a folder above itself would never end
_MAX_EXPANSION = 200  # how many times its own size, and a gigabyte, an archive may unpack to
_BLOCK = 1 << 20  # bytes

# What systems leave in folders and people never put there; names that begin with a dot are left out as well.
_CLUTTER = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information",
    "lost+found", "icon\r",
}  # fmt: skip
_COMPRESSIONS: Mapping[bytes, Callable[..., IO[bytes]]] = {
    b"\x1f\x8b": gzip.open,  # type: ignore[dict-item]  # its stub has one overload for each mode
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


class DamagedFileError(Exception):
    """One file of a tree cannot be read; the others may be whole."""


class Tree(abc.ABC):
    """Files under POSIX paths relative to the tree. Hidden files and what systems leave behind are not listed.

    path: what the user calls it, for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getstate__(self) -> dict[str, Any]:
        """Without the lists, which may be long and which a process that decodes does not need."""
        return {name: value for name, value in vars(self).items() if name not in ("_listed", "files", "folders")}

    @abc.abstractmethod
    def _list(self) -> tuple[Iterable[str], Iterable[str]]:
        """(files, folders): all files, and at least the empty folders. Raises BadDataError for hostile archives."""

    @abc.abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file. Raises DamagedFileError or any of `READ_ERRORS`."""

    @abc.abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """A file to be read from front to back. This and reading raise any of `READ_ERRORS`."""

    @functools.cached_property
    def _listed(self) -> tuple[Iterable[str], Iterable[str]]:
        return self._list()

    @functools.cached_property
    def files(self) -> tuple[str, ...]:
        """The paths of all files, sorted."""
        return tuple(sorted(self._listed[0]))

    @functools.cached_property
    def folders(self) -> Mapping[str, tuple[list[str], list[str]]]:
        """For each folder by its path (the tree itself is ""), the names of the folders and of the files in it, sorted."""
        content: dict[str, tuple[list[str], list[str]]] = {"": ([], [])}

        def add(folder: str) -> None:
            if folder not in content:
                content[folder] = ([], [])
                above, _, name = folder.rpartition("/")
                add(above)
                content[above][0].append(name)

        for folder in self._listed[1]:
            add(folder)
        for file in self.files:
            folder, _, name = file.rpartition("/")
            add(folder)
            content[folder][1].append(name)
        for below, _ in content.values():
            below.sort()
        return content

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises DamagedFileError if it cannot be read or is larger than any image."""
        try:
            if (size := self.size(name)) > MAX_FILE_BYTES:
                raise DamagedFileError(f"{size:,} bytes, more than any image has")
            with self.open(name) as file:
                return file.read()
        except OSError as error:
            raise DamagedFileError(error.strerror or str(error)) from error
        except (*ZIP_ERRORS, KeyError) as error:
            raise DamagedFileError(f"damaged in the archive ({error})") from error


READ_ERRORS = (DamagedFileError, OSError, *ZIP_ERRORS, KeyError)


class FolderTree(Tree):
    """The files below a folder. Links are followed, because a folder is the user's own."""

    def _list(self) -> tuple[list[str], list[str]]:
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
        return files, folders

    def size(self, name: str) -> int:
        if problem := why_not_a_file(self.path / name):
            raise DamagedFileError(problem)
        return (self.path / name).stat().st_size

    def open(self, name: str) -> IO[bytes]:
        return (self.path / name).open("rb")


class ZipTree(Tree):
    """The files of a zip.

    file: where it lies, if that is not `path`. renamed: the zip's own names of the files that are listed under another one;
    found out when None. Raises BadDataError for a file that is not a whole zip.
    """

    def __init__(self, path: Path, file: Path | None = None, renamed: Mapping[str, str] | None = None) -> None:
        super().__init__(path)
        self._file = file or path
        self._renamed = renamed
        try:
            self._zip = zipfile.ZipFile(self._file)
        except OSError as error:
            raise explain_os_error(error, path) from error
        except ZIP_ERRORS as error:
            raise _incomplete(path, "zip file", error) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return ZipTree, (self.path, self._file, self._renamed)

    def _list(self) -> tuple[Iterable[str], Iterable[str]]:
        infos = self._zip.infolist()
        if links := [info.filename for info in infos if stat.S_ISLNK(info.external_attr >> 16)]:
            raise _link_error(links[0], self.path)
        # A name that was added twice means the later file, as it does when the zip is unpacked.
        names = {_member_name(info.filename, self.path): info.filename for info in infos}
        names.pop("", None)
        folders = {name for name, own in names.items() if own.endswith(("/", "\\"))}
        self._renamed = {name: own for name, own in names.items() if name != own and name not in folders}
        return names.keys() - folders, folders

    def _info(self, name: str) -> zipfile.ZipInfo:
        if self._renamed is None:
            _ = self.files
        return self._zip.getinfo((self._renamed or {}).get(name, name))

    def size(self, name: str) -> int:
        return self._info(name).file_size

    def open(self, name: str) -> IO[bytes]:
        return self._zip.open(self._info(name))


class PackedTree(Tree):
    """Files that lie one after another in one plain file, such as a tar that is not compressed.

    file: that file. index: where each file begins and how many bytes it has. folders: the empty ones at least.
    """

    def __init__(self, path: Path, file: Path, index: Mapping[str, tuple[int, int]], folders: Iterable[str] = ()) -> None:
        super().__init__(path)
        self._file, self._index, self._folders = file, index, tuple(folders)

    def _list(self) -> tuple[Iterable[str], Iterable[str]]:
        return self._index, self._folders

    def size(self, name: str) -> int:
        return self._index[name][1]

    def open(self, name: str) -> IO[bytes]:
        return io.BufferedReader(_Part(self._file, *self._index[name]))


class _Part(io.RawIOBase):
    """A part of a file as a separate file, to be read from front to back."""

    def __init__(self, path: Path, begin: int, size: int) -> None:
        self._file, self._left = path.open("rb", buffering=0), size
        self._file.seek(begin)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(memoryview(buffer)[: self._left]) or 0
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_tar(path: Path, scratch: Path, file: Path | None = None) -> PackedTree:
    """The files of a tar, which may be compressed with gzip, bzip2 or xz.

    file: where it lies, if that is not `path`. scratch: a folder that a compressed one is unpacked into; what is written
    there must stay as long as the tree is in use.
    Raises BadDataError for an archive that is damaged or hostile, and BadFileError if `scratch` cannot be written.
    """
    plain = _decompressed(path, scratch, file or path)
    index: dict[str, tuple[int, int]] = {}
    folders = []
    try:
        with tarfile.open(plain, "r:") as archive:
            for member in archive:
                if member.issym() or not (member.isfile() or member.isdir() or member.islnk()) or member.issparse():
                    raise _link_error(member.name, path)
                name = _member_name(member.name, path)
                if name and member.isdir():
                    folders.append(name)
                elif name and member.islnk():  # a second name of a file that came before
                    index[name] = index[_member_name(member.linkname, path)]
                elif name:
                    index[name] = (member.offset_data, member.size)
        with plain.open("rb") as opened:
            opened.seek(-512, os.SEEK_END)
            if any(opened.read()):  # a tar ends with zeros; one cut between two files would be read without complaint
                raise EOFError("its end is missing")
    except (tarfile.TarError, EOFError, ValueError, KeyError) as error:
        raise _incomplete(path, "archive", error) from error
    except OSError as error:
        raise explain_os_error(error, path) from error
    return PackedTree(path, plain, index, folders)


def _decompressed(path: Path, scratch: Path, file: Path) -> Path:
    """The file itself if it is not compressed, else what it unpacks to."""
    beginning = first_bytes(file)
    open_compressed = next((opener for magic, opener in _COMPRESSIONS.items() if beginning.startswith(magic)), None)
    if open_compressed is None:
        return file
    limit = _MAX_EXPANSION * file.stat().st_size + (1 << 30)
    handle, name = tempfile.mkstemp(suffix=".tar", dir=scratch)
    with os.fdopen(handle, "wb") as target, open_compressed(file) as source:
        while True:
            try:
                block = source.read(_BLOCK)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise explain_os_error(error, path) from error
                raise _incomplete(path, "archive", error) from error
            if not block:
                return Path(name)
            if target.tell() > limit:
                raise BadDataError(f"{path} unpacks to more than {_MAX_EXPANSION} times its size.", "Do not trust that file.")
            try:
                target.write(block)
            except OSError as error:
                raise explain_os_error(error, name) from error


def first_bytes(path: Path) -> bytes:
    """The beginning of a file, enough to tell what it is. Raises BadFileError."""
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise explain_os_error(error, path) from error


def is_tar(beginning: bytes) -> bool:
    """True if a file that begins so is a tar or a compressed file."""
    return beginning[257:262] == b"ustar" or beginning.startswith(tuple(_COMPRESSIONS))


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _CLUTTER or name.endswith(":Zone.Identifier")


def _member_name(name: str, path: Path) -> str:
    """The plain relative name of a member; "" for a member that is not listed. Raises BadDataError for one that leads out."""
    try:
        inside = member_path(name)
    except ValueError as error:
        raise BadDataError(f"{path} holds a path that leads out of it: {name!r}.", "Do not trust that file.") from error
    return "" if any(map(_is_clutter, inside.parts)) else inside.as_posix().removeprefix(".")


def _incomplete(path: Path, kind: str, error: Exception) -> BadDataError:
    return BadDataError(f"{path} is not a whole {kind}: {error}.", "The download may be incomplete: get it again.")


def _link_error(name: str, path: Path) -> BadDataError:
    return BadDataError(
        f"{path} holds a link or another special file: {name!r}.", "Pack the files themselves instead of links to them."
    )
