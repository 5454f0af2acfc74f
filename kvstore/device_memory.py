"""The device memory of a unit: allocates the KV pool, and on a GPU the weights' memory, and exports it to the workers.

`DeviceMemory` is the seam between kvstore and the kind of device; `HostMemory` is a CPU's, `cuda_memory` has that of a
GPU. kvstore never maps this memory, reads it or writes it. What the bytes mean is known to the workers only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from muxmesh.errors import DeviceError

HOST = "host"
"""`DeviceMemory.kind` of a CPU unit."""
CUDA = "cuda"
"""`DeviceMemory.kind` of a unit on a GPU."""


class Transport(StrEnum):
    """How the memory is passed to workers, which map it: no transport copies it."""

    HOST_SHM = "host shm"
    """A memfd in host memory, mapped by mmap."""
    VMM_FD = "vmm fd"
    """Device memory of CUDA's virtual memory management, by a file descriptor. It survives its owner."""
    LEGACY_IPC = "legacy ipc"
    """Plain device memory, by a handle of 64 bytes. It is lost with its owner."""


GPU_IPC = frozenset({Transport.VMM_FD, Transport.LEGACY_IPC})
"""The transports of device memory."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a shard that is mapped as one range. ``device_uuid``: the physical device, "" for host memory.

    It is passed on by ``fd``, or, if that is None, by ``ipc_handle``.
    """

    fd: int | None
    size_bytes: int
    device_uuid: str = ""
    ipc_handle: bytes = b""

    @property
    def fds(self) -> tuple[int, ...]:
        """The file descriptors that its description goes with: one or none."""
        return () if self.fd is None else (self.fd,)


@dataclass(frozen=True, slots=True)
class WeightsSegment:
    """Memory for the weights of one model, which its first worker fills.

    ``page_fd``: the weights page, a small memfd. Its first word, of 8 bytes, is 0 until the weights are complete.
    """

    segment: Segment
    page_fd: int


@dataclass(frozen=True, slots=True)
class Shard:
    """The pool on one device rank: its segments, in address order. A tensor-parallel unit has one shard per rank."""

    segments: tuple[Segment, ...]

    @property
    def size_bytes(self) -> int:
        return sum(segment.size_bytes for segment in self.segments)


class DeviceMemory(Protocol):
    """The pool of a unit, allocated once and exported to every worker. The memory lives as long as a mapping of it.

    With `Transport.LEGACY_IPC` it ends with the process that allocated it instead.
    """

    @property
    def kind(self) -> str:
        """Where the segments are: `HOST` or `CUDA`."""

    @property
    def transport(self) -> Transport:
        """How the segments are passed to workers."""

    @property
    def num_sms(self) -> int:
        """Streaming multiprocessors of the whole device; 0 for a CPU."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """One shard for each device rank, all of the same size."""

    def weights(self, model: str) -> WeightsSegment | None:
        """Memory for the weights of ``model``; None where workers map the weight image itself."""

    def forget_weights(self) -> None:
        """Lets the next worker of each model fill the weights again. No worker may be filling them."""

    def close(self) -> None:
        """Closes the file descriptors; workers keep their mappings, except of `Transport.LEGACY_IPC`."""


class HostMemory:
    """`DeviceMemory` of a CPU: one shard of memfds, filled with zeros. Its workers map weight images as files."""

    kind = HOST
    transport = Transport.HOST_SHM
    num_sms = 0

    def __init__(self, num_bytes: int, segment_bytes: int | None = None) -> None:
        """``segment_bytes``: size of each segment but the last, a whole number of slabs; None: one segment."""
        sizes = _split(num_bytes, segment_bytes or num_bytes)
        self.shards = (Shard(tuple(Segment(new_memfd("muxmesh-kv-pool", size), size) for size in sizes)),)

    def weights(self, model: str) -> None:
        return None

    def forget_weights(self) -> None:
        pass

    def close(self) -> None:
        for shard in self.shards:
            for segment in shard.segments:
                for fd in segment.fds:
                    os.close(fd)


def new_memfd(name: str, num_bytes: int) -> int:
    """Returns a file descriptor of new shared memory, filled with zeros. The caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return fd


def reserve(fds: Iterable[int]) -> None:
    """Allocates all memory of shared memory files, which else happens page by page at the first access. Blocks.

    Memory counts to the cgroup of the process that allocates it. Raises DeviceError if there is not enough.
    """
    for fd in fds:
        try:
            os.posix_fallocate(fd, 0, os.fstat(fd).st_size)
        except OSError as error:
            raise DeviceError(
                f"{os.fstat(fd).st_size} bytes of memory cannot be allocated: {error.strerror}"
            ) from error


def _split(num_bytes: int, part_bytes: int) -> Iterable[int]:
    return [min(part_bytes, num_bytes - start) for start in range(0, num_bytes, part_bytes)]
