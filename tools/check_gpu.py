#!/usr/bin/env python3
"""Run ddkit on a GPU, first what shows whether it works, then what shows how fast, and print the table for the documents.

    python tools/check_gpu.py --seconds 480 --out gpu.jsonl [--official PATH]

Each step is a command in its own process group with its own time limit. A step that fails or takes too long is
reported, and the next one begins. Every step writes one JSON line at once; the table comes last, and the status is 1 if a
step failed. Steps on real CIFAR-100 and TinyImageNet run if these are prepared in $DDKIT_CACHE; the others use built-in
or random images. The steps that need diffusers fail alone where it is missing; to bring it to a machine without a network:

    names="diffusers platformdirs importlib_metadata filelock pytest pluggy iniconfig"
    pip download --no-deps --only-binary=:all: -d .whl $names
    pip install --no-index --no-deps --target site-packages .whl/*.whl && export PYTHONPATH=$PWD/site-packages:$PWD

`--device cpu --small` tries the script itself where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
_LEAST_SECONDS = 8.0  # a step is not begun with less time left
_LINES_KEPT = 25  # of a step's output


@dataclass(frozen=True)
class Step:
    """One command. limit: seconds it may take. title: what the table calls it. figures: a regular expression for the parts
    of its output that belong into the table."""

    title: str
    limit: float
    command: tuple[str, ...]
    figures: str = ""


def steps(options: argparse.Namespace, folder: Path) -> Iterator[Step]:
    """The steps in order of value."""
    small, device = options.small, ("--device", options.device)

    def ddkit(title: str, limit: float, line: str, figures: str) -> Step:
        return Step(title, limit, (sys.executable, "-m", "ddkit", *shlex.split(line), *device, "--json"), figures)

    def tool(title: str, limit: float, line: str, figures: str) -> Step:
        name, *words = shlex.split(line)
        return Step(title, limit, (sys.executable, str(TOOLS / name), *words, *device), figures)

    yield Step("machine", 60, (sys.executable, "-m", "ddkit", "doctor", "--json"), r'[\d,]+ images/s[^"]*')
    if not small:
        # Without the plugins that the whole suite needs.
        line = f"{shlex.quote(str(ROOT / 'tests/network/test_engine.py'))} -o addopts=--import-mode=importlib -k real -v"
        test = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *shlex.split(line))
        yield Step("engines next to the plain one", 120, test, r"\d+ (?:pass|fail)ed")
        demo = shlex.quote(str(folder / "demo"))
        line = f"demo --folder {demo}"
        yield Step("the whole way on built-in letters", 150, (sys.executable, "-m", "ddkit", *shlex.split(line), *device))
        line = f"pack --track 2 --model glyphs={demo}/runs/glyphs --proof-budget 30s --json"
        yield Step("track 2 on built-in letters", 100, (sys.executable, "-m", "ddkit", *shlex.split(line)), r'"images": \d+')
    if options.official:
        official = shlex.quote(str(options.official.resolve()))
        for dataset in ("cifar100", "tinyimagenet"):
            line = f"bench_evaluate.py --official {official} --dataset {dataset} --repeats 1"
            yield tool(f"evaluation next to the official code, {dataset}", 100, line, r"^\| ([^-].*) \|$")
    for dataset in [name for name in ("cifar100", "tinyimagenet") if is_prepared(name)] if not small else []:
        real, refined = folder / "real" / f"{dataset}.pt", folder / "refined" / f"{dataset}.pt"
        make = f"generate --dataset {dataset} --from-real random --out {shlex.quote(str(real))}"
        yield Step(f"random real images, {dataset}", 30, (sys.executable, "-m", "ddkit", *shlex.split(make)))
        results = f"--results {shlex.quote(str(folder / 'results.jsonl'))}"
        # Three rounds of the larger images would take longer than there is time for.
        title, rounds = ("score", "") if dataset == "cifar100" else ("score in one round", " --rounds 1")
        line = f"evaluate {shlex.quote(str(real))} {results}{rounds}"
        yield ddkit(f"{title} of random real images, {dataset}", 200, line, r'"(?:mean|seconds)": [\d.]+')
        if dataset == "cifar100":
            state = f"--run {shlex.quote(str(folder / 'state'))} --out {shlex.quote(str(refined))}"
            line = f"refine {shlex.quote(str(real))} --time 60s {state}"
            yield ddkit("60 s of refinement, cifar100", 110, line, r'"(?:steps|seconds)": [\d.]+')
    preset, precision = ("tiny", "float32") if small else ("small", "bfloat16")
    few = "--steps 2 --batch-size 4 --batches 1 --no-compile" if small else "--steps 20 --batch-size 1024 --batches 3"
    line = f"bench_sampling.py --preset {preset} --precision {precision} {few}"
    yield tool(f"sampling, preset {preset}", 120, line, r".*images/s$|ratio: *[\d.]+")
    few = "--steps 1 --turns 1 --images 32 --batch-size 8 --no-compile" if small else "--steps 30 --turns 2"
    line = f"bench_training.py --preset {preset} --precision {precision} {few}"
    yield tool(f"training, preset {preset}", 120, line, r".*images/s$|ratio: *[\d.]+")
    few = " --steps 1 --classes 4 --memory 4 --batch 8" if small else ""
    yield tool("minimax criteria", 30, f"bench_minimax.py{few}", r".*ms a step|.*times as fast")


def is_prepared(name: str) -> bool:
    """Whether a dataset can be used; none can where ddkit cannot be imported, of which the steps say why."""
    with contextlib.suppress(ImportError):
        from ddkit.data.store import list_prepared

        return name in list_prepared()
    return False


def run(step: Step, seconds: float, folder: Path | None = None) -> dict[str, Any]:
    """Run one step for at most so many seconds, in that working folder. Everything that it started ends with it."""
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            step.command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | str = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        text = output.read()
    found = re.findall(step.figures, text, re.MULTILINE) if step.figures else []
    figures = ", ".join(" ".join(each.replace("|", ",").split()) for each in found)
    command = shlex.join(["python", *step.command[1:]])
    took = round(time.monotonic() - began, 1)
    return {"step": step.title, "status": status, "seconds": took, "figures": figures, "command": command,
            "output": text.splitlines()[-_LINES_KEPT:]}  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    rows = [
        f"| {one['step']} | {'ok' if one['status'] == 0 else one['status']} | {one['seconds']} | {one['figures']} |"
        for one in found
    ]
    return "\n".join(["| step | status | seconds | figures |", "|---|---|---|---|", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="time for all steps together (default: 480)")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="file of JSON lines (default: gpu.jsonl)")
    parser.add_argument("--official", type=Path, help="clone of the challenge's repository, to be timed as well")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="try the script itself with tiny settings")
    options = parser.parse_args()
    ends = time.monotonic() + options.seconds
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ddkit-gpu-") as folder, options.out.open("w", encoding="utf-8") as out:
        for step in steps(options, Path(folder)):
            left = ends - time.monotonic()
            if left < _LEAST_SECONDS:
                one: dict[str, Any] = {"step": step.title, "status": "no time left", "seconds": 0.0, "figures": ""}
            else:
                one = run(step, min(step.limit, left), Path(folder))
            found.append(one)
            out.write(json.dumps(one) + "\n")
            out.flush()
            os.fsync(out.fileno())
            print(f"--- {one['step']}: {one['status']} ({one['seconds']} s)", *one.get("output", []), sep="\n", flush=True)
    print(table(found))
    return 1 if any(one["status"] != 0 for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
