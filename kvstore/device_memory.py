"""The device memory of a unit: allocates the KV pool and exports it as file descriptors.

`DeviceMemory` is the seam between kvstore and the kind of device. kvstore never maps the pool, reads KV or writes KV.
What the bytes mean is known to the workers only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

HOST = "host"
"""`DeviceMemory.kind` of a CPU unit."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a shard that is mapped as one range. ``device_uuid``: the physical device, "" for host memory."""

    fd: int
    size_bytes: int
    device_uuid: str = ""


@dataclass(frozen=True, slots=True)
class Shard:
    """The pool on one device rank: its segments, in address order. A tensor-parallel unit has one shard per rank."""

    segments: tuple[Segment, ...]

    @property
    def size_bytes(self) -> int:
        return sum(segment.size_bytes for segment in self.segments)


class DeviceMemory(Protocol):
    """The pool of a unit, allocated once and exported to every worker. The memory lives as long as a mapping of it."""

    @property
    def kind(self) -> str:
        """How workers map the segments: `HOST` means mmap."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """One shard for each device rank, all of the same size."""

    def close(self) -> None:
        """Closes the file descriptors; workers keep their mappings."""


class HostMemory:
    """`DeviceMemory` of a CPU: one shard of memfds, filled with zeros."""

    kind = HOST

    def __init__(self, num_bytes: int, segment_bytes: int | None = None) -> None:
        """``segment_bytes``: size of each segment but the last, a whole number of slabs; None: one segment."""
        sizes = _split(num_bytes, segment_bytes or num_bytes)
        self.shards = (Shard(tuple(Segment(new_memfd("muxmesh-kv-pool", size), size) for size in sizes)),)

    def close(self) -> None:
        for shard in self.shards:
            for segment in shard.segments:
                os.close(segment.fd)


def new_memfd(name: str, num_bytes: int) -> int:
    """Returns a file descriptor of new shared memory, filled with zeros. The caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return fd


def _split(num_bytes: int, part_bytes: int) -> Iterable[int]:
    return [min(part_bytes, num_bytes - start) for start in range(0, num_bytes, part_bytes)]
