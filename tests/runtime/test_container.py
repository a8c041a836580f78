import os
import subprocess
import sys

import pytest

from ddkit.runtime.container import available_cpus, cpu_quota, free_memory, set_defaults


@pytest.fixture
def process(tmp_path):
    """Makes the folder of a process: its control groups, what is mounted where, and the groups' files."""

    def make(groups, mounts, files):
        (tmp_path / "self").mkdir()
        (tmp_path / "self" / "cgroup").write_text(groups)
        (tmp_path / "self" / "mountinfo").write_text(mounts.replace("/sys/fs/cgroup", str(tmp_path / "cgroup")))
        for name, text in files.items():
            (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cgroup" / name).write_text(text)
        return tmp_path / "self"

    return make


V2 = "30 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "33 31 0:30 {} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
)


def v1_files(group, quota, period):
    folder = f"cpu,cpuacct{group}"
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    "groups, mounts, files, expected",
    [
        ("0::/\n", V2, {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", V2, {"cpu.max": "max 100000\n"}, None),
        ("0::/user/job\n", V2, {"user/job/cpu.max": "max 100000\n", "user/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/user/job\n", V2, {"user/job/cpu.max": "50000 100000\n", "user/cpu.max": "200000 100000\n"}, 0.5),
        ("0::/../other\n", V2, {"cpu.max": "300000 100000\n"}, 3.0),
        ("4:memory:/\n2:cpu,cpuacct:/\n", V1.format("/"), v1_files("", 100_000, 50_000), 2.0),
        ("2:cpu,cpuacct:/\n", V1.format("/"), v1_files("", -1, 100_000), None),
        ("2:cpu,cpuacct:/docker/ab12\n", V1.format("/docker/ab12"), v1_files("", 400_000, 100_000), 4.0),
        ("2:cpu,cpuacct:/docker/ab12\n", V1.format("/"), v1_files("/docker/ab12", 25_000, 100_000), 0.25),
        ("2:cpu,cpuacct:/docker/ab12\n", V1.format("/"), v1_files("/docker", 25_000, 100_000), 0.25),
        ("2:memory:/\n", V1.format("/"), v1_files("", 25_000, 100_000), None),
        ("0::/\n", V2, {"cpu.max": "nonsense\n"}, None),
        ("torn\n", "", {}, None),
    ],
)
def test_cpu_quota_is_the_smallest_limit_of_the_process_and_the_groups_above(process, groups, mounts, files, expected):
    assert cpu_quota(process(groups, mounts, files)) == expected


def test_cpu_quota_of_a_system_without_control_groups_is_none(tmp_path):
    assert cpu_quota(tmp_path) is None


V1_MEMORY = "34 31 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def v2_memory(group, limit):
    stat = {"memory.max": limit, "memory.current": "3000000\n", "memory.stat": "anon 7\ninactive_file 1000000\n"}
    return {f"{group}{name}": text for name, text in stat.items()}


@pytest.mark.parametrize(
    "groups, mounts, files, expected",
    [
        ("0::/\n", V2, v2_memory("", "5000000\n"), 3_000_000),
        ("0::/\n", V2, v2_memory("", "max\n"), 8_192_000),
        ("0::/\n", V2, v2_memory("", "1000000\n"), 0),
        ("0::/user/job\n", V2, v2_memory("user/job/", "max\n") | v2_memory("user/", "4000000\n"), 2_000_000),
        ("0::/\n", V2, {"memory.max": "nonsense\n"}, 8_192_000),
        ("4:memory:/job\n2:cpu,cpuacct:/\n", V1.format("/") + V1_MEMORY, {
            "memory/job/memory.limit_in_bytes": "5000000\n", "memory/job/memory.usage_in_bytes": "2500000\n",
            "memory/job/memory.stat": "inactive_file 9\ntotal_inactive_file 500000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "2500000\n",
            "memory/memory.stat": "total_inactive_file 500000\n",
        }, 3_000_000),
    ],
)  # fmt: skip
def test_free_memory_is_the_least_of_the_machine_and_of_the_limits_above(process, tmp_path, groups, mounts, files, expected):
    (tmp_path / "meminfo").write_text("MemTotal:  16000 kB\nMemAvailable:    8000 kB\n")
    assert free_memory(process(groups, mounts, files)) == expected


def test_free_memory_of_a_system_that_does_not_tell_has_no_limit(tmp_path):
    assert free_memory(tmp_path / "self") == sys.maxsize


@pytest.mark.parametrize(
    "quota, threads", [("max", None), (25_000, "1"), (150_000, "2"), (200_000, "2"), (400_000, None), (900_000, None)]
)
def test_number_of_threads_follows_a_quota_below_the_affinity_mask(process, monkeypatch, quota, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    limited, environ = process("0::/\n", V2, {"cpu.max": f"{quota} 100000\n"}), {}
    set_defaults(environ, limited)
    assert environ.get("OMP_NUM_THREADS") == threads
    assert available_cpus(limited) == int(threads or 4)


def test_variables_that_the_user_has_set_are_kept():
    environ = {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "1"}
    set_defaults(environ)
    assert environ == {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "1"}


def test_variables_are_set_on_import_and_for_child_processes():
    program = "import os, sys, ddkit; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    environ = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    assert subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True).stdout == "passive\n"
    child = f"import os, subprocess, sys, ddkit; subprocess.run([sys.executable, '-c', {program.replace(', ddkit', '')!r}])"
    assert subprocess.run([sys.executable, "-c", child], env=environ, capture_output=True, text=True).stdout == "passive\n"
