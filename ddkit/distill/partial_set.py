"""Finished rows of a set in the making, kept on disk until the set itself is written.

They lie in a hidden folder next to the set, named after the set and after everything that decides its images, so that a
run with other settings or another model neither uses nor destroys them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddkit.errors import BadFileError
from ddkit.runtime.files import read_json, write_json
from ddkit.runtime.records import differences
from ddkit.runtime.tensor_files import save_safetensors

log = logging.getLogger(__name__)

_IDENTITY_FILE = "identity.json"
_PART = re.compile(r"rows-(\d+)\.safetensors")


def digest_of(identity: Mapping[str, Any]) -> str:
    """12 hexadecimal digits of the hash of plain values."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


class PartialSet:
    """The rows of one set, from the first one on without a gap.

    path: the path of the set. identity: plain values, everything that its images depend on.
    shape: (3, S, S), the shape of an image. rank, size: which of how many processes makes these rows; another number of
    processes does not continue them.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], shape: tuple[int, ...], *, rank: int = 0, size: int = 1
    ) -> None:
        self._identity, self._shape = json.loads(json.dumps(identity)), shape
        self._path, self._digest = path, digest_of(identity)
        part = f"-{rank}-of-{size}" if size > 1 else ""
        self._folder = path.parent / f".{path.stem}{part}.parts-{self._digest}"
        for folder in self._folders():
            if folder != self._folder and (changes := self._differences(folder / _IDENTITY_FILE)):
                log.warning(
                    "%s was left by an interrupted run with other settings and is not used (%s). "
                    "Remove it if you will not continue that run.", folder, "; ".join(changes),
                )  # fmt: skip

    def load(self) -> Tensor:
        """(n, 3, S, S) uint8: the rows that earlier runs have made, up to the first that is missing or damaged."""
        parts, count = [torch.empty(0, *self._shape, dtype=torch.uint8)], 0
        files = ((_PART.fullmatch(path.name), path) for path in self._folder.glob("*"))
        for start, path in sorted((int(match[1]), path) for match, path in files if match):
            if start < count:
                continue  # from a run with another batch size; later parts hold the same rows
            part = self._read(path) if start == count else None
            if part is None:
                break
            parts.append(part)
            count += len(part)
        return torch.cat(parts)

    def append(self, start: int, rows: Tensor) -> None:
        """Write rows start, start + 1, ... Raises BadFileError when they cannot be written."""
        if not (self._folder / _IDENTITY_FILE).is_file():
            write_json(self._folder / _IDENTITY_FILE, self._identity)
        save_safetensors({"images": rows.contiguous()}, self._folder / f"rows-{start:09d}.safetensors")

    def discard(self) -> None:
        """Remove the rows of all processes, as the set is written; rows of other settings stay."""
        for folder in self._folders():
            if folder.name.endswith(f".parts-{self._digest}"):
                shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """The folders of this set's rows, with whatever settings and number of processes."""
        name = re.compile(rf"\.{re.escape(self._path.stem)}(-\d+-of-\d+)?\.parts-[0-9a-f]+")
        return sorted(folder for folder in self._path.parent.glob(".*.parts-*") if name.fullmatch(folder.name))

    def _read(self, path: Path) -> Tensor | None:
        try:
            rows = load_file(path).get("images")
        except (OSError, SafetensorError) as error:
            log.warning("%s is damaged, so its images are made again: %s", path, error)
            return None
        fits = rows is not None and rows.dtype == torch.uint8 and rows.shape[1:] == self._shape
        return rows if fits else None

    def _differences(self, path: Path) -> list[str]:
        """Lines such as "guidance: 1.5, not 2.0"; none when the file cannot be read."""
        try:
            other = read_json(path)
        except BadFileError:
            return []
        return differences(self._identity, other) if isinstance(other, dict) else []
