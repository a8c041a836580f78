"""Packing a submission: it is checked before, reproducible, read back after, and never half written."""

from __future__ import annotations

import os
import shlex
import tempfile
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ddkit.challenge import TRACKS
from ddkit.checks.check import check_path, submission_files
from ddkit.errors import BadFileError, InvalidSubmissionError, MissingDataError
from ddkit.history import PackedRecords, find_recipe
from ddkit.packing.zipping import write_zip
from ddkit.runtime.archives import ZIP_ERRORS
from ddkit.runtime.files import atomic_write, explain_os_error, require_ending, sha256_of, sha256_of_stream, why_not_a_file
from ddkit.runtime.progress import Listener, ignore
from ddkit.sets.distilled import check_command, generate_command, read_set
from ddkit.sets.findings import Report


@dataclass(frozen=True)
class PackedFile:
    """A member of a packed zip."""

    name: str
    size: int  # bytes
    sha256: str


def pack(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    strict: bool = False,
    ignore_codes: Collection[str] = (),
    name: str | None = None,
    records: PackedRecords | None = None,
    on_report: Callable[[Report], object] | None = None,
    on_event: Callable[[str], object] = lambda text: None,
    progress: Listener = ignore,
) -> Path:
    """Check `folder`, write its tensors into the zip `out`, read that back, and return its path.

    The same tensors always make the same bytes. The zip holds the tensors only, at its root.
    strict: refuse warnings too. ignore_codes: findings that do not count. records: where the zip is recorded, under `name`
    or else under that of the file `out`; None records nothing. on_report: called with what the check found, before
    anything is written. on_event: called with a sentence if the zip is recorded under another name.
    Raises MissingDataError without a folder or a tensor in it, InvalidSubmissionError for what `check` refuses, UsageError
    if `out` does not end in .zip or the records hold the name for other files, and BadFileError where the system refuses.
    An earlier zip stays as it was in each case.
    """
    folder, out = Path(folder), Path(out)
    require_ending(out, ".zip")
    if not folder.is_dir():
        raise MissingDataError(f"There is no folder {folder}.", f"Make a set first: {generate_command()}")
    files, _ = submission_files(folder)
    before = {file.name: _hash_of(file) for file in files}
    chosen, remark = records.choose_name(name, out.stem, before) if records else ("", "")
    report = check_path(folder, progress=progress).ignoring(ignore_codes)
    report = report.strict() if strict else report
    if not report.ok:
        errors = [f"{finding.where}: {finding.message}" for finding in report.findings if finding.level == "error"]
        more = f" And {len(errors) - 3} more." if len(errors) > 3 else ""
        raise InvalidSubmissionError(
            f"{folder} was not packed: {'; '.join(errors[:3])}{more}", f"See all: ddkit check {shlex.quote(str(folder))}"
        )
    if on_report:
        on_report(report)
    if not files:
        raise MissingDataError(f"There is no tensor in {folder} to pack.", f"Make one: {generate_command()}")
    with atomic_write(out) as temporary:
        written = write_zip({file.name: file for file in files}, temporary)
        if written != before:
            raise BadFileError(f"{folder} changed while it was being packed.", "Run it again.")
        _verify(temporary, written, folder)
    if records:
        recipe = next(filter(None, (find_recipe(folder / file, sha256) for file, sha256 in written.items())), "")
        records.add(chosen, out, sha256_of(out), 1, written, recipe)
        if remark:
            on_event(remark)
    return out


def packed_files(path: str | os.PathLike[str]) -> tuple[PackedFile, ...]:
    """The members of a zip that ddkit packed, with sizes and hashes of their bytes. Raises BadFileError for a damaged one."""
    files = []
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as member:
                    files.append(PackedFile(info.filename, info.file_size, sha256_of_stream(member)))
    except ZIP_ERRORS as error:
        raise BadFileError(f"{path} is damaged: {error}.", "Delete it, and pack again.") from error
    return tuple(files)


def _hash_of(path: Path) -> str:
    """SHA-256 of a file; "" for what is not a readable file, which the check reports."""
    try:
        return "" if why_not_a_file(path) else sha256_of(path)
    except (OSError, BadFileError):
        return ""


def _verify(path: Path, written: dict[str, str], origin: Path) -> None:
    """Unpack the zip as the scorer does and load each tensor.

    origin: the folder the tensors come from. Raises BadFileError if anything differs from what was written,
    InvalidSubmissionError if a tensor cannot be loaded, even if its findings are ignored.
    """
    try:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
            if archive.namelist() != list(written):
                raise BadFileError(f"{path}: the zip that was read back has other members than were written.")
            for name, sha256 in written.items():
                unpacked = Path(archive.extract(name, folder))
                if sha256_of(unpacked) != sha256:
                    raise BadFileError(
                        f"{path}: '{name}' read back differs from what was written.", "Check the disk, and pack again."
                    )
                try:
                    read_set(unpacked, unpacked.stem, ipc=TRACKS[1].ipc)
                except InvalidSubmissionError as error:
                    raise InvalidSubmissionError(
                        f"{origin / name} is not packed: the scorer could not use it.",
                        f"See: {check_command(origin / name, unpacked.stem)}",
                    ) from error
                unpacked.unlink()
    except OSError as error:
        raise explain_os_error(error, error.filename or path) from error
