"""The device memory of a unit: what the KV pool consists of, in a form that can be sent to workers.

`DeviceMemory` is the seam between kvstore and the kind of device. kvstore only allocates and exports; it never reads
or writes KV.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

HOST = "host"
"""Kind of memory of a CPU unit."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a shard that is mapped as one range. ``device_uuid`` names the physical device, "" the host."""

    fd: int
    size_bytes: int
    device_uuid: str = ""


@dataclass(frozen=True, slots=True)
class Shard:
    """The pool on one device rank: its segments, one after the other. A tensor-parallel unit has one for each rank."""

    segments: tuple[Segment, ...]

    @property
    def size_bytes(self) -> int:
        """Of all segments."""
        return sum(segment.size_bytes for segment in self.segments)


class DeviceMemory(Protocol):
    """The pool of a unit, allocated once and exported to every worker. It lives until the last mapping is gone."""

    @property
    def kind(self) -> str:
        """What workers have to know to map it."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """One for each device rank, all of the same size."""

    def close(self) -> None:
        """Closes the file descriptors; workers keep their mappings."""


class HostMemory:
    """`DeviceMemory` of a CPU: memfds."""

    kind = HOST

    def __init__(self, num_bytes: int, segment_bytes: int | None = None) -> None:
        """``segment_bytes``: size of each segment, a whole number of slabs; None: one segment."""
        sizes = _split(num_bytes, segment_bytes or num_bytes)
        self.shards = (Shard(tuple(Segment(new_memfd("muxmesh-kv-pool", size), size) for size in sizes)),)

    def close(self) -> None:
        """See `DeviceMemory`."""
        for shard in self.shards:
            for segment in shard.segments:
                os.close(segment.fd)


def new_memfd(name: str, num_bytes: int) -> int:
    """Anonymous shared memory, filled with zeros."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return fd


def _split(num_bytes: int, part_bytes: int) -> Iterable[int]:
    return [min(part_bytes, num_bytes - at) for at in range(0, num_bytes, part_bytes)]
