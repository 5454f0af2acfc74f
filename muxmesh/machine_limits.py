"""What this process may use of its machine: memory and cores, limited by the machine and by the cgroups around it.

Reads /proc and the file systems of cgroups of version 2, version 1, and of both side by side, below a root that is an
argument. A limit applies to a cgroup and to all below it, so the smallest one between the process's own cgroup and the
highest visible one counts. Knows no configuration.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import ByteSize

ROOT = Path("/")
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The most memory that this process and those in its cgroup may use together."""

    num_bytes: int
    file: Path | None = None
    """The file of the cgroup that sets the limit. None: it is all memory of the machine."""

    @property
    def is_of_cgroup(self) -> bool:
        """Whether the kernel kills a process of the cgroup when the limit is reached."""
        return self.file is not None

    def __str__(self) -> str:
        """A clause, like `this machine has 15.5GiB`."""
        size = size_text(self.num_bytes)
        if self.file is None:
            return f"this machine has {size}"
        return f"the memory limit of this container or service (cgroup, {self.file}) is {size}"


def size_text(num_bytes: int) -> str:
    """A size for people, like `512.0MiB`."""
    return ByteSize(num_bytes).human_readable()


def memory_limit(root: Path = ROOT) -> MemoryLimit:
    """The memory of the machine, or the smallest memory limit of a cgroup around this process if that is less."""
    limits = [machine_memory(root)]
    for version, folder in _cgroups(root, "memory"):
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        limit = _first_number(folder / name)
        if limit is not None:
            limits.append(MemoryLimit(limit, _seen(folder / name, root)))
    return min(limits, key=lambda limit: limit.num_bytes)


def machine_memory(root: Path = ROOT) -> MemoryLimit:
    """The memory of the machine as /proc shows it, or as the kernel says where a sandbox hides that file."""
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, size = line.partition(":")
        if name == "MemTotal":
            return MemoryLimit(int(size.split()[0]) * 1024)
    return MemoryLimit(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def core_quota(root: Path = ROOT) -> float:
    """Cores' worth of time that the cgroups around this process grant it, like 1.5; infinity without a quota.

    Sets of cores (cpuset) are not in it: they bound the affinity of the process.
    """
    return min((_quota(version, folder) for version, folder in _cgroups(root, "cpu")), default=math.inf)


def num_usable_cores(root: Path = ROOT) -> int:
    """Cores on which this process may run, and no more than its quota, rounded up to a whole core."""
    cores = len(os.sched_getaffinity(0))
    quota = core_quota(root)
    return cores if quota >= cores else max(1, math.ceil(quota))


def _quota(version: int, folder: Path) -> float:
    """Cores by the quota of one cgroup; infinity without one. The period is in the same file in version 2."""
    if version == 2:
        quota, _, period = _text(folder / "cpu.max").partition(" ")
    else:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    quota_us, period_us = _number(quota), _number(period)  # "max" in version 2, -1 in version 1: no quota
    return quota_us / period_us if quota_us and period_us else math.inf


def _cgroups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of each cgroup around this process that ``controller`` may limit, the innermost first."""
    paths = _paths_by_controller(_text(root / "proc/self/cgroup"))
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, file_system = line.partition(" - ")
        kind, *_, options = [*file_system.split(" "), "", ""][:3]
        mount_root, mount_point = (_unescaped(field) for field in [*mount.split(" "), *[""] * 5][3:5])
        version = {"cgroup2": 2, "cgroup": 1}.get(kind)
        if version == 2 or (version == 1 and controller in options.split(",")):
            path = paths.get("" if version == 2 else controller)
            if path is not None:
                for folder in _folders(path, mount_root, mount_point):
                    yield version, root / folder.relative_to("/")


def _paths_by_controller(text: str) -> dict[str, str]:
    """Path of the process's cgroup in each hierarchy, by controller; "" is that of version 2."""
    paths = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def _folders(path: str, mount_root: str, mount_point: str) -> list[PurePosixPath]:
    """Folders of the cgroup ``path`` and of those above it that are visible at ``mount_point``, the innermost first.

    ``mount_root``: the cgroup that is mounted there. A container may see its own cgroup only, under the path that it
    has outside: what is not below ``mount_root`` is the mount point itself.
    """
    point, own = PurePosixPath(mount_point), PurePosixPath(path)
    if ".." in own.parts or not own.is_relative_to(mount_root):
        return [point]
    below = own.relative_to(mount_root)
    return [point / part for part in (below, *below.parents)]


def _unescaped(field: str) -> str:
    r"""A field of mountinfo, where a space is `\040`."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


def _first_number(file: Path) -> int | None:
    return _number(_text(file))


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    """The content of a file; empty if it is not there or may not be read, as in a cgroup of another namespace."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _seen(file: Path, root: Path) -> Path:
    """The path of ``file`` for a process whose root folder is ``root``."""
    return ROOT / file.relative_to(root)
