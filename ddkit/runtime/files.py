"""Files that are written whole or not at all, locks, and errors of the file system in words."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

import platformdirs

from ddkit.errors import BadFileError, UsageError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# Errors of file systems on which files cannot be locked. Two processes in one folder are then the user's responsibility.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_BLOCK = 1 << 20  # bytes
_SECONDS_OF_A_DAY = 86400


def cache_folder() -> Path:
    """The folder of prepared data and of what is computed once: `$DDKIT_CACHE`, else the platform's user cache."""
    if chosen := os.environ.get("DDKIT_CACHE"):
        return Path(chosen).expanduser()
    return Path(platformdirs.user_cache_dir("ddkit", appauthor=False))


def why_not_a_file(path: str | os.PathLike[str]) -> str:
    """Why `path` is not a regular file, as a predicate; empty if it is one. Raises OSError.

    Opening a named pipe would wait for ever, and a device may have no end.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return ""
    return "is a folder, not a file" if stat.S_ISDIR(mode) else "is a pipe or a device, not a file"


def explain_os_error(error: OSError, path: str | os.PathLike[str]) -> BadFileError:
    """A BadFileError that says why the system refused `path`, and what to do."""
    remedies = {
        errno.ENOSPC: "Free some space there, or choose another place.",
        errno.EDQUOT: "Your quota there is used up: free some space, or choose another place.",
        errno.EACCES: "Change its permissions, or choose another place.",
        errno.EPERM: "Change its permissions, or choose another place.",
        errno.EROFS: "That file system is read-only: choose another place.",
        errno.ENOENT: "Check the path.",
        errno.EEXIST: "A file is where a folder is needed: choose another place.",
        errno.ENOTDIR: "A file is where a folder is needed: choose another place.",
    }
    reason, remedy = error.strerror or str(error), remedies.get(error.errno or 0, "")
    if "another place" in remedy and cache_folder() in Path(path).parents:
        remedy += " For ddkit's cache: export DDKIT_CACHE=FOLDER"
    return BadFileError(f"{path}: {reason}.", remedy)


def require_ending(path: Path, *endings: str) -> None:
    """Raise UsageError for a file to write that does not end so: it may be one of another kind, which would be lost."""
    if path.suffix not in endings:
        example = path.parent / f"{path.stem or 'NAME'}{endings[0]}"
        raise UsageError(f"{path} does not end in {' or '.join(endings)}.", f"Name a file such as {example}.")


@contextlib.contextmanager
def exclusive(folder: Path, what: str, *, elsewhere: str, is_main: bool = True) -> Iterator[None]:
    """Let only one process at a time work in a folder, which is created if needed.

    what: the work as a verb ("trains"), for the message. elsewhere: the option that names another folder.
    is_main: False in those processes of a group that leave the locking to the main one.
    Raises UsageError if another process is at work there, and BadFileError if the system refuses the folder.
    """
    if not is_main:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder / LOCK_FILE, timeout=0)
    except OSError as error:
        raise explain_os_error(error, error.filename or folder) from error
    if lock is None:
        raise UsageError(
            f"Another process {what} in {folder}.", f"Wait for it, stop it, or choose another folder with {elsewhere}."
        )
    with lock:
        yield


@contextlib.contextmanager
def one_at_a_time(lock_file: Path, what: str) -> Iterator[None]:
    """Wait until no other process holds `lock_file`, and hold it.

    what: the work as a verb and its object ("prepares glyphs"); after a second of waiting it is logged as a warning.
    Where the system refuses the file, in a read-only cache for example, nothing is locked: writing there
    will meet the same refusal.
    """
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(lock_file, timeout=1)
        if lock is None:
            log.warning("Waiting for another process that %s (it holds %s).", what, lock_file)
            lock = _acquire(lock_file, timeout=-1)
    except OSError:
        lock = None
    with lock or contextlib.nullcontext():
        yield


def _acquire(lock_file: Path, *, timeout: float) -> contextlib.AbstractContextManager[object] | None:
    """The lock, taken within `timeout` seconds (-1: wait for ever) and released at the context's end; None if it is taken.

    Raises OSError. On a file system without locks nothing is locked.
    """
    import filelock  # imported late: it takes as long as everything else here

    try:
        return filelock.FileLock(lock_file).acquire(timeout=timeout, poll_interval=0.1)
    except filelock.Timeout:  # an OSError, too
        return None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        return contextlib.nullcontext()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of an empty temporary file next to `path`; on success it is synced and renamed to `path`.

    On any error the temporary file is removed and `path` is unchanged. Those that a kill left a day ago are removed too.
    The parent folder is created if needed. If `path` is a link, the file that it leads to is replaced.
    Raises BadFileError if the system refuses, or if `path` is a folder, a pipe or a device, which cannot be replaced.
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    temporary = _temporary(path)
    try:
        if path.exists() and (problem := why_not_a_file(path)):
            raise BadFileError(f"{path} {problem}.", "Name a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_away(path)
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise explain_os_error(error, _reported_path(error, path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Like `atomic_write`, for a whole folder: yield an empty temporary folder that takes the place of `path`.

    The old folder is set aside just before the rename and removed after it, so that a kill
    leaves a complete folder at `path` or, in the instant between two renames, next to it.
    If `path` is a link, the folder that it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        aside = temporary.with_suffix(".old")
        try:
            if path.exists():
                os.replace(path, aside)
            os.replace(temporary, path)
        except BaseException:
            if aside.exists() and not path.exists():
                os.replace(aside, path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise explain_os_error(error, _reported_path(error, path)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """A name next to `path` that nobody else uses.

    What a kill leaves under such names is cleared away by the next `atomic_write` to `path` after a day, and in the cache by
    `ddkit.data.prepare`.
    """
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def _clear_away(path: Path) -> None:
    """Remove what a kill left of earlier writes to `path`. What is less than a day old may be another process's."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _SECONDS_OF_A_DAY:
                left.unlink()


def _reported_path(error: OSError, path: Path) -> str | os.PathLike[str]:
    """The path to report in an error: the requested one instead of the temporary one."""
    named = error.filename2 or error.filename or path  # a copy names its source first
    return path if Path(os.fsdecode(named)).name.startswith(f".{path.name}.") else named


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically. Characters that UTF-8 cannot hold, which names of files may have, become "?"."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. Raises BadFileError if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise explain_os_error(error, path) from error
    except ValueError as error:  # of the encoding, of JSON, or of a number with too many digits
        raise BadFileError(f"{path} is not JSON: {error}.") from error
    except RecursionError as error:
        raise BadFileError(f"{path} is nested too deeply.") from error


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises BadFileError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return sha256_of_stream(file)
    except OSError as error:
        raise explain_os_error(error, path) from error


def sha256_of_files(hashes: Mapping[str, str]) -> str:
    """Hexadecimal SHA-256 of several files, from their names with forward slashes -> SHA-256."""
    digest = hashlib.sha256()
    for name in sorted(hashes, key=PurePosixPath):
        digest.update(f"{name}\0{hashes[name]}\n".encode())
    return digest.hexdigest()


def sha256_of_stream(stream: IO[bytes]) -> str:
    """Hexadecimal SHA-256 of the rest of a stream."""
    digest = hashlib.sha256()
    while block := stream.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable on systems that can open folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network file systems refuse to sync folders, but the rename has happened
        os.fsync(handle)
    os.close(handle)
