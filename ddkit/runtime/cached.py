"""Tensors that are computed once and kept in the cache."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddkit.errors import BadFileError
from ddkit.runtime.files import one_at_a_time
from ddkit.runtime.tensor_files import save_safetensors

log = logging.getLogger(__name__)


def cache_key(made_of: Any, tensors: Iterable[Tensor] = ()) -> str:
    """20 hexadecimal digits that differ wherever `repr(made_of)` or the bytes of a tensor do, one after the other."""
    digest = hashlib.sha256(repr(made_of).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:20]


def cached_tensors(path: Path, names: Iterable[str], what: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in the safetensors file `path`; made and kept there first if they are not.

    names: of the tensors; a file with other ones, or a damaged one, is made again.
    what: they are, for messages ("the feature network of cifar100"). make: returns them; if it raises, nothing is kept.
    Only one process at a time makes them; the others wait and find them. In a cache that may not be written they are made
    each time.
    """
    wanted = set(names)
    if (found := _load(path, wanted)) is not None:
        return found
    with one_at_a_time(path.with_name(f".{path.name}.lock"), f"makes {what}"):
        if (found := _load(path, wanted)) is not None:
            return found
        log.info("Computing %s, to be kept in %s", what, path)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
        try:
            save_safetensors(tensors, path)
        except BadFileError as error:
            log.info("The result could not be saved: %s", error)
            return tensors
    # Read back, the file's pages stay with the system, which can drop them when memory is short.
    return _load(path, wanted) or tensors


def _load(path: Path, names: set[str]) -> dict[str, Tensor] | None:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return None
    return tensors if set(tensors) == names else None
