"""Tensors on disk, written atomically. A full disk is a BadFileError, whatever the library that writes raises."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ddkit.runtime.files import atomic_write


def save_torch(value: Any, path: str | os.PathLike[str]) -> None:
    """torch.save, whose bytes do not depend on the file's name. Raises BadFileError if the system refuses."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # of PyTorch's writer, while it closes a file that the system did not write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


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
    data = save(dict(tensors), dict(metadata) if metadata else None)  # its own writer reports a full disk as a mistake
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
