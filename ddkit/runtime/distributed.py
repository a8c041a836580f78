"""Several processes, on one machine or more, that share a computation (`accelerate launch`)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch

from ddkit.runtime.device import own_device
from ddkit.runtime.environment import processes

# A process may wait for hours for another one that trains.
LONGEST_WAIT = timedelta(days=2)

_Item = TypeVar("_Item")


class ProcessGroup:
    """The processes that were launched together to compute on the device `wanted`; a process alone is a group of one.

    Of numbered items, such as rounds or classes, item n belongs to process n modulo the group's size.
    """

    def __init__(self, wanted: torch.device) -> None:
        self._wanted = wanted
        self.rank, self.size = 0, 1
        self._state = None
        if processes() > 1:
            from accelerate import PartialState

            # On CPUs accelerate only connects the processes if `cpu` is true.
            self._state = PartialState(cpu=wanted.type == "cpu", timeout=LONGEST_WAIT)
            self.rank, self.size = self._state.process_index, self._state.num_processes

    @property
    def is_main(self) -> bool:
        """True in the process that prints and writes for all."""
        return self.rank == 0

    def local_items(self, numbers: Sequence[int]) -> list[int]:
        """Those of the numbers that this process computes."""
        return [number for number in numbers if number % self.size == self.rank]

    @property
    def device(self) -> torch.device:
        """The wanted device; if that is "cuda" without a number, this process's GPU."""
        return self._wanted if self._state is None else own_device(self._wanted)

    def gather(self, items: list[_Item]) -> list[_Item]:
        """The items of all processes in the order of their ranks, in every process."""
        if self._state is None:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)
