"""A split's safetensors file while it is being written: rows come in any order and are never all in memory.

The safetensors library only writes tensors that are in memory as a whole. Rows are written and not memory-mapped, because
a full disk must be an error and not a signal that kills the process.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_BYTES_AT_ONCE = 8 << 20  # of pixels in memory


@dataclass(frozen=True)
class SplitFile:
    """`labels` (count,) int64 and `images` (count, 3, image_size, image_size) uint8, beginning at byte `offset`."""

    path: Path
    count: int
    image_size: int
    offset: int

    @classmethod
    def create(cls, path: Path, labels: Sequence[int], image_size: int) -> SplitFile:
        """Write the header and the labels; images are zeros until they are written. Raises OSError."""
        count, shape = len(labels), [len(labels), 3, image_size, image_size]
        ends = [8 * count, 8 * count + math.prod(shape)]
        # Labels first, so that both tensors are aligned whatever the image size.
        header = {
            "labels": {"dtype": "I64", "shape": [count], "data_offsets": [0, ends[0]]},
            "images": {"dtype": "U8", "shape": shape, "data_offsets": ends},
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.write(np.asarray(labels, "<i8").tobytes())
            offset = file.tell()
            file.truncate(offset + math.prod(shape))
        return cls(path, count, image_size, offset)

    @property
    def rows_at_once(self) -> int:
        """The number of rows to hold in memory at a time."""
        return max(1, _BYTES_AT_ONCE // (3 * self.image_size**2))

    def write(self, start: int, rows: NDArray[np.uint8]) -> None:
        """Write rows (n, 3, S, S) from row `start` on. Raises OSError."""
        with self.path.open("rb+") as file:
            file.seek(self.offset + start * 3 * self.image_size**2)
            file.write(np.ascontiguousarray(rows).data)

    def labels(self) -> NDArray[np.int64]:
        """All labels, (count,). Raises OSError."""
        with self.path.open("rb") as file:
            file.seek(self.offset - 8 * self.count)
            return np.frombuffer(file.read(8 * self.count), "<i8")

    def blocks(self) -> Iterator[NDArray[np.uint8]]:
        """The rows in order, (n, 3, S, S) at a time. Raises OSError."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, self.count, self.rows_at_once):
                shape = (min(self.rows_at_once, self.count - start), 3, self.image_size, self.image_size)
                yield np.frombuffer(file.read(math.prod(shape)), np.uint8).reshape(shape)

    def keep(self, labels: Sequence[int], kept: NDArray[np.bool_]) -> SplitFile:
        """Drop the rows where `kept` (count,) is false. labels: of the rows that stay. Raises OSError."""
        shorter = SplitFile.create(self.path.with_suffix(".shorter"), labels, self.image_size)
        read = written = 0
        for block in self.blocks():
            chosen = block[kept[read : read + len(block)]]
            shorter.write(written, chosen)
            read, written = read + len(block), written + len(chosen)
        shorter.path.replace(self.path)
        return replace(shorter, path=self.path)
