"""A worker process of generate.py: it makes images until it must stop, and writes a shard every few seconds."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from shards import Failure, Job, Shard, say, shards_of

FIRST_BATCH, LARGEST_BATCH = 8, 4096  # images


def work(job: Job, worker: int, stop_at: Any, master: Connection) -> None:
    """Make images until the time that `stop_at` holds, writing a shard every few seconds."""
    try:
        make_images(job, worker, stop_at, master)
    except (Failure, OSError) as error:
        master.send(("failed", str(error)))
    except (RuntimeError, MemoryError) as error:  # what torch raises, in one line
        reason = str(error).strip().splitlines() or [""]
        master.send(("failed", f"{type(error).__name__}: {reason[0][:300]}"))


def make_images(job: Job, worker: int, stop_at: Any, master: Connection) -> None:
    device = choose_device(job, worker)
    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // job.workers))
    from classifier import Classifier  # imports diffusers, which takes seconds, for which no missing GPU should wait
    from sampling import Sampler

    sampler = Sampler(job.model, job.entry, device, job.seed)
    classifier = Classifier(job.model / "classifier", job.entry, device) if job.keep < 1 else None
    if worker == 0:
        say(f"sampling on {device}")  # which need not be the GPU that is there, if PyTorch cannot use it
    master.send(("loaded", time.monotonic() - job.began))
    shard = Shard(job, worker, first=max((end for _, end in shards_of(job, worker)), default=0))
    batch = BatchSize(longest=job.seconds_per_shard / 2)
    while (left := job.share(worker) - shard.end) > 0 and time.monotonic() + batch.expected < stop_at.value:
        began = time.monotonic()
        try:
            shard.add(sampler, min(batch.size, left), classifier)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch.size == 1:
                raise Failure(f"the memory of {device} is too small for one image.") from None
            batch.shrink()
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
            continue
        batch.learn(time.monotonic() - began)
        if time.monotonic() - shard.began > job.seconds_per_shard:
            shard = shard.write(master)
    shard.write(master)


def choose_device(job: Job, worker: int) -> str:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # the former counts with any driver
    kind, _, number = job.device.partition(":")
    if kind == "auto":
        return f"cuda:{worker % gpus}" if gpus else "cpu"
    if kind == "cuda" and int(number or 0) >= gpus:
        raise Failure(f"there is no GPU '{job.device}' that PyTorch can use here; --device auto takes what there is.")
    return f"cuda:{worker % gpus}" if job.device == "cuda" else job.device


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error says that memory is used up, in the words of PyTorch, of CUDA or of one of its libraries."""
    words = ("out of memory", "alloc_failed", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error).lower() for word in words)


class BatchSize:
    """Doubles as long as that costs no speed and batches stay short, then stays at the fastest size met."""

    def __init__(self, longest: float) -> None:
        self.size = self._fastest_size = FIRST_BATCH
        self.expected = 0.0  # seconds that the next batch may take
        self._longest, self._fastest, self._growing = longest, 0.0, True
        self._met = 0  # the size of the last batch

    def learn(self, seconds: float) -> None:
        """Judge the present size by a batch of it; not by the first, for which a GPU loads libraries and plans convolutions."""
        if self.size != self._met:
            self._met, self.expected = self.size, 1.5 * seconds
            return
        self.expected = max(1.5 * seconds, 0.8 * self.expected if self._fastest else 0.0)
        if not self._growing:
            return
        speed = self.size / seconds
        if speed > self._fastest:
            self._fastest, self._fastest_size = speed, self.size
        self._growing = speed > 0.9 * self._fastest and 2 * seconds < self._longest and self.size < LARGEST_BATCH
        if self._growing:
            self.size, self.expected = 2 * self.size, 2 * self.expected
        else:
            self.size = self._fastest_size

    def shrink(self) -> None:
        self.size, self._growing = self.size // 2, False
