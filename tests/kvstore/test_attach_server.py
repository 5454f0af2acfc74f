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

from kvstore.attach_server import AttachServer
from kvstore.device_memory import HostMemory
from kvstore.grant_table import GrantTable
from kvstore.unit import Unit, UnitModel
from muxmesh.device.kv_view import KvView
from muxmesh.errors import Unavailable
from muxmesh.models.model_spec import KvShape
from muxmesh.types import KvDemand, QueuedRequest, Role, SchedulingState
from worker.attachment import attach, attach_writer

SLAB_BYTES = 64 * 1024
SHAPE = KvShape(num_layers=2, num_kv_heads=1, head_dim=16, block_size=8, dtype_bytes=4)
WORKER = """
import asyncio, sys, time
from pathlib import Path
from worker.attachment import attach
from muxmesh.types import Role
attachment = asyncio.run(attach(Path(sys.argv[1]), Role(sys.argv[2]), "m", "unix:x"))
attachment.pool._memory[5] = 42.0
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
from worker.attachment import attach
from muxmesh.types import Role
attachment = asyncio.run(attach(Path(sys.argv[1]), Role(sys.argv[2]), "m", "unix:x"))
attachment.set_ready(True)
memory = attachment.pool._memory
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
        block = memory[place : place + size]
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
        self.unit = Unit(4 * SLAB_BYTES, SLAB_BYTES, {"m": UnitModel(SHAPE, 4, 512)})
        self.memory, self.grants = HostMemory(4 * SLAB_BYTES), GrantTable()
        self.changes = asyncio.Event()
        self.attach = AttachServer(
            path, self.unit, self.memory, None, self.grants, self.changes.set, check_every_s=0.05
        )
        self.attach.start()

    @property
    def pool_path(self) -> str:
        """The pool as a file of this process."""
        return f"/proc/self/fd/{self.memory.shards[0].segments[0].fd}"

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
        mapped = np.memmap(server.pool_path, dtype=np.float32, mode="r")
        assert mapped[5] == 42.0


async def test_a_killed_workers_leases_and_slot_come_back(server: Server) -> None:
    with worker_process(server, "prefill") as prefill, worker_process(server, "decode") as decode:
        await server.until_ready(2)
        server.unit.offer("r", QueuedRequest(1, "m", SchedulingState(0, 0.0), KvDemand(30, 30)))
        (given,) = server.unit.schedule(0.0, 0.0).credits
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
        server.unit.offer("r", QueuedRequest(1, "m", SchedulingState(0, 0.0), KvDemand(30, 30)))
        (given,) = server.unit.schedule(0.0, 0.0).credits
        server.unit.acquire(given.lease.ref, given.prefill.name)
        prefill.send_signal(signal.SIGSTOP)
        await server.until_attached(1)
        assert prefill.wait() == -signal.SIGKILL
        assert len(server.unit.leases) == 0
        assert [worker.role for worker in server.unit.workers.values()] == [Role.DECODE]


@pytest.mark.parametrize("fault", ["stopped", "killed", "stopped for a moment"])
async def test_a_lost_worker_never_writes_into_blocks_that_are_anothers(server: Server, fault: str) -> None:
    """The victim writes without a pause. Whatever becomes of it, the blocks' next owner finds its own pattern only."""
    view = KvView(np.memmap(server.pool_path, dtype=np.float32, mode="r"), SHAPE, SLAB_BYTES)
    size = SHAPE.token_block_bytes // 4
    capacity = server.unit.pool.capacity_blocks("m") * SHAPE.block_size
    rng = random.Random(fault)
    with worker_process(server, "decode"), ExitStack() as writers:
        await server.until_ready(1)
        for turn in range(1, 6):
            writer = writers.enter_context(worker_process(server, "prefill", WRITER, str(size)))
            await server.until_ready(2)
            server.unit.offer("r", QueuedRequest(turn, "m", SchedulingState(0, 0.0), KvDemand(capacity, capacity)))
            (given,) = server.unit.schedule(0.0, 0.0).credits
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
            server.unit.offer("r", QueuedRequest(-turn, "m", SchedulingState(0, 0.0), KvDemand(8, 8)))
            while given.prefill.name in server.unit.workers:
                assert server.unit.schedule(0.0, 0.0).credits == [], "its blocks were reused while it could write"
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
    assert server.grants.allocate_slot(Role.DECODE, "m")[0] == 0


async def test_a_worker_is_told_when_it_is_refused(server: Server) -> None:
    with pytest.raises(Unavailable, match="refused decode of other"):
        await attach(server.path, Role.DECODE, "other", "unix:x")


async def test_a_worker_notices_that_the_unit_is_gone(server: Server) -> None:
    attachment = await attach(server.path, Role.DECODE, "m", "unix:x")
    lost = asyncio.Event()
    attachment.on_unit_lost(lost.set)
    (attached,) = server.attach._attachments.values()
    (connection,) = attached.processes.values()
    connection.shutdown(socket.SHUT_RDWR)
    async with asyncio.timeout(10):
        await lost.wait()
    attachment.close()


HELPER = """
import asyncio, sys, threading, time
from pathlib import Path
from worker.attachment import attach_writer
connection, pool = asyncio.run(attach_writer(Path(sys.argv[1]), sys.argv[2]))
print("attached", flush=True)
while True:
    pool._memory[int(sys.argv[3])] = 7.0
"""
"""A further process that writes into the pool for a worker, without a pause."""


async def test_leases_end_only_when_every_process_that_writes_for_the_worker_has_exited(server: Server) -> None:
    with worker_process(server, "prefill") as owner, worker_process(server, "decode"):
        await server.until_ready(2)
        server.unit.offer("r", QueuedRequest(1, "m", SchedulingState(0, 0.0), KvDemand(30, 30)))
        (given,) = server.unit.schedule(0.0, 0.0).credits
        server.unit.acquire(given.lease.ref, given.prefill.name)
        helper = await asyncio.to_thread(
            subprocess.Popen,
            [sys.executable, "-c", HELPER, str(server.path), given.prefill.name, "99"],
            stdout=subprocess.PIPE,
        )
        try:
            assert helper.stdout is not None
            assert await asyncio.to_thread(helper.stdout.readline) == b"attached\n"
            helper.send_signal(signal.SIGSTOP)  # it cannot exit by itself
            owner.kill()
            await server.until(lambda: not given.prefill.ready)
            await server.until_attached(1)
            assert helper.wait() == -signal.SIGKILL, "what writes for a dead worker is killed"
            assert len(server.unit.leases) == 0
        finally:
            helper.kill()
            helper.communicate()


async def test_a_writer_that_exits_leaves_the_worker_and_its_leases(server: Server) -> None:
    with worker_process(server, "prefill"), worker_process(server, "decode"):
        await server.until_ready(2)
        server.unit.offer("r", QueuedRequest(1, "m", SchedulingState(0, 0.0), KvDemand(30, 30)))
        (given,) = server.unit.schedule(0.0, 0.0).credits
        server.unit.acquire(given.lease.ref, given.prefill.name)
        helper = await asyncio.to_thread(
            subprocess.Popen,
            [sys.executable, "-c", HELPER, str(server.path), given.prefill.name, "99"],
            stdout=subprocess.PIPE,
        )
        assert helper.stdout is not None
        assert await asyncio.to_thread(helper.stdout.readline) == b"attached\n"
        mapped = np.memmap(server.pool_path, dtype=np.float32, mode="r")
        async with asyncio.timeout(20):
            while mapped[99] != 7.0:
                await asyncio.sleep(0)
        attachment = server.attach._attachments[given.prefill.name]
        helper.kill()
        helper.wait()
        helper.stdout.close()
        async with asyncio.timeout(20):
            while len(attachment.processes) > 1:
                await asyncio.sleep(0.001)
        assert given.prefill.ready and len(server.unit.leases) == 1


async def test_a_writer_for_nobody_is_refused(server: Server) -> None:
    with pytest.raises(Unavailable, match="refused a writer for nobody"):
        await attach_writer(server.path, "nobody")
