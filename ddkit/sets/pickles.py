"""What a pickle would do, found out by reading its instructions and not by running them."""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_TENSOR_GLOBALS = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
}
_SPARSE_GLOBALS = {"torch._utils _rebuild_sparse_tensor", "torch.serialization _get_layout", "torch Size"}
_QUANTizED_GLOBALS = {"torch._utils _rebuild_qtensor", "torch per_tensor_affine", "torch per_channel_affine"}
_MOST_UNFOLDED = 100_000  # parts of one object; a bare tensor has about 20, a checkpoint some thousands


@dataclass(frozen=True)
class PickleFacts:
    """What a pickle would do, found out by reading and not by running it.

    names: every "module name" it refers to. locations: devices its storages were on.
    """

    names: frozenset[str]
    locations: frozenset[str]

    @property
    def storages(self) -> frozenset[str]:
        """The storage types among the names, such as "torch FloatStorage"."""
        return frozenset(n for n in self.names if n.startswith("torch") and n.endswith("Storage"))

    @property
    def foreign(self) -> frozenset[str]:
        """Names that no tensor needs: code that somebody would have executed."""
        return self.names - self.storages - _TENSOR_GLOBALS - _SPARSE_GLOBALS - _QUANTizED_GLOBALS

    @property
    def sparse(self) -> bool:
        """Whether it builds a sparse tensor."""
        return bool(self.names & _SPARSE_GLOBALS)

    @property
    def quantized(self) -> bool:
        """Whether it builds a quantized tensor."""
        return bool(self.names & _QUANTizED_GLOBALS)


def scan_pickle(data: bytes) -> PickleFacts:
    """What a pickle refers to, without running it.

    Raises ValueError where it is not a whole pickle, or unfolds into far more than it holds.
    """
    unfolding = _Unfolding()
    names: set[str] = set()
    locations: set[str] = set()
    strings: list[str] = []
    for code, argument, _ in _operations(data):
        unfolding.follow(code, argument)
        if code.name in ("GLOBAL", "INST"):
            names.add(str(argument))
        elif code.name == "STACK_GLOBAL":
            names.add(" ".join(strings[-2:]) or "(unnamed)")
        elif isinstance(argument, str):
            strings.append(argument)
        elif code.name == "BINPERSID" and "storage" in strings:
            # A storage is named by ("storage", type, key, location, size). Its location is the last string before,
            # unless that is a key, a number: then the location was named at an earlier storage already.
            locations.update(string for string in strings[-1:] if not string.isdigit())
    return PickleFacts(frozenset(names), frozenset(locations))


def _operations(data: bytes) -> Iterator[tuple[Any, Any, Any]]:
    try:
        yield from pickletools.genops(data)
    except (ValueError, IndexError, UnicodeDecodeError, struct.error, OverflowError) as error:
        raise ValueError(f"its pickle is damaged: {error}") from error


class _Unfolding:
    """The sizes of what a pickle's instructions put on the stack, counting what is referred to again each time.

    A few hundred bytes can describe a tuple of tuples of the same tuples that has 2 ** 40 parts: it takes no memory,
    but hashing or showing it never ends.
    """

    def __init__(self) -> None:
        self._stack: list[int | None] = []  # None is a mark
        self._memo: dict[int, int] = {}

    def follow(self, code: pickletools.OpcodeInfo, argument: Any) -> None:
        """Do to the sizes what the instruction does to the objects. Raises ValueError where one becomes too large."""
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else argument] = self._top()
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo.get(argument, 1))
        elif code.name == "DUP":
            self._stack.append(self._top())
        elif code.name == "MARK":
            self._stack.append(None)
        else:
            size = 1 + self._taken(code)
            if size > _MOST_UNFOLDED:
                raise ValueError("its pickle unfolds into far more than it holds")
            self._stack += [size] * len(code.stack_after)

    def _taken(self, code: pickletools.OpcodeInfo) -> int:
        """Take from the stack what the instruction takes; its size."""
        total, before = 0, list(code.stack_before)
        if pickletools.stackslice in before:
            while self._stack and (size := self._stack.pop()) is not None:
                total += size
            before = before[: before.index(pickletools.markobject)]
        return total + sum(self._stack.pop() or 0 for _ in before if self._stack)

    def _top(self) -> int:
        return (self._stack[-1] if self._stack else None) or 0
