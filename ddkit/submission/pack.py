"""Packing a submission: checked before, reproducible, read back after, and never half written."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ddkit.data.store import dataset_spec
from ddkit.errors import BadFile, InvalidSubmission, MissingData
from ddkit.files import explain_os_error, replacing, sha256_of, sha256_of_stream
from ddkit.progress import Listener, ignore
from ddkit.submission.check import CheckSettings, Report, check_path, submission_files
from ddkit.submission.layout import load_tensor

_BLOCK = 1 << 20  # bytes
# The zip format begins in 1980. One date for all, so that the same tensors make the same zip.
_DATE = (1980, 1, 1, 0, 0, 0)
_ORDINARY_FILE = 0o100644


class Refused(InvalidSubmission):
    """`check` found errors, so nothing was packed. report: what it found."""

    def __init__(self, folder: Path, report: Report) -> None:
        errors = [finding for finding in report.findings if finding.level == "error"]
        named = "; ".join(f"{finding.where}: {finding.message}" for finding in errors[:3])
        more = f" And {len(errors) - 3} more." if len(errors) > 3 else ""
        super().__init__(f"{folder} was not packed: {named}{more}", f"See all: ddkit check {folder}")
        self.report = report


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
    settings: CheckSettings = CheckSettings(),
    progress: Listener = ignore,
) -> Path:
    """Check `folder`, write its tensors into the zip `out`, read that back, and return its path.

    The same tensors always make the same bytes. The zip holds the tensors only, at its root.
    strict: warnings refuse too. ignore_codes: findings that do not.
    Raises MissingData without a folder, Refused (an InvalidSubmission) for what `check` refuses, and BadFile
    for what the system refuses; an earlier zip stays as it was in each case.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise MissingData(f"There is no submission folder {folder}.", "Make a set first: ddkit generate")
    report = check_path(folder, settings=settings, progress=progress).ignoring(ignore_codes)
    report = report.strict() if strict else report
    if not report.ok:
        raise Refused(folder, report)
    files, _ = submission_files(folder)
    with replacing(out) as temporary:
        written = _write(files, temporary)
        _verify(temporary, written, settings)
    return out


def packed_files(path: str | os.PathLike[str]) -> tuple[PackedFile, ...]:
    """The members of a zip that `pack` wrote, with sizes and hashes of their bytes."""
    files = []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as member:
                files.append(PackedFile(info.filename, info.file_size, sha256_of_stream(member)))
    return tuple(files)


def _write(files: list[Path], path: Path) -> dict[str, str]:
    """Write the zip. Returns the SHA-256 of what was read of each file."""
    hashes = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            info = zipfile.ZipInfo(file.name, date_time=_DATE)
            info.external_attr = _ORDINARY_FILE << 16
            info.create_system = 3  # Unix, whatever system packs
            info.file_size = file.stat().st_size
            digest = hashlib.sha256()
            with file.open("rb") as source, archive.open(info, "w") as member:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    member.write(block)
            hashes[file.name] = digest.hexdigest()
    return hashes


def _verify(path: Path, written: dict[str, str], settings: CheckSettings) -> None:
    """Unpack the zip as the scorer does and load each tensor. Raises BadFile where anything differs from what was written."""
    try:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
            if archive.namelist() != list(written):
                raise BadFile(f"{path}: the zip that was read back has other members than were written.")
            for name in written:
                unpacked = Path(archive.extract(name, folder))
                if sha256_of(unpacked) != written[name]:
                    raise BadFile(f"{path}: '{name}' read back differs from what was written.", "Is the disk sound?")
                load_tensor(unpacked, dataset_spec(unpacked.stem), ipc=settings.ipc)
                unpacked.unlink()
    except OSError as error:
        raise explain_os_error(error, error.filename or path) from error
