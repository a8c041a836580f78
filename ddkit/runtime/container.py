"""The CPUs and the memory that a container leaves this process, what its processor can do, and OpenMP's threads, set before
torch reads them once.

Track 2's bundle carries this file, so it imports nothing of ddkit.

By default a thread of libgomp, the OpenMP of PyTorch's wheels for Linux, spins for milliseconds when it waits for the
others. If one of those is not running, because another process has its core or because a container's quota is used up,
it spins for nothing, and a computation of many small steps takes several times as long. Here it sleeps instead.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath

BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of processors with instructions for bfloat16
_WAIT_POLICY, _NUM_THREADS = "OMP_WAIT_POLICY", "OMP_NUM_THREADS"
_THIS_PROCESS = Path("/proc/self")
# A control group's limit of memory, the memory used, and the part of it that holds files: by version 2, and by version 1.
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def set_defaults(environ: MutableMapping[str, str] = os.environ, process: Path = _THIS_PROCESS) -> None:
    """Set the environment variables for this process and those that it starts.

    What the user has set stays; libgomp's own GOMP_SPINCOUNT counts for more than the policy that is set here.
    The number is only set where a container's quota allows fewer CPUs than there are: OpenMP follows the affinity mask
    (`taskset`) by itself, and takes one thread for each physical core.
    """
    environ.setdefault(_WAIT_POLICY, "passive")
    if _NUM_THREADS not in environ and (cpus := available_cpus(process)) < _cpus_of_mask():
        environ[_NUM_THREADS] = str(cpus)


def available_cpus(process: Path = _THIS_PROCESS) -> int:
    """The number of CPUs that this process may use: those of its affinity mask, and no more than a container's quota."""
    quota = cpu_quota(process)
    return _cpus_of_mask() if quota is None else max(1, min(_cpus_of_mask(), math.ceil(quota)))


def cpu_quota(process: Path = _THIS_PROCESS) -> float | None:
    """The CPUs that control groups, version 1 or 2, let this process use on average; None without a limit.

    process: its folder under /proc; the limits are found where its files `cgroup` and `mountinfo` say.
    """
    quotas = []
    for folder in _control_folders("cpu", process):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            if (folder / "cpu.max").is_file():  # version 2: "quota period", in microseconds
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0 and int(period) > 0:
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def free_memory(process: Path = _THIS_PROCESS) -> int:
    """Bytes of memory that are free without swapping, on the machine and in the container; `sys.maxsize` if neither tells.

    process: its folder under /proc, as for `cpu_quota`.
    """
    found = [sys.maxsize]
    with contextlib.suppress(OSError):
        found += [1024 * kilobytes for kilobytes in _figures(process.parent / "meminfo", "MemAvailable:")]
    for folder in _control_folders("memory", process):
        for limit, used, files in _MEMORY_FILES:
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                # Files that were read lately are counted as used, and given up when memory is short.
                spare = sum(_figures(folder / "memory.stat", files))
                found.append(int((folder / limit).read_text()) - int((folder / used).read_text()) + spare)
    return max(0, min(found))


def cpu_flags() -> frozenset[str]:
    """The names of the processor's instruction sets; empty if the system does not list them."""
    return frozenset((cpuinfo("flags") or cpuinfo("Features")).split())


def cpuinfo(field: str) -> str:
    """A field of Linux's description of the first processor, or an empty text."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == field), "")


def _figures(path: Path, name: str) -> list[int]:
    """The first number after a name that begins a line of a file; none if there is no such line."""
    return [int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[:1] == [name]]


def _cpus_of_mask() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _control_folders(controller: str, process: Path) -> Iterator[Path]:
    """The folders of the process's control groups of that kind and of all those above, whose limits hold as well."""
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, group in (line for line in groups if len(line) == 3):
        for mount in mounts:
            root, point, kind, options = mount[3], mount[4], mount[mount.index("-") + 1], mount[-1].split(",")
            version_2 = controllers == "" and kind == "cgroup2"
            if version_2 or kind == "cgroup" and controller in controllers.split(",") and controller in options:
                # A container may see the host's name of its group, and only that group mounted.
                inside = PurePosixPath(group.removeprefix(root.rstrip("/")).lstrip("/"))
                yield from (Path(point) / folder for folder in (inside, *inside.parents) if ".." not in folder.parts)
