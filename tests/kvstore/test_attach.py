"""The attach socket, with real processes at the other end."""

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvstore.admission import WaitingKey
from kvstore.attach import AttachServer
from kvstore.client.attachment import attach
from kvstore.memory import UnitMemory
from kvstore.unit import ModelShare, Unit
from muxmesh.config.runtime import Role
from muxmesh.engine.kv_view import KvView
from muxmesh.errors import Unavailable
from muxmesh.models.spec import KvShape
from muxmesh.types import KvDemand, Standing

SLAB_BYTES = 64 * 1024
SHAPE = KvShape(num_layers=2, num_kv_heads=1, head_dim=16, block_size=8, dtype_bytes=4)
WORKER = """
import asyncio, sys, time
from pathlib import Path
from kvstore.client.attachment import attach
from muxmesh.config.runtime import Role
attachment = asyncio.run(attach(Path(sys.argv[1]), Role(sys.argv[2]), "m", "unix:x"))
attachment.pool[5] = 42.0
attachment.set_ready(True)
print("attached", flush=True)
while True:
    attachment.beat()
    time.sleep(0.01)
"""

WRITER = """
import asyncio, json, sys, threading, time
from pathlib import Path
import numpy as np
from kvstore.client.attachment import attach
from muxmesh.config.runtime import Role
attachment = asyncio.run(attach(Path(sys.argv[1]), Role(sys.argv[2]), "m", "unix:x"))
attachment.set_ready(True)
def beat():
    while True:
        attachment.beat()
        time.sleep(0.01)
threading.Thread(target=beat, daemon=True).start()
print("attached", flush=True)
pattern, places = json.loads(sys.stdin.readline())
size = int(sys.argv[3])
written = False
while True:
    for place in places:
        block = attachment.pool[place : place + size]
        if written and not (block == pattern).all():
            print("foreign", flush=True)
        block[:] = pattern
    if not written:
        print("written", flush=True)
    written = True
"""
"""Writes the pattern that it is told to into its blocks, for ever, and says so if anything else is there."""


class Server:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.unit = Unit(4 * SLAB_BYTES, SLAB_BYTES, {"m": ModelShare(SHAPE, 4, 512)})
        self.memory = UnitMemory(4 * SLAB_BYTES)
        self.changes = asyncio.Event()
        self.attach = AttachServer(path, self.unit, self.memory, self.changes.set, look_every_s=0.05)
        self.attach.start()

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not what():
                self.changes.clear()
                await self.changes.wait()

    async def until_ready(self, count: int) -> None:
        await self.until(lambda: sum(worker.ready for worker in self.unit.workers.values()) == count)

    async def until_attached(self, count: int) -> None:
        await self.until(lambda: len(self.unit.workers) == count)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    running = Server(tmp_path / "a.sock")
    yield running
    running.attach.close()


@contextmanager
def worker_process(
    server: Server, role: str, script: str = WORKER, *arguments: str
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", script, str(server.path), role, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_a_worker_writes_into_the_units_own_memory(server: Server) -> None:
    with worker_process(server, "prefill"):
        await server.until_ready(1)
        mapped = np.memmap(f"/proc/self/fd/{server.memory.pool_fd}", dtype=np.float32, mode="r")
        assert mapped[5] == 42.0


async def test_a_killed_workers_leases_and_slot_come_back(server: Server) -> None:
    with worker_process(server, "prefill") as prefill, worker_process(server, "decode") as decode:
        await server.until_ready(2)
        server.unit.offer(WaitingKey("r", 1, "m", Standing(0, 0.0), KvDemand(30, 30)))
        (given,) = server.unit.give_room(0.0).credits
        server.unit.acquire(given.lease.ref, given.prefill.name)
        prefill.kill()
        await server.until_attached(1)
        assert len(server.unit.leases) == 0
        server.unit.check_integrity()
        with pytest.raises(KeyError):
            server.attach.slot_of(given.prefill.name)
        decode.kill()
        await server.until_attached(0)


async def test_a_silent_workers_leases_expire_with_it(server: Server) -> None:
    with worker_process(server, "prefill") as prefill, worker_process(server, "decode"):
        await server.until_ready(2)
        server.unit.offer(WaitingKey("r", 1, "m", Standing(0, 0.0), KvDemand(30, 30)))
        (given,) = server.unit.give_room(0.0).credits
        server.unit.acquire(given.lease.ref, given.prefill.name)
        prefill.send_signal(signal.SIGSTOP)
        await server.until_attached(1)
        assert prefill.wait() == -signal.SIGKILL
        assert len(server.unit.leases) == 0
        assert [worker.role for worker in server.unit.workers.values()] == [Role.DECODE]


@pytest.mark.parametrize("fault", ["stopped", "killed", "stopped for a moment"])
async def test_a_lost_worker_never_writes_into_blocks_that_are_anothers(server: Server, fault: str) -> None:
    """The victim writes without a pause. Whatever becomes of it, the blocks' next owner finds its own pattern only."""
    view = KvView(np.memmap(f"/proc/self/fd/{server.memory.pool_fd}", dtype=np.float32, mode="r"), SHAPE, SLAB_BYTES)
    size = SHAPE.token_block_bytes // 4
    capacity = server.unit.pool.capacity_blocks("m") * SHAPE.block_size
    rng = random.Random(fault)
    with worker_process(server, "decode"), ExitStack() as writers:
        await server.until_ready(1)
        for turn in range(1, 6):
            writer = writers.enter_context(worker_process(server, "prefill", WRITER, str(size)))
            await server.until_ready(2)
            server.unit.offer(WaitingKey("r", turn, "m", Standing(0, 0.0), KvDemand(capacity, capacity)))
            (given,) = server.unit.give_room(0.0).credits
            lease = server.unit.acquire(given.lease.ref, given.prefill.name)
            places = [int(offset) for offset in view.block_offsets(lease.block_ids)]
            assert writer.stdin is not None
            assert writer.stdout is not None
            writer.stdin.write(json.dumps([turn, places]).encode() + b"\n")
            writer.stdin.flush()
            said = [await asyncio.to_thread(writer.stdout.readline) for _ in range(2)]
            assert said == [b"attached\n", b"written\n"]
            for _ in range(20):
                assert all((view.pool[place : place + size] == turn).all() for place in places)
                await asyncio.sleep(rng.uniform(0.0, 0.005))
            writer.send_signal(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
            server.unit.offer(WaitingKey("r", -turn, "m", Standing(0, 0.0), KvDemand(8, 8)))
            while given.prefill.name in server.unit.workers:
                assert server.unit.give_room(0.0).credits == [], "its blocks were given away while it could still write"
                if fault == "stopped for a moment":
                    writer.send_signal(signal.SIGCONT)
                    fault = "stopped"
                    await asyncio.sleep(0.1)
                    writer.send_signal(signal.SIGSTOP)
                await asyncio.sleep(0.001)
            server.unit.admission.withdraw("r", -turn)
            rest, _ = await asyncio.to_thread(writer.communicate)
            assert rest == b"", "another wrote into its blocks"
    server.unit.check_integrity()


async def test_a_worker_that_lets_go_of_the_unit_serves_no_more(server: Server) -> None:
    attachment = await attach(server.path, Role.DECODE, "m", "unix:x")
    attachment.set_ready(True)
    await server.until_ready(1)
    attachment.set_ready(False)
    await server.until_ready(0)
    attachment.close()


@pytest.mark.parametrize("hello", [b"", b"no json", b"{}", b'{"role": "x", "model": "m", "address": ""}',
                                   b'{"role": "decode", "model": "other", "address": ""}'])  # fmt: skip
async def test_a_bad_hello_leaves_nothing(server: Server, hello: bytes) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.setblocking(False)
        connection.connect(str(server.path))
        connection.send(hello)
        async with asyncio.timeout(10):
            assert await loop.sock_recv(connection, 100) == b""
    assert server.unit.workers == {}
    assert server.memory.take_slot()[0] == 0


async def test_a_worker_is_told_when_it_is_refused(server: Server) -> None:
    with pytest.raises(Unavailable, match="refused decode of other"):
        await attach(server.path, Role.DECODE, "other", "unix:x")


async def test_a_worker_notices_that_the_unit_is_gone(server: Server) -> None:
    attachment = await attach(server.path, Role.DECODE, "m", "unix:x")
    lost = asyncio.Event()
    attachment.on_unit_lost(lost.set)
    (attached,) = server.attach._attached.values()
    attached.connection.shutdown(socket.SHUT_RDWR)
    async with asyncio.timeout(10):
        await lost.wait()
    attachment.close()
