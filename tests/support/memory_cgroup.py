"""A cgroup of this machine with a memory limit, for processes that a test starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """``limit_file`` and ``usage_file`` are of the version of cgroups that has the memory controller here."""

    folder: Path
    limit_file: Path
    usage_file: Path

    def command(self, *command: str) -> tuple[str, ...]:
        """A command that moves its process into the cgroup and then runs ``command`` in the same process."""
        return ("sh", "-c", 'echo $$ > "$0"; exec "$@"', str(self.folder / "cgroup.procs"), *command)


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """Skips the test where no cgroup with a limit can be made, as in most containers."""
    version1, version2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    parent, names = (
        (version1, ("memory.limit_in_bytes", "memory.usage_in_bytes"))
        if version1.is_dir()
        else (version2, ("memory.max", "memory.current"))
    )
    folder = parent / f"muxmesh-memory-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made in {parent}: {error.strerror}")
    try:
        cgroup = MemoryCgroup(folder, *(folder / name for name in names))
        try:
            cgroup.limit_file.write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"{cgroup.limit_file} cannot be written: {error.strerror}")
        yield cgroup
    finally:
        folder.rmdir()
