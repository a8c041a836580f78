"""Writing so that nothing is lost: a reader finds the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import lzma
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ddkit.errors import BadFileError, UsageError

try:
    import fcntl
except ImportError:  # Windows has no such locks; there two processes in one folder are the user's care.
    fcntl = None

LOCK_FILE = ".lock"
# What locking a file raises on a file system that has no locks, where it is the user's care too.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# What zipfile raises over a damaged or hostile zip. RuntimeError: a password is asked for; NotImplementedError: a
# compression or a version that this Python lacks; ValueError: a directory that cannot be true.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError, ValueError)
_BLOCK = 1 << 20  # bytes


def cache_folder() -> Path:
    """Where prepared data and measured facts lie: `$DDKIT_CACHE`, else the platform's user cache."""
    if chosen := os.environ.get("DDKIT_CACHE"):
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("ddkit", appauthor=False))


def why_not_a_file(path: str | os.PathLike[str]) -> str:
    """Why what lies at `path` is not to be opened, as a predicate; empty for a file. Raises OSError.

    Opening a named pipe waits for ever, and a device may have no end.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return ""
    return "is a folder, not a file" if stat.S_ISDIR(mode) else "is a pipe or a device, not a file"


def explain_os_error(error: OSError, path: str | os.PathLike[str]) -> BadFileError:
    """The BadFileError that says what the system refused at `path` and what to do."""
    remedies = {
        errno.ENOSPC: "Free some space there, or choose another place.",
        errno.EDQUOT: "Your quota there is used up: free some space, or choose another place.",
        errno.EACCES: "Change its permissions, or choose another place.",
        errno.EPERM: "Change its permissions, or choose another place.",
        errno.EROFS: "That file system is read-only: choose another place.",
        errno.ENOENT: "Check the path.",
        errno.EEXIST: "A file is in the way of that folder: choose another place.",
        errno.ENOTDIR: "A file is in the way of a folder: choose another place.",
    }
    reason = error.strerror or str(error)
    return BadFileError(f"{path}: {reason}.", remedies.get(error.errno or 0, ""))


@contextlib.contextmanager
def exclusive(folder: Path, what: str, *, elsewhere: str, is_main: bool = True) -> Iterator[None]:
    """One process at a time at work in a folder, which is made when missing.

    what: it does there ("trains"). elsewhere: the option that names another folder. leads: of processes that work
    together, whether this is the one that watches over the folder.
    Raises UsageError where another is at work there, and BadFileError for what the system refuses.
    """
    if fcntl is None or not is_main:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise explain_os_error(error, error.filename or folder) from error
    with lock:
        try:
            # Unlike flock's, these locks are not inherited by the processes that compile.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UsageError(
                f"Another process {what} in {folder}.", f"Wait for it, stop it, or choose another folder with {elsewhere}."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise explain_os_error(error, folder) from error
        yield


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed onto `path`.

    On any error the temporary file is removed and `path` stays as it was.
    The parent folder is made when missing. A link to a file stays one; the file that it leads to is replaced.
    Raises BadFileError for what the system refuses, and for a pipe or a device, which cannot be replaced.
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    temporary: Path | None = None
    try:
        if path.exists() and not path.is_dir() and (problem := why_not_a_file(path)):
            raise BadFileError(f"{path} {problem}.", "Name a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        # mkstemp makes private files; what we write is as shareable as any file the user makes.
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise explain_os_error(error, _reported_path(error, path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Like `replacing`, for a whole folder: yields an empty temporary folder that takes `path`'s place.

    The old folder is set aside just before the rename and removed after it, so that a kill
    leaves a complete folder at `path` or, in the instant between two renames, beside it.
    A link to a folder stays one; the folder that it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        temporary.chmod(0o777 & ~_umask())
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
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _reported_path(error: OSError, path: Path) -> str | os.PathLike[str]:
    """What the system refused, by the name that was asked for: temporary ones say nothing to anybody."""
    named = error.filename or path
    return path if Path(os.fsdecode(named)).name.startswith(f".{path.name}.") else named


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically. What cannot be, as in names that the system has in other letters, becomes "?"."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def require_appendable(path: str | os.PathLike[str]) -> None:
    """Raise BadFileError where `append_line` would, as far as that can be known without writing."""
    path = Path(path)
    try:
        if path.exists():
            with path.open("ab"):
                return
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
        if not os.access(above, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))
    except OSError as error:
        raise explain_os_error(error, error.filename or path) from error


def append_line(path: str | os.PathLike[str], line: str, *, sync: bool = True) -> None:
    """Append a line of UTF-8, as `write_text` has it; after a last line that a kill has torn, on a new one. Raises
    BadFileError.

    sync: wait until it is on the disk.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            file.seek(0, os.SEEK_END)
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(line.encode("utf-8", "replace") + b"\n")
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        raise explain_os_error(error, path) from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. Raises BadFileError that names the file when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise explain_os_error(error, path) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadFileError(f"{path} is not JSON: {error}.") from error
    except RecursionError as error:
        raise BadFileError(f"{path} is nested too deeply.") from error


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises BadFileError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return sha256_of_stream(file)
    except OSError as error:
        raise explain_os_error(error, path) from error


def sha256_of_stream(stream: IO[bytes]) -> str:
    """Hexadecimal SHA-256 of what is left to read in a stream, read in blocks."""
    digest = hashlib.sha256()
    while block := stream.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can open folders."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        # Some network file systems refuse to sync folders; the rename has happened all the same.
        return
    finally:
        os.close(handle)
