"""Tensors on disk, written atomically.

The bytes are made in memory first: written straight to a file, PyTorch and safetensors tell of a full disk by errors of
their own, which nobody could tell from a mistake in the program.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddkit.files import replacing


def save_torch(value: Any, path: str | os.PathLike[str]) -> None:
    """torch.save, with the same bytes whatever the file is called. Raises BadFile for what the system refuses."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def save_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Contiguous tensors on the CPU, by name, as a safetensors file. Raises BadFile for what the system refuses."""
    from safetensors.torch import save

    data = save(dict(tensors), dict(metadata) if metadata else None)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
