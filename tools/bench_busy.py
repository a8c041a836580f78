"""How long ddkit's commands take on a machine that other work shares, with and without spinning threads.

    python tools/bench_busy.py [--quick] [--commands NAME ...] [--repeats N] [--spin N ...]

Each command runs as a process of its own on the built-in images and on two CPUs: while nothing else runs there, next to
one and to two busy processes, and with a quota of one CPU of the two. "before" has the threads spin as libgomp does by
default (GOMP_SPINCOUNT=300000) and as many of them as the affinity mask has CPUs; "after" is what ddkit sets by itself.
The two run in turn, `repeats` times, and the fastest run of each counts. --spin adds columns with other counts.
The quota is one of control groups, for which the script needs the right to make one (root); without it, one CPU is used.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ddkit.runtime.device import cpu_model
from ddkit.runtime.environment import versions

CPUS = 2
SET = "set.pt"
# What is run, by name: the arguments, with {steps} for the size of the work.
COMMANDS = {
    "train": ["train", "--dataset", "glyphs", "--preset", "demo", "--autoencoder", "model/vae", "--steps", "{steps}",
              "--out", "{out}"],
    "sample": ["generate", "--dataset", "glyphs", "--model", "model", "--ipc", "{steps}", "--out", "{out}.pt"],
    "refine": ["refine", SET, "--dataset", "glyphs", "--steps", "{steps}", "--out", "{out}.pt", "--run", "{out}-run"],
    "evaluate": ["evaluate", SET, "--dataset", "glyphs", "--epochs-setting", "{steps}", "--rounds", "1", "--results",
                 "{out}.jsonl", "--state", "{out}-state"],
    "check": ["check", SET, "--dataset", "glyphs"],
}  # fmt: skip
STEPS = {"train": 400, "sample": 50, "refine": 60, "evaluate": 60, "check": 0}
QUICK_STEPS = {"train": 4, "sample": 1, "refine": 2, "evaluate": 1, "check": 0}
BUSY = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything once: does it run?")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--spin", type=int, nargs="*", default=[], help="other values of GOMP_SPINCOUNT to try")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    cpus = sorted(os.sched_getaffinity(0))[:CPUS]
    os.sched_setaffinity(0, cpus)  # inherited by all that is started
    print(f"{cpu_model()}, {len(cpus)} CPUs, torch {versions()['torch']}; load average before: {load:.1f}")
    ways = {
        "before": {"GOMP_SPINCOUNT": "300000", "OMP_NUM_THREADS": str(len(cpus))},
        "after": {},
        **{f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in arguments.spin},
    }
    repeats, steps = (1, QUICK_STEPS) if arguments.quick else (arguments.repeats, STEPS)
    with tempfile.TemporaryDirectory() as name, quota_group() as group:
        folder = Path(name)
        prepare(folder, arguments.commands)
        conditions = {"idle": 0, "next to 1 process": 1, "next to 2 processes": 2, group.title: 0}
        print(f"{'':10}{'':22}" + "".join(f"{way:>11}" for way in ways) + "   before/after  after/idle")
        for command in arguments.commands:
            idle = 0.0
            for condition, busy in conditions.items():
                within = group if condition == group.title else None
                with busy_processes(busy):
                    seconds = fastest(folder, command, steps[command], ways, repeats, within)
                idle = idle or seconds["after"]
                columns = "".join(f"{value:9.2f} s" for value in seconds.values())
                ratios = f"{seconds['before'] / seconds['after']:13.2f} x {seconds['after'] / idle:9.2f} x"
                print(f"{command:10}{condition:22}{columns}{ratios}", flush=True)


class QuotaGroup:
    """A control group with a quota of one CPU, of version 1 or 2; without a folder, the first CPU alone."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.title = "quota of 1 CPU" if folder else "1 CPU (taskset)"

    def enter(self) -> None:
        """Called in a process that is about to become a command."""
        if self.folder is None:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
        else:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))


@contextlib.contextmanager
def quota_group() -> Iterator[QuotaGroup]:
    for above, settings in (
        (Path("/sys/fs/cgroup/cpu"), {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000"}),
        (Path("/sys/fs/cgroup"), {"cpu.max": "100000 100000"}),
    ):
        folder = above / f"ddkit-bench-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if all((folder / name).is_file() for name in settings):
                for name, value in settings.items():
                    (folder / name).write_text(value)
                yield QuotaGroup(folder)
                return
        finally:
            folder.rmdir()
    yield QuotaGroup(None)


def prepare(folder: Path, commands: Sequence[str]) -> None:
    """A model and a set to work on; whatever is made once, such as compiled kernels, is made here as well."""
    ddkit(folder, ["data", "prepare", "glyphs"])
    if {"train", "sample"} & set(commands):
        ddkit(folder, ["train", "--dataset", "glyphs", "--preset", "demo", "--time", "20s", "--out", "model"])
    ddkit(folder, ["generate", "--dataset", "glyphs", "--ipc", "10", "--from-real", "random", "--out", SET])
    for command in commands:
        run(folder, command, QUICK_STEPS[command], {}, None)


def fastest(
    folder: Path, command: str, steps: int, ways: Mapping[str, Mapping[str, str]], repeats: int, group: QuotaGroup | None
) -> dict[str, float]:
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for way, variables in ways.items():
            found[way] = min(found[way], run(folder, command, steps, variables, group))
    return found


def run(folder: Path, command: str, steps: int, variables: Mapping[str, str], group: QuotaGroup | None) -> float:
    """Seconds of one command, which writes to a new place each time."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        words = [word.format(steps=steps, out=f"{out}/out") for word in COMMANDS[command]]
        began = time.perf_counter()
        ddkit(folder, words, variables, group)
        return time.perf_counter() - began


def ddkit(
    folder: Path, words: Sequence[str], variables: Mapping[str, str] | None = None, group: QuotaGroup | None = None
) -> None:
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_BLOCKTIME")
    environ = {name: value for name, value in os.environ.items() if name not in ours} | dict(variables or {})
    command = [sys.executable, "-m", "ddkit", *words, "--quiet"]
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, preexec_fn=group.enter if group else None
    )
    if done.returncode:
        sys.exit(f"ddkit {' '.join(words)} ended with status {done.returncode}:\n{done.stderr}")


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
