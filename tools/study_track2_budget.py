#!/usr/bin/env python3
"""Does the track 2 entry keep its time budget? Many runs, alone and while other processes load the machine.

    python tools/study_track2_budget.py ENTRY [--dataset NAME] [--budget SECONDS] [--runs N] [--busy N ...]
        [--out FILE.jsonl]

ENTRY is a bundle's folder, unpacked from what `ddkit pack --track 2` wrote. Each run is timed from before its process
starts until it ends. --busy 0 2 makes all runs on an idle machine, then all while two processes compute without pause.
Runs are appended to --out; runs of the same entry, dataset and budget that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ddkit.evaluation.tracks import hash_of_folder
from ddkit.runtime.jsonl import append_line, read_lines

LEAST_SHARE = 0.85  # of the budget that is to be used


def main() -> None:
    arguments = parse()
    what = {"entry": hash_of_folder(arguments.entry), "dataset": arguments.dataset, "budget": arguments.budget}
    runs = [run for run in read_runs(arguments.out) if what.items() <= run.items()]
    for busy in arguments.busy:
        done = sum(run["busy"] == busy for run in runs)
        for number in range(done, arguments.runs):
            with busy_processes(busy):
                runs.append({**what, "busy": busy, "load": os.getloadavg()[0], **timed_run(arguments, seed=number)})
            append_line(arguments.out, runs[-1])
            print(runs[-1], flush=True)
    print_table(runs, arguments.budget)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of all entries, datasets and budgets."""
    return [run for _, run in read_lines(path)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", type=Path)
    parser.add_argument("--dataset", default="cifar100")
    parser.add_argument("--budget", type=float, default=120.0)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, os.cpu_count() or 1])
    parser.add_argument("--out", type=Path, default=Path("track2_budget.jsonl"))
    return parser.parse_args()


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that compute without pause."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def timed_run(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "images.pt"
        command = [sys.executable, "-I", str(arguments.entry / "generate.py"), "--dataset", arguments.dataset]
        command += ["--out", str(out), "--time-budget", f"{arguments.budget:g}", "--seed", str(seed)]
        began = time.monotonic()
        finished = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        seconds = time.monotonic() - began
        labels = torch.load(out, weights_only=True)["labels"] if finished.returncode == 0 else torch.zeros(0).long()
    said = finished.stderr.strip().splitlines()[-1:]
    return {"status": finished.returncode, "seconds": round(seconds, 2), "images": len(labels),
            "classes": len(labels.unique()), "said": " ".join(said)}  # fmt: skip


def print_table(runs: list[dict[str, Any]], budget: float) -> None:
    print("\n| load | runs | kept | share of the budget used | images | 1-minute load before a run |")
    print("|---|---|---|---|---|---|")
    for busy in sorted({run["busy"] for run in runs}):
        these = [run for run in runs if run["busy"] == busy]
        shares = [run["seconds"] / budget for run in these]
        kept = sum(run["status"] == 0 and LEAST_SHARE <= share <= 1 for run, share in zip(these, shares, strict=True))
        images, loads = [run["images"] for run in these], [run["load"] for run in these]
        print(f"| {busy} busy processes | {len(these)} | {kept} | {min(shares):.1%} to {max(shares):.1%} | "
              f"{min(images):,} to {max(images):,} | {min(loads):.1f} to {max(loads):.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
