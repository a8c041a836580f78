"""Tensors on disk, written atomically.

The bytes are made in memory first, since PyTorch and safetensors report a full disk by errors of their own, which look
like a mistake in the program. Tensors of gigabytes are written straight to the file.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ddkit.errors import BadFileError
from ddkit.runtime.files import atomic_write


def save_torch(value: Any, path: str | os.PathLike[str], *, in_memory: bool = True) -> None:
    """torch.save, whose bytes do not depend on the file's name. Raises BadFileError if the system refuses.

    in_memory: False writes without a copy in memory; the bytes then depend on the file's name.
    """
    with atomic_write(path) as temporary:
        if in_memory:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            temporary.write_bytes(buffer.getbuffer())
            return
        try:
            torch.save(value, temporary)
        except RuntimeError as error:
            # The writer's check of its position fails where the system wrote less.
            if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
                raise
            raise BadFileError(f"{path} cannot be written.", "The disk may be full: free some space there.") from error


class UnloadableError(Exception):
    """The restricted loader refused a file. The text says why and is safe to show."""


def load_restricted(path: str | os.PathLike[str], *, mmap: bool = False) -> Any:
    """torch.load onto the CPU without executing code. Raises UnloadableError for damaged or hostile files, and OSError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
            raise
        # The loader raises errors of any kind for bytes that it cannot interpret. The text of an UnpicklingError is not
        # shown, because it advises to load without restrictions.
        own_words = not isinstance(error, pickle.UnpicklingError)
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise UnloadableError(reason if own_words else "its pickle does not describe tensors") from error


def save_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Save contiguous CPU tensors by name as a safetensors file. Raises BadFileError if the system refuses."""
    data = save(dict(tensors), dict(metadata) if metadata else None)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
