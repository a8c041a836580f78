#!/usr/bin/env python3
"""Make as many labeled images as a time budget allows, with the diffusion models next to this file.

    python generate.py --dataset cifar100 --out images.pt --time-budget 600

writes {"images": (N, 3, S, S) float32, normalized, "labels": (N,) int64} and ends within 600 seconds, counted from the
start of the process: importing, loading and saving included. With --ipc 10 instead of a budget it writes the fixed set
of track 1: one bare tensor, ten images of class 0, then of class 1, and so on. With --pixels the images are bytes, and
the file holds the constants "mean" and "std" that normalize them. If the bundle has a classifier, more images are made
than the file gets: the classifier labels them, and those that show their class most clearly are kept.

This process holds the clock. It starts a worker process for each GPU or core, which write what they make to
OUT.shards/ every few seconds; when the time is up it joins whatever lies there, so that a worker that crashes or hangs
costs no more than its own last seconds. Killed itself, it leaves the shards: --join makes the file of them, and the
same command run again continues with what was left of its budget.

It ends with status 0, or with one line on what is wrong: 2 for wrong usage, 3 if it cannot run here.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import importlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves the script's own folder out

from container import available_cpus, free_memory, set_defaults

from shards import (
    HASHES_FILE,
    HERE,
    Failure,
    Job,
    join,
    made_for,
    open_shards,
    say,
    sha256_of,
    shards_folder,
    shards_of,
    write_spent,
)

set_defaults()  # of OpenMP, before torch is loaded, here and in the workers

FLOAT_BYTES = 4
SECONDS_A_PROBABILITY = 3e-8  # of computing to label images by the classifier, twice what was measured
SECONDS_BETWEEN_REPORTS = 10.0
LEAST_FOR_A_WORKER = 8  # images, the first batch; with fewer a worker would load libraries for longer than it works
PATIENCE = 0.5  # share of the budget after which the other workers start even if the first has not loaded

stop_requested = False


def main() -> int:
    began = time.monotonic() - process_age()
    try:
        options = parse_options()
        job = make_job(options, began)
        # The first request to stop joins the images so far, unless --ipc asks for more of them; a second one ends it.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop_now)
        if not options.join:
            job = open_shards(job)
            run_workers(job)
        made, per_class = join(job)
        seconds = time.monotonic() - began
        say(f"{made:,} images, {per_class} of each class, in {options.out}, {seconds:.1f} s after the start")
        return 0
    except Failure as failure:
        print(f"generate.py: {failure}", file=sys.stderr)
        return failure.status
    except OSError as error:
        print(f"generate.py: {error.filename or 'writing'}: {error.strerror or error}", file=sys.stderr)
        return 3
    except (RuntimeError, MemoryError) as error:  # of torch, such as memory that is used up
        reason = (str(error).strip().splitlines() or ["the memory is used up"])[0]
        print(
            f"generate.py: {reason[:300]}. The images so far stay in {options.out}.shards; --join makes the file of them.",
            file=sys.stderr,
        )
        return 3


def process_age() -> float:
    """Seconds since the system started this process, which Python's own start took."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return 1.0  # no Linux
    # A shell that did other things before it replaced itself by Python has an older process.
    return age if 0 <= age < 10 else 1.0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", required=True, help="use the model in this folder of models/, which lies next to this file"
    )
    parser.add_argument("--out", required=True, type=Path, help="write the images to this file")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument(
        "--time-budget", type=float, metavar="SECONDS", help="end within this time, counted from the start of the process"
    )
    amount.add_argument(
        "--ipc", type=int, metavar="N", help="make exactly this many images of each class, however long it takes"
    )
    amount.add_argument("--join", action="store_true", help="only make the file of what a killed run left in OUT.shards/")
    parser.add_argument(
        "--most",
        type=int,
        metavar="N",
        help="write no more than this many images, even if there is time left; there must be one of each class",
    )
    parser.add_argument(
        "--pixels", action="store_true", help="write bytes and the constants, which makes the file a quarter as large"
    )
    parser.add_argument("--seed", type=int, default=0, help="use this random seed  [default: 0]")
    parser.add_argument("--device", help="use auto, cpu, mps, cuda or cuda:N; auto takes all GPUs  [default: as packed]")
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="start this many workers  [default: one for each GPU or core, fewer for few images]",
    )
    parser.add_argument("--steps", type=int, help="sample in this many steps  [default: as packed]")
    parser.add_argument("--guidance", type=float, help="set the scale of guidance; 1 turns it off  [default: as packed]")
    parser.add_argument(
        "--mode-guidance",
        type=float,
        metavar="SCALE",
        help="set the scale of mode guidance; 0 turns it off  [default: as packed]",
    )
    parser.add_argument(
        "--keep", type=float, metavar="SHARE",
        help="keep this share of the images: a classifier labels them, and those that show their class most clearly are "
        "kept; 1 keeps all, as they were sampled  [default: as packed]",
    )  # fmt: skip
    options = parser.parse_args()
    at_least = {"time_budget": 1e-9, "ipc": 1, "most": 1, "processes": 1, "steps": 1, "guidance": 0, "mode_guidance": 0}
    for name, least in at_least.items():
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            raise Failure(f"--{name.replace('_', '-')} cannot be {value:g}.", 2)
    if options.device and not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", options.device):
        raise Failure(f"--device cannot be '{options.device}'; give auto, cpu, mps, cuda or cuda:N.", 2)
    if options.keep is not None and not 0 < options.keep <= 1:
        raise Failure(f"--keep cannot be {options.keep:g}; give a share above 0 and up to 1.", 2)
    if options.ipc and options.most:
        raise Failure("--ipc and --most exclude each other: both say how many images to make.", 2)
    return options


def make_job(options: argparse.Namespace, began: float) -> Job:
    """Everything that can be known to be wrong is known after this, before the budget is spent."""
    model = HERE / "models" / options.dataset
    if not (model / "entry.json").is_file() or model.parent != HERE / "models":
        raise Failure(f"unknown dataset '{options.dataset}'. {nearest_dataset(options.dataset)}", 2)
    check_hashes(model)
    entry = json.loads((model / "entry.json").read_text(encoding="utf-8"))
    names = ("steps", "guidance", "mode_guidance", "keep")
    entry |= {name: value for name in names if (value := getattr(options, name)) is not None}
    if entry["mode_guidance"] and not (model / "modes.safetensors").is_file():
        raise Failure("--mode-guidance needs modes, and the bundle has none; pack it again with --mode-guidance.", 2)
    keep = entry.get("keep", 1.0)
    if keep < 1 and not (model / "classifier").is_dir():
        raise Failure("--keep needs a classifier, and the bundle has none; pack it again without --keep 1.", 2)
    classes = entry["num_classes"]
    if options.most and options.most < classes:
        raise Failure(
            f"--most {options.most} is less than an image of each of the {classes} classes; give {classes} or more.", 2
        )
    out = options.out.absolute()
    check_writable(out)
    device = options.device or entry["device"]
    budget = math.inf if options.time_budget is None else options.time_budget
    room = 0 if options.join else check_space(entry, out, options.ipc, 1 if options.pixels else 4, keep)
    packed = entry.get("images_per_class") or room
    limit = min(room // classes, made_for(options.most // classes if options.most else packed, keep)) * classes
    images = limit if options.ipc is None else made_for(options.ipc, keep) * classes
    workers = options.processes or min(usual_workers(device), math.ceil(images / LEAST_FOR_A_WORKER))
    return Job(model, entry, out, options.seed, device, workers, options.ipc, limit, began, budget, options.pixels)


def nearest_dataset(name: str) -> str:
    known = sorted(path.parent.name for path in HERE.glob("models/*/entry.json"))
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known) or 'none, models/ is empty'}."


def check_hashes(model: Path) -> None:
    """Raise Failure unless every file of the model folder is the one that was packed."""
    try:
        lines = (HERE / HASHES_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise Failure(f"{HASHES_FILE} is missing next to generate.py; unpack the bundle again.") from None
    except UnicodeDecodeError:
        raise Failure(f"{HASHES_FILE} is damaged; unpack the bundle again.") from None
    pairs = [line.split("  ", 1) for line in lines if line]
    if any(len(pair) < 2 for pair in pairs):
        raise Failure(f"{HASHES_FILE} is damaged; unpack the bundle again.")
    packed = {HERE / name: digest for digest, name in pairs}
    packed = {path: digest for path, digest in packed.items() if model in path.parents}
    for path in sorted(packed.keys() | {path for path in model.rglob("*") if path.is_file()}):
        if not path.is_file() or packed.get(path) != sha256_of(path):
            raise Failure(f"{path.relative_to(HERE)} is not the file that was packed; unpack the bundle again.")


def check_writable(out: Path) -> None:
    """Raise Failure unless the output file can be written."""
    if out.is_dir():
        raise Failure(f"--out {out} is a folder; name a file, such as {out / 'images.pt'}.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent) as file:
            file.write(b"writable")
    except OSError as error:
        raise Failure(f"--out {out} cannot be written: {error.strerror}.") from error


def check_space(entry: Mapping[str, Any], out: Path, ipc: int | None, bytes_per_value: int, keep: float = 1.0) -> int:
    """How many images can be made: by what the disk has room for, and the memory of whoever loads the file here.

    out: the file; the shards that a killed run has left next to it are continued or discarded, so they take no room.
    ipc: images of each class in the file. bytes_per_value: of the file; shards hold one. keep: the share of the images that
    the file gets. Raises Failure if there is room for too few.
    """
    values = 3 * entry["image_size"] ** 2
    needed = made_for(ipc or 1, keep) * entry["num_classes"]
    # The probabilities of the classes are held, sorted and compared while the images are joined.
    labeling = 6 * entry["num_classes"] if keep < 1 else 0
    left = sum(path.stat().st_size for path in shards_folder(out).glob("*"))
    on_disk, in_memory = shutil.disk_usage(out.parent).free + left, free_memory()
    room = int(0.9 * on_disk / (values * (1 + keep * bytes_per_value)))
    if room < needed:
        raise Failure(f"{on_disk / 1e6:,.0f} MB are free in {out.parent}, room for {room:,} images; {needed:,} are needed.")
    loaded = int(0.7 * in_memory / (values * keep * bytes_per_value + labeling))
    if loaded < needed:
        raise Failure(f"{in_memory / 1e6:,.0f} MB of memory are free, room for {loaded:,} images; {needed:,} are needed.")
    return min(room, loaded)


def usual_workers(device: str) -> int:
    """One for each GPU; on a CPU one for each core, up to 8.

    Threads that work on one small batch wait for each other, on a machine that does other things as well for most of
    the time; processes of their own do not.
    """
    if device in ("auto", "cuda") and (gpus := gpu_count()):
        return gpus
    return min(available_cpus(), 8) if device in ("auto", "cpu") else 1


def gpu_count() -> int:
    """How many NVIDIA GPUs may be used, asked of the driver: importing torch for it would cost seconds."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    with contextlib.suppress(OSError):
        driver, count = ctypes.CDLL(name), ctypes.c_int()
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return 0


# The clock


class Clock:
    """When workers must stop, from what has been measured."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.images = sum(end - first for worker in range(job.workers) for first, end in shards_of(job, worker))
        self.seconds_an_image: list[float] = []  # of writing, shard by shard
        self.slowness = 1.0  # seconds that one second of computing takes this process, on a busy machine

    def import_torch(self) -> None:
        """Joining needs it: imported while the workers load; and a measure of how much others leave us of the machine."""
        began, computed = time.monotonic(), time.thread_time()
        importlib.import_module("torch")
        self.slowness = max(1.0, (time.monotonic() - began) / max(time.thread_time() - computed, 0.1))

    def heard(self, images: int, seconds: float) -> None:
        """Of so many images written in so many seconds."""
        self.images += images
        self.seconds_an_image.append(seconds / images)

    @property
    def stop_at(self) -> float:
        """Joining and ending may take a second of computing, labeling where only a share is kept, and twice what writing as
        many floats as the file gets took before.

        With --pixels, too, so that as many images are made as without.
        """
        computing = min(self.slowness, 0.06 * self.job.budget)
        measured = statistics.median(self.seconds_an_image) if self.seconds_an_image else 0.0
        keep = self.job.keep
        labeling = SECONDS_A_PROBABILITY * self.slowness * self.images * self.job.classes if keep < 1 else 0.0
        return self.job.end - self.job.margin - computing - labeling - 2 * FLOAT_BYTES * keep * measured * self.images


def stop_now(number: int, frame: Any) -> None:
    """On SIGINT and SIGTERM: the images so far count. A second one ends it at once."""
    global stop_requested
    if stop_requested:
        raise SystemExit(128 + number)
    stop_requested = True


def start_work(*arguments: Any) -> None:
    """In a worker's process, which alone imports the networks."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the master says when to stop
    from worker import work

    work(*arguments)


class Crew:
    """The worker processes. The first begins alone: on a busy machine it loads the sooner, and so there are images."""

    def __init__(self, job: Job, stop_at: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.stop_at = context.Value("d", stop_at, lock=False)  # on time.monotonic()'s clock
        self.hears: list[Connection] = []
        self._job, self._context, self._processes = job, context, []
        self._start()

    @property
    def is_whole(self) -> bool:
        """True if all of them have been started."""
        return len(self._processes) == self._job.workers

    def start_others(self) -> None:
        while not self.is_whole:
            self._start()

    def end(self) -> None:
        """Without waiting for it: on a busy machine processes take seconds to go."""
        for process in self._processes:
            process.kill()

    def _start(self) -> None:
        hears, tells = self._context.Pipe(duplex=False)
        arguments = (self._job, len(self._processes), self.stop_at, tells)
        process = self._context.Process(target=start_work, args=arguments, daemon=True)
        process.start()
        tells.close()  # so that the pipe ends with the worker
        self.hears.append(hears)
        self._processes.append(process)


def run_workers(job: Job) -> None:
    """Start the workers and keep the clock until they ended or their time is up. Raises Failure without images."""
    clock = Clock(job)
    threading.Thread(target=clock.import_torch, daemon=True).start()
    crew = Crew(job, clock.stop_at)
    try:
        failure = listen(job, clock, crew)
    finally:
        crew.end()
    if clock.images == 0:
        shutil.rmtree(job.shards, ignore_errors=True)
        raise Failure(failure or "the workers ended without an image; their messages are above.")
    if failure:
        say(f"a worker failed: {failure}")
    if job.ipc is None and clock.images >= job.limit:
        say(f"stopped after making {clock.images:,} images: --most was reached, or there is no room for more")


def listen(job: Job, clock: Clock, crew: Crew) -> str:
    """Hear the workers until all ended, or a quarter of the margin after they should have. Returns what went wrong."""
    state, failure, said = "importing and loading the model", "", time.monotonic()
    patience = job.began + PATIENCE * job.budget
    while (crew.hears or not crew.is_whole) and time.monotonic() < crew.stop_at.value + job.margin / 4:
        if not crew.hears or time.monotonic() > patience:
            crew.start_others()  # the first has failed, or takes so long that it may
        for connection in wait(crew.hears, timeout=0.1):
            try:
                kind, value = connection.recv()
            except EOFError:
                crew.hears.remove(connection)
                continue
            if kind == "failed":
                failure = value
            elif kind == "loaded":
                state = f"making the first images, with a model loaded after {value:.1f} s"
                crew.start_others()
            else:
                clock.heard(*value)
                write_spent(job)
        crew.stop_at.value = min(clock.stop_at, crew.stop_at.value, time.monotonic() if stop_requested else math.inf)
        if time.monotonic() - said > SECONDS_BETWEEN_REPORTS:
            said = time.monotonic()
            say(f"{clock.images:,} images after {said - job.began:.0f} s")
    if not clock.images and crew.hears and not failure:
        spent = f"{time.monotonic() - job.began:.1f} s of a budget of {job.budget:g} s"
        return f"stopped after {spent}, while {state}. It needs more time, or a less busy machine."
    return failure


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # taking torch down would be on the clock
