"""Computing the parts of a batch side by side on a CPU: a thread for each core, in which PyTorch uses that core alone.

Threads that share every matrix product wait for each other after each, which is short for small networks, and on a
machine that does other things as well they wait for most of the time. Parts of their own they never wait for.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


def cores_for(device: torch.device) -> int:
    """How many parts are worth computing at a time there: PyTorch's threads on a CPU, else one."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def side_by_side(work: Callable[[Part], Result], parts: Iterable[Part], workers: int) -> Iterator[Result]:
    """`work` of each part, in order, computed by `workers` threads at a time; by the calling one where that is one.

    What is set for a thread, such as inference mode, `work` sets itself.
    """
    return map(work, parts) if workers == 1 else threads(workers).map(work, parts)


@functools.cache
def threads(workers: int) -> ThreadPoolExecutor:
    """So many threads, in each of which PyTorch itself computes with one."""
    all_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "ddkit-parts", initializer=_compute_alone)
    everyone = threading.Barrier(workers + 1)
    for _ in range(workers):
        pool.submit(everyone.wait)
    everyone.wait()
    # Setting it in a thread also sets what threads to come start with.
    torch.set_num_threads(all_threads)
    return pool


def _compute_alone() -> None:
    torch.set_num_threads(1)
    # Without this the thread's first operation would take over what was set last in any thread.
    torch.get_num_threads()
