"""Computing parts of a batch in parallel on a CPU: one thread for each core, in which PyTorch uses one core.

Threads that share a matrix product wait for each other after each one, which in small networks is often, and on a busy
machine long. Independent parts never wait for each other.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


def cores_for(device: torch.device) -> int:
    """The number of parts to compute in parallel: PyTorch's number of threads on a CPU, else one."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def parallel_map(
    work: Callable[[Part], Result], parts: Sequence[Part], workers: int, *, first_alone: bool = False
) -> Iterator[Result]:
    """The results of `work` for each part, in order, computed in `workers` threads; in the calling one if that is 1.

    first_alone: begin with the others when the first part is done, such as one that compiles for all.
    `work` itself has to set what PyTorch keeps for each thread, such as inference mode.
    """
    begin = 1 if first_alone else 0
    for group in (parts[:begin], parts[begin:]):
        yield from map(work, group) if workers == 1 else thread_pool(workers).map(work, group)


@functools.cache
def thread_pool(workers: int) -> ThreadPoolExecutor:
    """A pool of threads, in each of which PyTorch computes with a single thread."""
    all_threads = torch.get_num_threads()

    def use_one_thread() -> None:
        torch.set_num_threads(1)
        # Without this, the thread's first operation would take the number that was last set in any thread.
        torch.get_num_threads()

    pool = ThreadPoolExecutor(workers, "ddkit-parts", initializer=use_one_thread)
    everyone = threading.Barrier(workers + 1)
    for _ in range(workers):
        pool.submit(everyone.wait)
    everyone.wait()
    # Setting it in a thread also set it for threads that start later.
    torch.set_num_threads(all_threads)
    return pool
