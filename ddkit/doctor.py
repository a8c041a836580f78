"""A diagnosis of this machine: the library function behind `ddkit doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ddkit.challenge import CHALLENGE_DATASETS, TRAIN_IMAGES_PER_CLASS
from ddkit.data.store import list_prepared, store_facts
from ddkit.errors import BadDataError, DDKitError, counted
from ddkit.network.autotune import choose_plan
from ddkit.network.convnet import ConvNet
from ddkit.network.engine import build_engine
from ddkit.network.kernels import CompileError, compiler_command
from ddkit.runtime.container import available_cpus, cpu_quota
from ddkit.runtime.device import cpu_model, describe_device, free_memory, has_bfloat16, usable_gpus, why_no_gpu
from ddkit.runtime.environment import versions
from ddkit.runtime.files import cache_folder
from ddkit.runtime.progress import span_text

_BATCH = 256  # of the challenge's training
_REPEATS = 2
_SLOW_IMAGES_PER_SECOND = 300.0  # an official CIFAR-100 score of 3 million images then takes three hours
_IMAGES_OF_A_SCORE = 3 * 1001 * 1000
_LEAST_MEMORY, _LEAST_DISK = 4 * 2**30, 5 * 2**30


@dataclass(frozen=True)
class Diagnosis:
    """One line of the report.

    status: "ok", "slow" (it works, and something would make it faster or better) or "broken" (a command will fail).
    what: the part of the machine. finding: what is there. remedy: what to do about it, empty if nothing.
    """

    status: str
    what: str
    finding: str
    remedy: str = ""


def diagnose() -> list[Diagnosis]:
    """Examine Python, PyTorch, the GPU, the processor and its engine, memory, this folder, the cache and its datasets.

    The evaluation engine is measured, which takes some seconds at first use and is remembered. A part whose examination
    fails becomes a "broken" line; nothing is raised.
    """
    lines: list[Diagnosis] = []
    for what, examine in _PARTS.items():
        try:
            lines += examine()
        except DDKitError as error:
            lines.append(Diagnosis("broken", what, error.message, error.remedy))
        except (OSError, RuntimeError) as error:
            lines.append(Diagnosis("broken", what, f"{type(error).__name__}: {error}"))
    return lines


def _software() -> Iterator[Diagnosis]:
    found = versions()
    yield Diagnosis("ok", "Python", f"{found['python']}, ddkit {found['ddkit']}, {platform.system()} {platform.machine()}")
    missing = [name for name, version in found.items() if version == "(not installed)"]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    text = f"torch {found['torch']} ({build}), torchvision {found['torchvision']}, diffusers {found['diffusers']}"
    remedy = f"pip install {' '.join(missing)}" if missing else ""
    yield Diagnosis("broken" if missing else "ok", "libraries", text, remedy)


def _gpu() -> Iterator[Diagnosis]:
    if not usable_gpus():
        if torch.cuda.device_count() or shutil.which("nvidia-smi"):
            yield Diagnosis("broken", "GPU", *why_no_gpu())
        else:
            remedy = "If this machine has an NVIDIA GPU, install its driver and a build of PyTorch for CUDA."
            yield Diagnosis("slow", "GPU", "none: everything runs on the CPU", remedy)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = describe_device(torch.device("cuda", index))
        text = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, compute capability {major}.{minor}"
        busy = free < total / 2
        remedy = "Another process uses it; nvidia-smi shows which." if busy else ""
        yield Diagnosis("slow" if busy else "ok", f"GPU {index}", text, remedy)


def _processor() -> Iterator[Diagnosis]:
    cpus, quota = available_cpus(), cpu_quota()
    text = f"{cpu_model()}, {counted(cpus, 'usable CPU', 'usable CPUs')}"
    text += f" by the container's quota of {quota:g}" if quota else ""
    text += ", with bfloat16 instructions" if has_bfloat16(torch.device("cpu")) else ""
    yield Diagnosis("ok", "processor", text)
    threads = torch.get_num_threads()
    text = f"PyTorch uses {threads}, OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'not set')}"
    remedy = ""
    if threads > cpus:
        remedy = f"More threads than CPUs wait for each other: set OMP_NUM_THREADS={cpus}, or import ddkit before torch."
    elif threads < cpus and (limit := os.environ.get("OMP_NUM_THREADS")):
        remedy = f"OMP_NUM_THREADS={limit} leaves CPUs unused: unset it."
    yield Diagnosis("slow" if remedy else "ok", "threads", text, remedy)


def _compiler() -> Iterator[Diagnosis]:
    try:
        yield Diagnosis("ok", "compiler", " ".join(compiler_command()))
    except CompileError as error:  # everything works without one
        yield Diagnosis("slow", "compiler", f"{error.message} Evaluating on a CPU is several times slower.", error.remedy)


def _engine() -> Iterator[Diagnosis]:
    spec = CHALLENGE_DATASETS[0]
    network = ConvNet(spec.num_classes, spec.image_size).to("cuda" if usable_gpus() else "cpu")
    plan = choose_plan(network, "float32", _BATCH)
    device = network.classifier.weight.device
    images = torch.randn(_BATCH, 3, network.image_size, network.image_size, device=device)
    labels = torch.arange(_BATCH, device=device) % network.num_classes
    engine = build_engine(network, plan)
    engine.gradients(images, labels).item()  # warms up
    began = time.perf_counter()
    for _ in range(_REPEATS):
        engine.gradients(images, labels).item()
    speed = _REPEATS * _BATCH / (time.perf_counter() - began)
    took = span_text(_IMAGES_OF_A_SCORE / speed)
    text = f'"{plan.kind}", {speed:,.0f} images/s: an official {spec.name} score takes about {took}'
    slow, load, cpus = speed < _SLOW_IMAGES_PER_SECOND, psutil.getloadavg()[0], available_cpus()
    remedy = ""
    if slow and plan.kind == "plain":
        remedy = "Install g++ or clang++ for the fast engine, or use a GPU."
    elif slow and load > cpus:
        remedy = f"Other processes keep the {cpus} CPUs busy (load {load:.1f}): examine again when they have ended."
    elif slow:
        remedy = "Use more CPUs, or a GPU."
    yield Diagnosis("slow" if slow else "ok", "evaluation engine", text, remedy)


def _memory() -> Iterator[Diagnosis]:
    free = free_memory(torch.device("cpu"))
    text = f"{free / 2**30:.1f} GiB free; the machine has {psutil.virtual_memory().total / 2**30:.1f} GiB"
    short = free < _LEAST_MEMORY
    yield Diagnosis("slow" if short else "ok", "memory", text, "Close other programs before you train." if short else "")


def _folders() -> Iterator[Diagnosis]:
    for what, path in (("this folder", Path.cwd()), ("cache", cache_folder().absolute())):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        status, remedy, permission = "ok", "", "writable"
        if free < _LEAST_DISK:
            status, remedy = "slow", "Free some space; datasets, models and states take several gigabytes."
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError:
            status, remedy, permission = "broken", "Work in a folder that you may write to.", "not writable"
            if what == "cache":  # prepared datasets in a shared cache can still be used
                status, remedy = "slow", "ddkit cannot write there; set DDKIT_CACHE to a folder that you may write to."
        yield Diagnosis(status, what, f"{path}, {permission}, {free / 2**30:.0f} GiB free", remedy)


def examine_datasets() -> Iterator[Diagnosis]:
    """A line for each dataset of the challenge and for each other one that is prepared."""
    prepared = list_prepared()
    for name in dict.fromkeys([spec.name for spec in CHALLENGE_DATASETS] + list(prepared)):
        if name in prepared:
            try:
                facts = store_facts(name)
            except BadDataError as error:
                yield Diagnosis("broken", f"dataset {name}", error.message, error.remedy)
                continue
            counts = ", ".join(counted(split.images, f"{key} image", f"{key} images") for key, split in facts.splits.items())
            complete = TRAIN_IMAGES_PER_CLASS * facts.spec.num_classes
            train = facts.splits["train"].images if "train" in facts.splits else 0
            if facts.spec.in_challenge and train < complete:
                counts += f"; the complete dataset has {complete:,} train images"
                remedy = f"Sets get better with all of them: ddkit data prepare {name} --from PATH --force"
                remedy = remedy if train else f"No set can be made without them: ddkit data prepare {name}"
                yield Diagnosis("slow", f"dataset {name}", counts, remedy)
            else:
                yield Diagnosis("ok", f"dataset {name}", counts)
        else:
            remedy = f"ddkit data prepare {name}. Or the first command that needs it prepares it."
            yield Diagnosis("slow", f"dataset {name}", "not prepared yet", remedy)


_PARTS: dict[str, Callable[[], Iterator[Diagnosis]]] = {
    "libraries": _software,
    "GPU": _gpu,
    "processor": _processor,
    "compiler": _compiler,
    "evaluation engine": _engine,
    "memory": _memory,
    "folders": _folders,
    "datasets": examine_datasets,
}
