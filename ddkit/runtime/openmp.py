"""The number of OpenMP's threads and the way they wait for each other, set before torch is loaded, which reads it once.

By default a thread of libgomp, the OpenMP of PyTorch's wheels for Linux, spins for milliseconds when it waits for the
others. If one of those is not running, because another process has its core or because a container's quota is used up,
it spins for nothing, and a computation of many small steps takes several times as long. Here it sleeps instead.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path, PurePosixPath

_WAIT_POLICY, _NUM_THREADS = "OMP_WAIT_POLICY", "OMP_NUM_THREADS"
_THIS_PROCESS = Path("/proc/self")


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
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:
        return None
    quotas = []
    for folder in _cpu_folders(groups, mounts):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            if (folder / "cpu.max").is_file():  # version 2: "quota period", in microseconds
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0 and int(period) > 0:
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _cpus_of_mask() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_folders(groups: list[list[str]], mounts: list[list[str]]) -> Iterator[Path]:
    """The folders of the process's CPU control groups and of all those above, whose limits hold as well."""
    for _, controllers, group in (line for line in groups if len(line) == 3):
        for mount in mounts:
            root, point, kind, options = mount[3], mount[4], mount[mount.index("-") + 1], mount[-1].split(",")
            version_2 = controllers == "" and kind == "cgroup2"
            if version_2 or kind == "cgroup" and "cpu" in controllers.split(",") and "cpu" in options:
                # A container may see the host's name of its group, and only that group mounted.
                inside = PurePosixPath(group.removeprefix(root.rstrip("/")).lstrip("/"))
                yield from (Path(point) / folder for folder in (inside, *inside.parents) if ".." not in folder.parts)
