"""Files of JSON lines: one value on each line, only ever appended to."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ddkit.errors import BadFileError
from ddkit.runtime.files import explain_os_error

_Record = TypeVar("_Record")


def read_lines(
    path: str | os.PathLike[str], on_problem: Callable[[int, str], object] = lambda number, problem: None
) -> list[tuple[int, Any]]:
    """The values of a file with the numbers of their lines, which begin at 1; empty if there is no file.

    Blank lines are skipped, and so are lines that are not JSON, such as a last line that a kill has cut short.
    on_problem: called with the number of each of the latter and what is wrong with it.
    Raises BadFileError if the file is there and cannot be read.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise explain_os_error(error, path) from error
    values = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values.append((number, json.loads(line)))
        except ValueError as error:
            on_problem(number, str(error))
        except RecursionError:
            on_problem(number, "nested too deeply")
    return values


def parse_lines(path: str | os.PathLike[str], parse: Callable[[Any], _Record]) -> tuple[tuple[_Record, ...], tuple[str, ...]]:
    """The records of a file in its order, and a text on each line that is not one; both empty if there is no file.

    parse: makes a record of a line's value, and raises BadFileError for a value that is not one.
    Raises BadFileError if the file is there and cannot be read.
    """
    records: list[_Record] = []
    problems: dict[int, str] = {}
    for number, value in read_lines(path, problems.__setitem__):
        try:
            records.append(parse(value))
        except BadFileError as error:
            problems[number] = str(error)
    return tuple(records), tuple(f"{path}, line {number}: {problems[number]}" for number in sorted(problems))


def append_line(path: str | os.PathLike[str], value: Any, *, sync: bool = True) -> None:
    """Append a value as JSON. After a last line that a kill has cut short it begins on a new line.

    Characters that UTF-8 cannot hold, which names of files may have, become "?".
    sync: wait until the line is on the disk. Raises BadFileError if the system refuses.
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
            file.write(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        raise explain_os_error(error, path) from error


def require_appendable(path: str | os.PathLike[str]) -> None:
    """Raise BadFileError if `append_line` would, as far as that is known without writing."""
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
