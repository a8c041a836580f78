"""Archives from their official addresses: checked, and resumed after a broken connection, also in a later run.

Pooch and its like check and show progress, but begin again after each break, and these are archives of 160 to 240 MB.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ddkit import __version__
from ddkit.errors import BadDataError, BadFileError, DDKitError, MissingDataError
from ddkit.runtime.files import explain_os_error
from ddkit.runtime.progress import Listener, Progress, ignore

_log = logging.getLogger(__name__)

_BLOCK = 1 << 18  # bytes
_MEGABYTE = 1e6


@dataclass(frozen=True)
class Archive:
    """A file to download. md5: of the whole file, hexadecimal, as its publisher or torchvision states it."""

    url: str
    md5: str

    @property
    def file_name(self) -> str:
        return self.url.rpartition("/")[2]


OFFICIAL = {
    "cifar100": Archive("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    "tinyimagenet": Archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
}


@dataclass(frozen=True)
class RetryPolicy:
    """When to try again after a failure, and when to give up.

    attempts: failures in a row without a new byte after which to give up.
    pause: seconds before the second attempt; doubled for each further one.
    timeout: seconds without an answer that count as a failure.
    """

    attempts: int = 3
    pause: float = 1.0
    timeout: float = 30.0


def download(archive: Archive, folder: Path, *, patience: RetryPolicy = RetryPolicy(), progress: Listener = ignore) -> Path:
    """Download an archive into `folder` and return its path. An archive that is there and whole is not downloaded again.

    What has arrived stays in `<name>.part` if the network fails or the program is stopped; the next call continues from
    there. Raises MissingDataError if the archive cannot be downloaded, BadDataError if its checksum differs (the file is
    then removed), BadFileError if it cannot be written.
    """
    path = folder / archive.file_name
    part = path.with_name(path.name + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and _md5(path) == archive.md5:
            return path
        resumed = _size(part) > 0
        _fetch(archive, part, patience, progress)
        if resumed and _md5(part) != archive.md5:
            _log.warning("An earlier run's part of %s does not match it; downloading all of it again.", path.name)
            part.unlink()
            _fetch(archive, part, patience, progress)
        if (found := _md5(part)) != archive.md5:
            part.unlink()
            message = f"{archive.url} is not the expected file: its MD5 is {found}, expected {archive.md5}."
            raise BadDataError(
                message, f"Try again later, or get {archive.file_name} elsewhere and give it to ddkit data prepare --from."
            )
        os.replace(part, path)
    except OSError as error:
        raise explain_os_error(error, error.filename or path) from error
    return path


class _BrokenTransferError(Exception):
    """The network failed in a way that another attempt may overcome."""


def _fetch(archive: Archive, part: Path, patience: RetryPolicy, progress: Listener) -> None:
    """Complete `part`, over as many connections as that takes."""
    failures = 0
    while True:
        before = _size(part)
        try:
            return _fetch_rest(archive, part, patience.timeout, progress)
        except _BrokenTransferError as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures >= patience.attempts:
                raise _unreachable(archive, error) from error
            _log.info("%s: %s; trying again from byte %d", archive.url, error, _size(part))
            time.sleep(patience.pause * 2 ** (failures - 1))


def _fetch_rest(archive: Archive, part: Path, timeout: float, progress: Listener) -> None:
    """Append to `part` what is missing, over one connection.

    Raises _BrokenTransferError, or MissingDataError for what another attempt cannot change.
    """
    have = _size(part)
    headers = {"User-Agent": f"ddkit/{__version__}", **({"Range": f"bytes={have}-"} if have else {})}
    request = urllib.request.Request(archive.url, headers=headers)
    free = shutil.disk_usage(part.parent).free
    try:
        # `urlopen` would keep the proxies that were set when it was first called.
        with urllib.request.build_opener().open(request, timeout=timeout) as response:
            begin = 0
            if response.status == 206:
                match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
                if match is None:
                    raise _BrokenTransferError("the server answered with part of the file and did not say which")
                begin = int(match[1])
            length = response.headers.get("Content-Length")
            total = begin + int(length) if length is not None else None
            if total is not None and total - have > free:
                raise BadFileError(
                    f"{part.parent}: {(total - have) / _MEGABYTE:,.0f} MB are missing and {free / _MEGABYTE:,.0f} MB are free.",
                    "Free some space there, or set DDKIT_CACHE to another place.",
                )
            with _opened(part, begin) as file:  # a server that ignores the range sends everything again
                while block := response.read(_BLOCK):
                    try:
                        file.write(block)
                    except OSError as error:
                        raise explain_os_error(error, file.name) from error
                    done = Progress(
                        f"downloading {archive.file_name}", file.tell() / _MEGABYTE, total and total / _MEGABYTE, "MB"
                    )
                    progress(done)
                if total is not None and file.tell() < total:
                    raise _BrokenTransferError(f"the connection ended after {file.tell():,} of {total:,} bytes")
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the file has no byte after those in `part`: either it is complete, or they are of another file
            size = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range") or "")
            if size and int(size[1]) == have:
                return
            part.unlink()
            raise _BrokenTransferError("the part that was downloaded before is longer than the file") from error
        if error.code < 500 and error.code != 429:
            raise _unreachable(archive, error) from error
        raise _BrokenTransferError(str(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenTransferError(str(getattr(error, "reason", error)) or type(error).__name__) from error


def _opened(part: Path, size: int) -> BinaryIO:
    """`part`, cut to `size` bytes, to append to. A refusal is no failure of the network: it raises BadFileError."""
    try:
        file = part.open("ab")
        file.truncate(size)
    except OSError as error:
        raise explain_os_error(error, part) from error
    return file


def _unreachable(archive: Archive, error: Exception) -> DDKitError:
    return MissingDataError(
        f"{archive.url} could not be downloaded: {error}.",
        f"Try again (the download continues where it stopped), or get {archive.file_name} elsewhere and give it to "
        "ddkit data prepare --from.",
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    """The published checksums of these archives are MD5; they protect against damage, not against malice."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
