"""A split's safetensors file while it is being written: rows come in any order and are never all in memory.

The safetensors library only writes tensors that are in memory as a whole. Rows are written and not memory-mapped, because
a full disk must be an error and not a signal that kills the process.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
        count, row_bytes = len(labels), 3 * image_size**2
        # Labels first, so that both tensors are aligned whatever the image size.
        images_begin, images_end = 8 * count, 8 * count + row_bytes * count
        header = {
            "labels": {"dtype": "I64", "shape": [count], "data_offsets": [0, images_begin]},
            "images": {
                "dtype": "U8",
                "shape": [count, 3, image_size, image_size],
                "data_offsets": [images_begin, images_end],
            },
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.write(np.asarray(labels, "<i8").tobytes())
            offset = file.tell()
            file.truncate(offset + row_bytes * count)
        return cls(path, count, image_size, offset)

    @property
    def row_bytes(self) -> int:
        return 3 * self.image_size**2

    @property
    def rows_at_once(self) -> int:
        """The number of rows to hold in memory at a time."""
        return max(1, _BYTES_AT_ONCE // self.row_bytes)

    def write(self, start: int, rows: NDArray[np.uint8]) -> None:
        """Write rows (n, 3, S, S) from row `start` on. Raises OSError."""
        with self.path.open("rb+") as file:
            file.seek(self.offset + start * self.row_bytes)
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
                rows = min(self.rows_at_once, self.count - start)
                data = np.frombuffer(file.read(rows * self.row_bytes), np.uint8)
                yield data.reshape(rows, 3, self.image_size, self.image_size)

    def keep(self, labels: Sequence[int], kept: NDArray[np.bool_]) -> SplitFile:
        """Drop the rows where `kept` (count,) is false. labels: of the rows that stay. Raises OSError."""
        shorter = SplitFile.create(self.path.with_suffix(".shorter"), labels, self.image_size)
        read = written = 0
        for block in self.blocks():
            chosen = block[kept[read : read + len(block)]]
            shorter.write(written, chosen)
            read, written = read + len(block), written + len(chosen)
        shorter.path.replace(self.path)
        return SplitFile(self.path, shorter.count, shorter.image_size, shorter.offset)
