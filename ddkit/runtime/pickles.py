"""Pickles from others, read without importing or calling anything that they name."""

from __future__ import annotations

import io
import pickle
from typing import Any


class Call:
    """A call that a pickle asks for and that was not made. What a pickle names becomes a subclass of it.

    module, name: of the function or class. arguments: of the call. state: would then be set on the result. entries: would
    be set as those of a dict.
    """

    module = name = ""
    arguments: tuple[Any, ...]
    state: Any
    entries: dict[Any, Any]

    def __new__(cls, /, *arguments: Any, **keywords: Any) -> Call:
        call = super().__new__(cls)
        call.arguments, call.state, call.entries = arguments, None, {}
        return call

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        """Of lists of other classes, such as a deque; the values are not kept."""

    extend = add = update = append


class Storage(Call):
    """What a pickle says of numbers that lie outside it."""


class _Unpickler(pickle._Unpickler):  # the one in C takes as much memory as a number in the pickle says
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")  # the texts of Python 2
        self.named: dict[tuple[str, str], type[Call]] = {}

    def find_class(self, module: str, name: str) -> Any:
        found = self.named.setdefault((module, name), type("Call", (Call,), {"module": module, "name": name}))
        return str.encode if (module, name) == ("_codecs", "encode") else found  # Python 3's bytes in the older protocols

    def persistent_load(self, pid: Any) -> Storage:
        return Storage(pid)


def read_pickle(data: bytes) -> tuple[Any, frozenset[tuple[str, str]]]:
    """What a pickle holds, and all (module, name) that it refers to.

    Plain values, lists, tuples, sets and dicts are those of Python; a function or class is a subclass of `Call`, and what it
    would make an instance of that. Raises ValueError for a damaged pickle.
    """
    unpickler = _Unpickler(data)
    try:
        value = unpickler.load()
    except Exception as error:  # of almost any kind, by what the bytes ask for
        raise ValueError(f"its pickle is damaged: {str(error) or type(error).__name__}") from error
    return value, frozenset(unpickler.named)
