"""Limits of memory and cores, from file trees as kernels and container engines show them.

Each tree is what a process reads below its root folder: those of Docker and Kubernetes with and without a namespace of
cgroups, of a systemd service, and of a machine with both versions side by side.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from muxmesh.machine_limits import MemoryLimit, core_quota, machine_memory, memory_limit, num_usable_cores

MIB = 1 << 20
V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw,nsdelegate\n"
V1_UNLIMITED = "9223372036854771712\n"

Tree = Mapping[str, str]


def v1_mount(controllers: str, mount_root: str = "/", point: str = "") -> str:
    """The line of a hierarchy of version 1 in mountinfo."""
    place = point or f"/sys/fs/cgroup/{controllers}"
    return f"35 31 0:32 {mount_root} {place} rw,nosuid,relatime shared:9 - cgroup cgroup rw,{controllers}\n"


DOCKER_V2 = {
    "proc/self/cgroup": "0::/\n",
    "proc/self/mountinfo": "22 1 0:20 / / rw - overlay overlay rw,lowerdir=/a\\040b\n" + V2_MOUNT,
    "sys/fs/cgroup/memory.max": "536870912\n",
    "sys/fs/cgroup/cpu.max": "150000 100000\n",
}
SERVICE_V2 = {
    "proc/self/cgroup": "0::/system.slice/muxmesh.service\n",
    "proc/self/mountinfo": V2_MOUNT,
    "sys/fs/cgroup/system.slice/memory.max": "1073741824\n",
    "sys/fs/cgroup/system.slice/cpu.max": "max 100000\n",
    "sys/fs/cgroup/system.slice/muxmesh.service/memory.max": "2147483648\n",
    "sys/fs/cgroup/system.slice/muxmesh.service/cpu.max": "50000 100000\n",
}
DOCKER_V1 = {  # without a namespace of cgroups: the container sees its own cgroup at the mount point
    "proc/self/cgroup": "5:cpu,cpuacct:/docker/4f\n4:memory:/docker/4f\n1:name=systemd:/docker/4f\n",
    "proc/self/mountinfo": v1_mount("memory", "/docker/4f") + v1_mount("cpu,cpuacct", "/docker/4f"),
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "268435456\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "25000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "50000\n",
}
POD_V1 = {  # the hierarchy of the host is visible: the limit of the Pod is smaller than that of the container
    "proc/self/cgroup": "4:memory:/kubepods/burstable/pod1/c1\n3:cpuacct,cpu:/kubepods/burstable/pod1/c1\n",
    "proc/self/mountinfo": v1_mount("memory") + v1_mount("cpu,cpuacct", point="/sys/fs/cgroup/cpu"),
    "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_UNLIMITED,
    "sys/fs/cgroup/memory/kubepods/burstable/pod1/memory.limit_in_bytes": "134217728\n",
    "sys/fs/cgroup/memory/kubepods/burstable/pod1/c1/memory.limit_in_bytes": "268435456\n",
    "sys/fs/cgroup/cpu/kubepods/burstable/pod1/c1/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu/kubepods/burstable/pod1/c1/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/cpu/kubepods/burstable/pod1/cpu.cfs_quota_us": "300000\n",
    "sys/fs/cgroup/cpu/kubepods/burstable/pod1/cpu.cfs_period_us": "100000\n",
}
HYBRID = {  # both versions; the controllers are those of version 1
    "proc/self/cgroup": "9:name=systemd:/\n4:memory:/runner/9d\n1:cpu:/\n0::/\n",
    "proc/self/mountinfo": (
        "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
        + v1_mount("cpu")
        + v1_mount("memory")
        + "40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n"
        + "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
    ),
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_UNLIMITED,
    "sys/fs/cgroup/memory/runner/memory.limit_in_bytes": "805306368\n",
    "sys/fs/cgroup/memory/runner/9d/memory.limit_in_bytes": V1_UNLIMITED,
}
UNLIMITED_V2 = {
    **DOCKER_V2,
    "sys/fs/cgroup/memory.max": "max\n",
    "sys/fs/cgroup/cpu.max": "max 100000\n",
}


def root_of(folder: Path, tree: Tree, memory_kib: int = 16 * 1024 * 1024) -> Path:
    """Writes ``tree`` below ``folder``, on a machine with ``memory_kib`` of memory."""
    meminfo = f"MemTotal:       {memory_kib} kB\nMemFree:         1 kB\n"
    for name, content in {**tree, "proc/meminfo": meminfo}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("tree", "num_bytes", "file"),
    [
        pytest.param(DOCKER_V2, 512 * MIB, "/sys/fs/cgroup/memory.max", id="Docker, version 2"),
        pytest.param(SERVICE_V2, 1024 * MIB, "/sys/fs/cgroup/system.slice/memory.max", id="slice of a service"),
        pytest.param(DOCKER_V1, 256 * MIB, "/sys/fs/cgroup/memory/memory.limit_in_bytes", id="Docker, version 1"),
        pytest.param(
            POD_V1,
            128 * MIB,
            "/sys/fs/cgroup/memory/kubepods/burstable/pod1/memory.limit_in_bytes",
            id="Pod, version 1",
        ),
        pytest.param(HYBRID, 768 * MIB, "/sys/fs/cgroup/memory/runner/memory.limit_in_bytes", id="both versions"),
    ],
)
def test_the_smallest_memory_limit_around_a_process_counts(
    tmp_path: Path, tree: Tree, num_bytes: int, file: str
) -> None:
    limit = memory_limit(root_of(tmp_path, tree))
    assert limit == MemoryLimit(num_bytes, Path(file))
    assert limit.is_of_cgroup


@pytest.mark.parametrize("tree", [UNLIMITED_V2, {}, {"proc/self/cgroup": "0::/\n"}], ids=["max", "no cgroups", "none"])
def test_without_a_limit_it_is_the_memory_of_the_machine(tmp_path: Path, tree: Tree) -> None:
    root = root_of(tmp_path, tree, memory_kib=2048)
    assert memory_limit(root) == machine_memory(root) == MemoryLimit(2 * MIB)
    assert not memory_limit(root).is_of_cgroup


def test_a_limit_above_the_memory_of_the_machine_is_none(tmp_path: Path) -> None:
    assert memory_limit(root_of(tmp_path, DOCKER_V2, memory_kib=1024)) == MemoryLimit(MIB)


@pytest.mark.parametrize(
    ("tree", "cores"),
    [
        pytest.param(DOCKER_V2, 1.5, id="Docker, version 2"),
        pytest.param(SERVICE_V2, 0.5, id="service"),
        pytest.param(DOCKER_V1, 0.5, id="Docker, version 1"),
        pytest.param(POD_V1, 3.0, id="Pod, version 1"),
        pytest.param(HYBRID, math.inf, id="-1"),
        pytest.param(UNLIMITED_V2, math.inf, id="max"),
        pytest.param({}, math.inf, id="no cgroups"),
    ],
)
def test_the_smallest_quota_of_cores_around_a_process_counts(tmp_path: Path, tree: Tree, cores: float) -> None:
    assert core_quota(root_of(tmp_path, tree)) == cores


@pytest.mark.parametrize(("quota", "cores"), [("10000", 1), ("100000", 1), ("100001", 2), ("900000000", 10_000)])
def test_a_process_uses_its_quota_of_cores_rounded_up_and_none_that_it_may_not_run_on(
    tmp_path: Path, quota: str, cores: int
) -> None:
    root = root_of(tmp_path, {**DOCKER_V2, "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"})
    assert num_usable_cores(root) == min(cores, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("cgroup", "mount_root"),
    [
        pytest.param("/../other", "/", id="a cgroup outside of the namespace"),
        pytest.param("/", "/../..", id="the mount of the host in a namespace"),
        pytest.param("/moved", "/docker/4f", id="moved to another cgroup"),
        pytest.param("/gone (deleted)", "/", id="a deleted cgroup"),
    ],
)
def test_of_a_cgroup_that_is_not_visible_the_mount_point_counts(tmp_path: Path, cgroup: str, mount_root: str) -> None:
    tree = {
        **DOCKER_V2,
        "proc/self/cgroup": f"0::{cgroup}\n",
        "proc/self/mountinfo": V2_MOUNT.replace(" / /sys", f" {mount_root} /sys"),
    }
    assert memory_limit(root_of(tmp_path, tree)).num_bytes == 512 * MIB


def test_a_mount_point_may_have_a_space_in_its_name(tmp_path: Path) -> None:
    tree = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT.replace("/sys/fs/cgroup", "/my\\040groups"),
        "my groups/memory.max": "4096\n",
    }
    assert memory_limit(root_of(tmp_path, tree)) == MemoryLimit(4096, Path("/my groups/memory.max"))


def test_without_meminfo_the_kernel_says_how_much_memory_there_is(tmp_path: Path) -> None:
    assert machine_memory(tmp_path) == MemoryLimit(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def test_a_limit_names_where_it_comes_from() -> None:
    assert str(MemoryLimit(2 << 30)) == "this machine has 2.0GiB"
    assert str(MemoryLimit(512 * MIB, Path("/sys/fs/cgroup/memory.max"))) == (
        "the memory limit of this container or service (cgroup, /sys/fs/cgroup/memory.max) is 512.0MiB"
    )


def test_the_limits_of_this_machine_are_found() -> None:
    assert 0 < memory_limit().num_bytes <= machine_memory().num_bytes
    assert 1 <= num_usable_cores() <= len(os.sched_getaffinity(0))
