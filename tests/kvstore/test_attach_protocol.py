"""The messages of the attach socket as bytes: the pool's description, replies, file descriptors, bad messages."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from kvstore.attach_protocol import MAX_FDS, MAX_MESSAGE_BYTES, num_pool_fds, pool_description
from kvstore.device_memory import HostMemory, Segment, Shard, Transport, new_memfd
from kvstore.grant_page import PAGE_BYTES
from kvstore.progress_page import page_bytes
from muxmesh.clock import ManualClock
from muxmesh.device.device_pool import HostPool
from muxmesh.errors import Unavailable
from muxmesh.types import SWAP_PAGE_BYTES
from tests.kvstore.small_unit import SHAPES, SLAB_BYTES, make_unit
from tests.support.served_unit import ServedUnit, served
from worker.attachment import map_pool


@dataclass(frozen=True)
class DeviceShards:
    """Shards whose file descriptors are numbers only."""

    shards: tuple[Shard, ...]
    kind: str = "device"
    transport: Transport = Transport.VMM_FD
    num_sms: int = 132

    def weights(self, model: str) -> None:
        return None

    def forget_weights(self) -> None:
        pass

    def close(self) -> None:
        pass


TWO_RANKS = DeviceShards(
    (
        Shard((Segment(10, 100, "GPU-0"), Segment(11, 50, "GPU-0"))),
        Shard((Segment(12, 100, "GPU-1"), Segment(13, 50, "GPU-1"))),
    )
)


def test_a_description_lists_size_and_device_of_each_segment_by_shard() -> None:
    assert pool_description(TWO_RANKS, 50, has_swap=True) == {
        "device": "device",
        "transport": "vmm fd",
        "num_sms": 132,
        "slab_bytes": 50,
        "shards": [[[100, "GPU-0", ""], [50, "GPU-0", ""]], [[100, "GPU-1", ""], [50, "GPU-1", ""]]],
        "swap": True,
    }


@pytest.mark.parametrize("has_swap", [False, True])
def test_a_description_survives_json(has_swap: bool) -> None:
    description = pool_description(TWO_RANKS, 50, has_swap)
    assert json.loads(json.dumps(description)) == description


@pytest.mark.parametrize("has_swap", [False, True])
def test_a_description_counts_its_file_descriptors(has_swap: bool) -> None:
    one_segment = DeviceShards((Shard((Segment(10, 100),)),))
    assert num_pool_fds(pool_description(one_segment, 50, has_swap)) == 1 + has_swap
    assert num_pool_fds(pool_description(TWO_RANKS, 50, has_swap)) == 4 + has_swap


def test_a_segment_with_an_ipc_handle_has_no_file_descriptor() -> None:
    with_handle = DeviceShards((Shard((Segment(None, 100, "GPU-0", b"\x01\xff"), Segment(10, 100, "GPU-0"))),))
    description = pool_description(with_handle, 50, has_swap=False)
    assert description["shards"] == [[[100, "GPU-0", "01ff"], [100, "GPU-0", ""]]]
    assert num_pool_fds(description) == 1


@pytest.mark.parametrize("has_swap", [False, True])
def test_a_worker_maps_the_pool_from_its_description(has_swap: bool) -> None:
    memory, swap_fd = HostMemory(2 * SLAB_BYTES), new_memfd("swap", SWAP_PAGE_BYTES)
    description = json.loads(json.dumps(pool_description(memory, SLAB_BYTES, has_swap)))
    (pool_fd,) = memory.shards[0].segments[0].fds
    pools = [map_pool(description, [os.dup(pool_fd), *[os.dup(swap_fd)] * has_swap]) for _ in range(2)]
    views = [pool.view(SHAPES["a"]) for pool in pools if isinstance(pool, HostPool)]
    views[0].pool[5] = 42.0
    assert views[1].pool[5] == 42.0
    assert views[1].pool.nbytes == 2 * SLAB_BYTES
    assert [pool.has_swap for pool in pools] == [has_swap, has_swap]
    memory.close()
    os.close(swap_fd)


def test_a_worker_refuses_a_kind_of_memory_that_it_cannot_map() -> None:
    description = pool_description(TWO_RANKS, 50, has_swap=False)
    with pytest.raises(Unavailable, match=r"pool is device memory .*; this worker maps one segment of host memory"):
        map_pool(description, [new_memfd("x", 1) for _ in range(num_pool_fds(description))])


# On the socket


class Peer:
    """A process at the other end of the attach socket, at the level of bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(20)
        self.fds: list[int] = []

    async def hello(self, message: bytes) -> dict[str, Any] | None:
        """Sends the first message; the reply, or None if the connection was closed."""
        reply, self.fds, _, _ = await asyncio.to_thread(self._exchange, message)
        return json.loads(reply) if reply else None

    def _exchange(self, message: bytes) -> tuple[bytes, list[int], int, Any]:
        self.socket.connect(str(self._path))
        self.socket.send(message)
        return socket.recv_fds(self.socket, MAX_MESSAGE_BYTES, MAX_FDS)

    def file_sizes(self) -> list[int]:
        """Size of each memfd, 0 of each eventfd."""
        return [os.fstat(fd).st_size for fd in self.fds]

    def close(self) -> None:
        self.socket.close()
        for fd in self.fds:
            os.close(fd)


@pytest_asyncio.fixture
async def served_unit(tmp_path: Path) -> AsyncIterator[ServedUnit]:
    unit = make_unit(num_slabs=4, swap_bytes=4 * SWAP_PAGE_BYTES)
    async with served(tmp_path, unit, ManualClock(), segment_bytes=2 * SLAB_BYTES) as running:
        yield running


@pytest.fixture
def peers(served_unit: ServedUnit) -> Iterator[tuple[Peer, Peer]]:
    pair = Peer(served_unit.attach_path), Peer(served_unit.attach_path)
    yield pair
    for peer in pair:
        peer.close()


HELLO = {"role": "decode", "model": "a", "address": "unix:x"}
DESCRIPTION = {
    "device": "host",
    "transport": "host shm",
    "num_sms": 0,
    "slab_bytes": SLAB_BYTES,
    "shards": [[[2 * SLAB_BYTES, "", ""], [2 * SLAB_BYTES, "", ""]]],
    "swap": True,
}
POOL_SIZES = [2 * SLAB_BYTES, 2 * SLAB_BYTES, 4 * SWAP_PAGE_BYTES]


async def test_the_reply_to_a_worker_comes_with_the_pool_and_its_own_pages(
    served_unit: ServedUnit, peers: tuple[Peer, Peer]
) -> None:
    reply = await peers[0].hello(json.dumps(HELLO).encode())
    (worker,) = served_unit.unit.workers.values()
    max_seqs, max_blocks = 3, 512 // SHAPES["a"].block_size
    own = {"worker": worker.name, "slot": 0, "progress": [max_seqs, max_blocks]}
    assert reply == {**own, "pool": DESCRIPTION, "weights": None, "engine": "awake"}
    assert peers[0].file_sizes() == [*POOL_SIZES, PAGE_BYTES, 0, 0, page_bytes(max_seqs, max_blocks)]
    assert (worker.role, worker.model, worker.address, worker.pid) == ("decode", "a", "unix:x", os.getpid())


async def test_the_reply_to_a_writer_comes_with_the_pool_only(
    served_unit: ServedUnit, peers: tuple[Peer, Peer]
) -> None:
    owner = await peers[0].hello(json.dumps(HELLO).encode())
    assert owner is not None
    reply = await peers[1].hello(json.dumps({"writer_for": owner["worker"]}).encode())
    assert reply == {"worker": owner["worker"], "pool": DESCRIPTION}
    assert peers[1].file_sizes() == POOL_SIZES
    assert len(served_unit.unit.workers) == 1


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "no JSON object"),
        (b"no json", "no JSON object"),
        (b"\xff", "no JSON object"),
        (b"[]", "no JSON object"),
        (b"5", "no JSON object"),
        (b"{}", "lacks role, model, address;"),
        (b'{"role": "decode", "model": "a"}', "lacks address;"),
        (b'{"role": "other", "model": "a", "address": ""}', "'other' is not a valid Role"),
        (b'{"role": "decode", "model": ["a"], "address": ""}', "model: \"['a']\"; a string is needed"),
        (b'{"role": "decode", "model": "unknown", "address": ""}', "unknown"),
        (b'{"role": "decode", "model": "a", "address": 5}', "address: '5'; a string is needed"),
        (b'{"writer_for": "unknown"}', "no worker 'unknown' is attached"),
        (b'{"writer_for": ["decode-a#1"]}', "writer_for"),
    ],
)
async def test_a_bad_first_message_is_refused_with_the_reason_and_leaves_nothing(
    served_unit: ServedUnit, peers: tuple[Peer, Peer], message: bytes, reason: str
) -> None:
    refusal = await peers[0].hello(message)
    assert refusal is not None
    assert refusal.keys() == {"refused"}
    assert reason in refusal["refused"]
    assert served_unit.unit.workers == {}
    reply = await peers[1].hello(json.dumps(HELLO).encode())
    assert reply is not None
    assert reply["slot"] == 0


@pytest.mark.parametrize("message", [b"no json", b"\xff", b"[]", b"5", b'{"other": true}'])
async def test_a_bad_later_message_changes_nothing(
    served_unit: ServedUnit, peers: tuple[Peer, Peer], message: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    reply = await peers[0].hello(json.dumps(HELLO).encode())
    assert reply is not None
    peers[0].socket.send(message)
    peers[0].socket.send(b'{"ready": true}')
    await served_unit.until_ready(reply["worker"])
    assert f"{reply['worker']} sent a message that is not understood" in caplog.text
