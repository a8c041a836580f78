"""Several processes, on one machine or many, that share what is to be computed (`accelerate launch`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch

# For each other: while one process trains, the rest have nothing to say for hours.
LONGEST_WAIT = timedelta(days=2)

_Item = TypeVar("_Item")


class ProcessGroup:
    """The processes that were launched together to compute on `wanted`; a group of one where none were.

    Of what is numbered, such as rounds or classes, number n belongs to process n modulo the group's size.
    """

    def __init__(self, wanted: torch.device) -> None:
        self._wanted = wanted
        self.rank, self.size = 0, 1
        self._state = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            # Without being told so, accelerate takes processes without a GPU for strangers to each other.
            self._state = PartialState(cpu=wanted.type == "cpu", timeout=LONGEST_WAIT)
            self.rank, self.size = self._state.process_index, self._state.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def local_items(self, numbers: Sequence[int]) -> list[int]:
        """Those of the numbers that are this process's to compute."""
        return [number for number in numbers if number % self.size == self.rank]

    @property
    def device(self) -> torch.device:
        """What was wanted; this process's own GPU, where the group computes on GPUs and wanted no particular one."""
        if self._state is not None and self._wanted.type == "cuda" and self._wanted.index is None:
            return torch.device("cuda", self._state.local_process_index % torch.cuda.device_count())
        return self._wanted

    def gather(self, items: list[_Item]) -> list[_Item]:
        """The items of all processes, in every process; the order is that of the ranks."""
        if self._state is None:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)
