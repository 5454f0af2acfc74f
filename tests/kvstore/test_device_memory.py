"""The contract of `DeviceMemory`, and how host memory is divided into segments."""

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.device_memory import HOST, DeviceMemory, HostMemory, Segment, Shard, new_memfd, reserve
from muxmesh.errors import DeviceError

NUM_BYTES = 7 * mmap.PAGESIZE
MEMORIES: dict[str, Callable[[], DeviceMemory]] = {
    "one segment": lambda: HostMemory(NUM_BYTES),
    "equal segments": lambda: HostMemory(NUM_BYTES, mmap.PAGESIZE),
    "a shorter last segment": lambda: HostMemory(NUM_BYTES, 3 * mmap.PAGESIZE),
}


@pytest.fixture(params=MEMORIES)
def memory(request: pytest.FixtureRequest) -> Iterator[DeviceMemory]:
    allocated = MEMORIES[request.param]()
    yield allocated
    allocated.close()


def segments_of(memory: DeviceMemory) -> list[Segment]:
    return [segment for shard in memory.shards for segment in shard.segments]


def fds_of(memory: DeviceMemory) -> list[int]:
    return [fd for segment in segments_of(memory) for fd in segment.fds]


# The contract


def test_every_shard_has_the_requested_size(memory: DeviceMemory) -> None:
    assert {shard.size_bytes for shard in memory.shards} == {NUM_BYTES}


def test_every_segment_has_a_file_descriptor_of_its_own_and_of_its_size(memory: DeviceMemory) -> None:
    segments, fds = segments_of(memory), fds_of(memory)
    assert len(set(fds)) == len(segments)
    assert [os.fstat(fd).st_size for fd in fds] == [segment.size_bytes for segment in segments]


def test_memory_is_filled_with_zeros(memory: DeviceMemory) -> None:
    for fd in fds_of(memory):
        with mmap.mmap(fd, 0) as mapped:
            assert mapped[:] == bytes(len(mapped))


def test_all_mappings_share_one_memory(memory: DeviceMemory) -> None:
    last = fds_of(memory)[-1]
    with mmap.mmap(last, 0) as one, mmap.mmap(last, 0) as other:
        one[-3:] = b"kv!"
        assert other[-3:] == b"kv!"


def test_file_descriptors_are_not_inherited_by_child_processes(memory: DeviceMemory) -> None:
    assert not any(os.get_inheritable(fd) for fd in fds_of(memory))


@pytest.mark.parametrize("name", MEMORIES)
def test_a_mapping_outlives_the_file_descriptors(name: str) -> None:
    memory = MEMORIES[name]()
    with mmap.mmap(fds_of(memory)[0], 0) as mapped:
        mapped[0] = 42
        memory.close()
        assert mapped[0] == 42
    for fd in fds_of(memory):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


# Host memory


@pytest.mark.parametrize(
    ("segment_bytes", "sizes"),
    [(None, [7000]), (7000, [7000]), (9000, [7000]), (3000, [3000, 3000, 1000]), (3500, [3500, 3500])],
)
def test_host_memory_is_divided_into_segments(segment_bytes: int | None, sizes: list[int]) -> None:
    memory = HostMemory(7000, segment_bytes)
    (shard,) = memory.shards
    assert [(segment.size_bytes, segment.device_uuid) for segment in shard.segments] == [(size, "") for size in sizes]
    assert memory.kind == HOST
    memory.close()


def test_the_size_of_a_shard_is_that_of_its_segments() -> None:
    assert Shard((Segment(3, 100, "GPU-1"), Segment(4, 50, "GPU-1"))).size_bytes == 150


def test_new_shared_memory_carries_its_name() -> None:
    fd = new_memfd("muxmesh-test", 4096)
    assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:muxmesh-test (deleted)"
    os.close(fd)


def test_reserved_memory_is_allocated_at_once() -> None:
    fds = [new_memfd("muxmesh-test", size) for size in (8192, 4096)]
    assert [os.fstat(fd).st_blocks for fd in fds] == [0, 0]
    reserve(fds)
    assert [os.fstat(fd).st_blocks * 512 for fd in fds] == [8192, 4096]
    for fd in fds:
        os.close(fd)


def test_memory_that_cannot_be_reserved_is_an_error_of_the_device(tmp_path: Path) -> None:
    (tmp_path / "read-only").write_bytes(bytes(10))
    fd = os.open(tmp_path / "read-only", os.O_RDONLY)
    with pytest.raises(DeviceError, match=r"^10 bytes of memory cannot be allocated: Bad file descriptor$"):
        reserve([fd])
    os.close(fd)
