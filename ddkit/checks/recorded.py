"""Which recorded sets a submission holds, by the hashes of its files."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from ddkit.checks.archive import TENSOR_ENDINGS, Member, read_members
from ddkit.errors import BadFileError
from ddkit.history import Known, PackedRecords, known_files, packed_file
from ddkit.results import RESULTS_FILE, read
from ddkit.runtime.files import sha256_of, why_not_a_file

log = logging.getLogger(__name__)


def recorded_files(path: str | os.PathLike[str], results: str | os.PathLike[str] = RESULTS_FILE) -> tuple[Known, ...]:
    """What the records say about a submission folder's tensors, one file, or a zip and its members.

    results: the file of evaluations; packed zips are recorded next to it. Empty if nothing was recorded there, or the
    files cannot be read, which `check_path` reports.
    """
    try:
        evaluated = read(results).results
        packed = PackedRecords(packed_file(results), writes=False).records
    except BadFileError as error:
        log.warning("%s", error)
        return ()
    if not evaluated and not packed:
        return ()
    return known_files(_hashes(Path(path)), evaluated, packed)


def _hashes(path: Path) -> dict[str, str]:
    """SHA-256 of each file by its name; for a zip, of the zip itself as well."""
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix == ".pt")
            return {file.name: sha256_of(file) for file in files if not why_not_a_file(file)}
        if why_not_a_file(path):
            return {}
        hashes = {path.name: sha256_of(path)}
    except (OSError, BadFileError):
        return {}
    if path.suffix.lower() == ".zip":
        for member in read_members(path, lambda name: name.endswith(TENSOR_ENDINGS)):
            if isinstance(member, Member) and member.data is not None:
                hashes[member.name] = hashlib.sha256(member.data).hexdigest()
    return hashes
