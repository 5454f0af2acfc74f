"""The attach socket, with real processes at the other end; timers under virtual time with processes that only exit."""

import asyncio
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.attach_protocol import BEAT_EVERY_S, MAX_MESSAGE_BYTES, MAX_SILENT_CHECKS, MAX_UNANSWERED_CHECKS
from kvstore.attach_server import AttachServer
from kvstore.device_memory import HostMemory
from kvstore.fence import Fence, HostFence
from kvstore.grant_page import MAX_WORKERS, Word
from kvstore.grant_table import GrantTable
from kvstore.model_states import WorkerCommand
from kvstore.share_proof import ShareProver
from kvstore.unit import IssuedCredit, Unit
from kvstore.unit_model import UnitModel
from kvstore.worker_slots import EngineState
from muxmesh.block_hashes import block_hashes
from muxmesh.clock import SystemClock
from muxmesh.config.arbiter_config import ArbiterConfig
from muxmesh.device.kv_view import KvView
from muxmesh.engine.api import ComputeDemand
from muxmesh.errors import Unavailable
from muxmesh.models.model_spec import KvShape
from muxmesh.step_cost import StepCost
from muxmesh.types import KvDemand, QueuedRequest, Role, SchedulingState
from tests.support.debugged_process import debugged_process
from tests.support.virtual_time import run_virtually
from worker.attachment import attach, attach_writer
from worker.compute_grant import ComputeGrant

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

BUSY_WORKER = """
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
pattern, offsets = json.loads(sys.stdin.readline())
size = int(sys.argv[3])
written = False
while True:
    for offset in offsets:
        block = memory[offset : offset + size]
        if written and not (block == pattern).all():
            print("overwritten", flush=True)
        block[:] = pattern
    if not written:
        print("written", flush=True)
    written = True
"""
"""Writes the pattern of its input into its blocks without a pause, and reports a block that holds anything else."""

WRITER = """
import asyncio, sys, threading, time
from pathlib import Path
from worker.attachment import attach_writer
connection, pool = asyncio.run(attach_writer(Path(sys.argv[1]), sys.argv[2]))
print("attached", flush=True)
while True:
    pool._memory[int(sys.argv[3])] = 7.0
"""
"""A further process that writes into the pool for a worker without a pause."""


class Memory(HostMemory):
    """Counts how often the weights on it were forgotten."""

    num_forgotten = 0

    def forget_weights(self) -> None:
        self.num_forgotten += 1


class OtherProcesses(HostFence):
    """Spares the process of the tests, in which some workers attach: an end of it would end the whole run."""

    def __init__(self) -> None:
        self._own: set[int] = set()

    def watch(self, pid: int) -> int:
        watch_fd = super().watch(pid)
        if pid == os.getpid():
            self._own.add(watch_fd)
        else:
            self._own.discard(watch_fd)
        return watch_fd

    def kill(self, watch_fd: int) -> None:
        if watch_fd not in self._own:
            super().kill(watch_fd)


class Server:
    """A unit with one model and its attach socket."""

    def __init__(
        self,
        path: Path,
        fence: Fence | None = None,
        check_every_s: float = 0.05,
        prover: ShareProver | None = None,
        identities: Mapping[str, str] | None = None,
        arbiter: ArbiterConfig | None = None,
    ) -> None:
        self.path = path
        self.unit = Unit(4 * SLAB_BYTES, SLAB_BYTES, {"m": UnitModel(SHAPE, 4, 512)})
        self.memory, self.grants = Memory(4 * SLAB_BYTES), GrantTable(arbiter)
        self.changes = asyncio.Event()
        self.attach = AttachServer(
            path,
            self.unit,
            self.memory,
            None,
            self.grants,
            fence or OtherProcesses(),
            self.changes.set,
            check_every_s,
            prover,
            identities or {},
        )
        self.attach.start()

    def close(self) -> None:
        self.attach.close()
        self.grants.close()
        self.memory.close()

    @property
    def pool_path(self) -> str:
        """The pool as a file of this process."""
        return f"/proc/self/fd/{self.memory.shards[0].segments[0].fd}"

    def offer(self, entry_id: int, num_tokens: int) -> None:
        demand = KvDemand(num_tokens, num_tokens)
        self.unit.offer("r", QueuedRequest(entry_id, "m", SchedulingState(0, 0.0), demand))

    def lease_to_prefill(self, num_tokens: int = 30) -> IssuedCredit:
        """Admits a request whose credit its prefill worker acquires."""
        self.offer(1, num_tokens)
        (issued,) = self.unit.schedule(0.0, 0.0).credits
        self.unit.acquire(issued.lease.ref, issued.prefill.name)
        return issued

    async def until(self, is_reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not is_reached():
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
    running.close()


@contextmanager
def python_process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def worker_process(
    server: Server, role: str, script: str = WORKER, *arguments: str
) -> Iterator[subprocess.Popen[bytes]]:
    with python_process(script, str(server.path), role, *arguments) as process:
        yield process


async def line_of(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return await asyncio.to_thread(process.stdout.readline)


# Workers


async def test_a_worker_writes_into_the_units_own_memory(server: Server) -> None:
    with worker_process(server, "prefill"):
        await server.until_ready(1)
        mapped = np.memmap(server.pool_path, dtype=np.float32, mode="r")
        assert mapped[5] == 42.0


async def test_a_killed_worker_loses_its_leases_and_its_slot(server: Server) -> None:
    with worker_process(server, "prefill") as prefill, worker_process(server, "decode") as decode:
        await server.until_ready(2)
        issued = server.lease_to_prefill()
        prefill.kill()
        await server.until_attached(1)
        assert len(server.unit.leases) == 0
        server.unit.check_integrity()
        with pytest.raises(KeyError):
            server.attach.slot_of(issued.prefill.name)
        decode.kill()
        await server.until_attached(0)


async def test_a_worker_that_is_stopped_is_killed_and_its_leases_end(server: Server) -> None:
    with worker_process(server, "prefill") as prefill, worker_process(server, "decode"):
        await server.until_ready(2)
        server.lease_to_prefill()
        prefill.send_signal(signal.SIGSTOP)
        await server.until_attached(1)
        assert prefill.wait() == -signal.SIGKILL
        assert len(server.unit.leases) == 0
        assert [worker.role for worker in server.unit.workers.values()] == [Role.DECODE]


@pytest.mark.parametrize("fault", ["stopped", "killed", "stopped for a moment"])
async def test_a_lost_worker_never_writes_into_blocks_of_another(server: Server, fault: str) -> None:
    """The lost worker writes without a pause. The next owner of its blocks finds its own pattern only."""
    view = KvView(SHAPE, SLAB_BYTES, np.memmap(server.pool_path, dtype=np.float32, mode="r"))
    size = SHAPE.token_block_bytes // 4
    capacity = server.unit.pool.capacity_blocks("m") * SHAPE.block_size
    rng = random.Random(fault)
    with worker_process(server, "decode"), ExitStack() as processes:
        await server.until_ready(1)
        for turn in range(1, 6):
            busy = processes.enter_context(worker_process(server, "prefill", BUSY_WORKER, str(size)))
            await server.until_ready(2)
            server.offer(turn, capacity)
            (issued,) = server.unit.schedule(0.0, 0.0).credits
            lease = server.unit.acquire(issued.lease.ref, issued.prefill.name)
            offsets = [int(offset) for offset in view.block_offsets(lease.block_ids)]
            assert busy.stdin is not None
            busy.stdin.write(json.dumps([turn, offsets]).encode() + b"\n")
            busy.stdin.flush()
            assert [await line_of(busy) for _ in range(2)] == [b"attached\n", b"written\n"]
            for _ in range(20):
                assert all((view.pool[offset : offset + size] == turn).all() for offset in offsets)
                await asyncio.sleep(rng.uniform(0.0, 0.005))
            busy.send_signal(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
            server.offer(-turn, 8)
            while issued.prefill.name in server.unit.workers:
                assert server.unit.schedule(0.0, 0.0).credits == [], "its blocks were reused while it could write"
                if fault == "stopped for a moment":
                    busy.send_signal(signal.SIGCONT)
                    fault = "stopped"
                    await asyncio.sleep(0.1)
                    busy.send_signal(signal.SIGSTOP)
                await asyncio.sleep(0.001)
            server.unit.admission.withdraw("r", -turn)
            remaining_output, _ = await asyncio.to_thread(busy.communicate)
            assert remaining_output == b"", "another process wrote into its blocks"
    server.unit.check_integrity()


async def test_a_worker_that_is_not_ready_serves_no_more(server: Server) -> None:
    attachment = await attach(server.path, Role.DECODE, "m", "unix:x")
    attachment.set_ready(True)
    await server.until_ready(1)
    attachment.set_ready(False)
    await server.until_ready(0)
    attachment.close()


async def test_a_worker_of_an_unknown_model_is_refused(server: Server) -> None:
    with pytest.raises(
        Unavailable, match=r"a\.sock refused decode of other: model: 'other' is not served by this unit"
    ):
        await attach(server.path, Role.DECODE, "other", "unix:x")
    assert server.unit.workers == {}
    assert server.grants.allocate_slot(Role.DECODE, "m")[0] == 0


async def test_a_worker_whose_kv_is_not_that_of_the_unit_is_refused(tmp_path: Path) -> None:
    """The runtime file was written again with another block size, and the worker alone restarted."""
    server = Server(tmp_path / "a.sock", identities={"m": "one"})
    with pytest.raises(Unavailable, match=r"its KV of m is not that of the unit: mesh\.yaml .*; restart kvstore"):
        await attach(server.path, Role.DECODE, "m", "unix:x", kv="other")
    assert server.unit.workers == {}
    (await attach(server.path, Role.DECODE, "m", "unix:x", kv="one")).close()
    server.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_a_worker_of_another_user_is_refused_by_both_users(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    server.path.chmod(0o777)
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        os.seteuid(65534)
        try:
            connection.connect(server.path.name)
        finally:
            os.seteuid(0)
        connection.setblocking(False)
        connection.send(b"{}")
        reply = await asyncio.get_running_loop().sock_recv(connection, MAX_MESSAGE_BYTES)
    expected = "it runs as uid 65534, kvstore as uid 0; all processes of a unit have to run as one user"
    assert json.loads(reply) == {"refused": expected}
    assert caplog.messages[-1].endswith(f": {expected}")


async def test_a_worker_for_which_there_is_no_slot_is_refused_and_leaves_nothing(server: Server) -> None:
    slots = [server.grants.allocate_slot(Role.DECODE, "m")[0] for _ in range(MAX_WORKERS)]
    with pytest.raises(Unavailable, match="refused decode of m"):
        await attach(server.path, Role.DECODE, "m", "unix:x")
    assert server.unit.workers == {}
    server.grants.free_slot(slots[7])
    attachment = await attach(server.path, Role.DECODE, "m", "unix:x")
    assert attachment.slot == 7
    attachment.close()


async def test_without_a_free_file_descriptor_processes_wait_and_the_unit_does_not_spin(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.attach_server._ACCEPT_AGAIN_S", 0.1)
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(server.path))
        os.close(lowest_free := os.dup(connection.fileno()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard_limit))
        try:
            await asyncio.sleep(0.3)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard_limit))
        connection.setblocking(False)
        connection.send(b"{}")
        async with asyncio.timeout(20):
            reply = await asyncio.get_running_loop().sock_recv(connection, MAX_MESSAGE_BYTES)
    assert json.loads(reply) == {
        "refused": "its first message lacks role, model, address; a worker sends role, model and address"
    }
    failures = [message for message in caplog.messages if "no process can attach" in message]
    assert 1 <= len(failures) < 10
    assert failures[0] == "no process can attach: [Errno 24] Too many open files; tried again after 0.1 s"


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


async def test_the_step_cost_of_a_worker_is_read_from_its_slot(server: Server) -> None:
    attachments = [await attach(server.path, role, "m", "unix:x") for role in Role]
    cost = StepCost(0.1, 0.2, 0.3)
    attachments[1].page.write_cost(attachments[1].slot, cost)
    assert [server.attach.cost_of(attachment.worker) for attachment in attachments] == [None, cost]
    assert server.attach.cost_of("unknown") is None
    assert [server.attach.slot_of(attachment.worker) for attachment in attachments] == [0, 1]
    for attachment in attachments:
        attachment.close()


async def test_a_restarted_unit_replaces_the_socket_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    Server(path).close()
    assert path.exists()
    server = Server(path)
    attachment = await attach(path, Role.DECODE, "m", "unix:x")
    assert attachment.worker in server.unit.workers
    server.close()
    attachment.close()


# Further processes that write for a worker


async def test_leases_end_only_when_every_process_that_writes_for_the_worker_has_exited(server: Server) -> None:
    with worker_process(server, "prefill") as owner, worker_process(server, "decode"):
        await server.until_ready(2)
        issued = server.lease_to_prefill()
        with python_process(WRITER, str(server.path), issued.prefill.name, "99") as writer:
            assert await line_of(writer) == b"attached\n"
            writer.send_signal(signal.SIGSTOP)  # it cannot exit by itself
            owner.kill()
            await server.until(lambda: not issued.prefill.ready)
            await server.until_attached(1)
            assert writer.wait() == -signal.SIGKILL, "a process that writes for a lost worker is killed"
            assert len(server.unit.leases) == 0


async def test_a_writer_that_exits_leaves_the_worker_and_its_leases(server: Server) -> None:
    with worker_process(server, "prefill"), worker_process(server, "decode"):
        await server.until_ready(2)
        issued = server.lease_to_prefill()
        with python_process(WRITER, str(server.path), issued.prefill.name, "99") as writer:
            assert await line_of(writer) == b"attached\n"
            mapped = np.memmap(server.pool_path, dtype=np.float32, mode="r")
            async with asyncio.timeout(20):
                while mapped[99] != 7.0:
                    await asyncio.sleep(0)
            attachment = server.attach._attachments[issued.prefill.name]
        async with asyncio.timeout(20):
            while len(attachment.processes) > 1:
                await asyncio.sleep(0)
        assert issued.prefill.ready and len(server.unit.leases) == 1


async def test_a_writer_for_an_unknown_worker_is_refused(server: Server) -> None:
    with pytest.raises(Unavailable, match="refused a writer for unknown"):
        await attach_writer(server.path, "unknown")


# The group


@pytest.mark.parametrize("device_has_failed", [True, False])
async def test_all_workers_end_as_a_group_and_the_pool_stays(server: Server, device_has_failed: bool) -> None:
    """After a failure of the device nothing that was computed before is in the prefix cache."""
    hashes = block_hashes([1] * 16, SHAPE.block_size, b"root")
    with worker_process(server, "prefill") as prefill, worker_process(server, "decode") as decode:
        await server.until_ready(2)
        issued = server.lease_to_prefill(16)
        server.unit.blocks.insert_prefix("m", issued.lease.block_ids, hashes)
        server.attach.end_group("of a reason", device_has_failed)
        assert server.unit.ready_workers(Role.DECODE, "m") == []
        await server.until_attached(0)
        assert [process.wait() for process in (prefill, decode)] == [-signal.SIGKILL] * 2
    assert len(server.unit.leases) == 0
    assert server.unit.blocks.count_cached("m", hashes) == (0 if device_has_failed else 2)
    server.unit.check_integrity()
    with worker_process(server, "prefill"):
        await server.until_ready(1)
        assert np.memmap(server.pool_path, dtype=np.float32, mode="r")[5] == 42.0


HUNG_WORKER = """
import asyncio, sys, threading, time
from pathlib import Path
from worker.attachment import attach
from worker.compute_grant import ComputeGrant
from muxmesh.clock import SystemClock
from muxmesh.engine.api import ComputeDemand
from muxmesh.types import Role
async def main():
    attachment = await attach(Path(sys.argv[1]), Role(sys.argv[2]), "m", "unix:x")
    grant = ComputeGrant(attachment, SystemClock())
    attachment.set_ready(True)
    await grant.acquire(ComputeDemand())
    print("computing", flush=True)
    threading.Thread(target=sys.stdin.readline).start()  # its step, which never ends
    while True:
        attachment.beat()
        await asyncio.sleep(0.01)
asyncio.run(main())
"""
"""Hangs in its first step, while its heartbeats go on."""


async def test_a_process_that_hangs_in_its_grant_loses_it_and_is_killed_and_the_others_go_on(tmp_path: Path) -> None:
    arbiter = ArbiterConfig(longest_grant_s=0.5, kill_after_s=1.0)
    server = Server(tmp_path / "a.sock", check_every_s=0.02, arbiter=arbiter)
    loop = asyncio.get_running_loop()
    loop.add_reader(server.grants.doorbell_fd, server.grants.on_doorbell)
    try:
        with worker_process(server, "prefill", HUNG_WORKER) as hung:
            assert hung.stdout and await asyncio.to_thread(hung.stdout.readline) == b"computing\n"
            other = await attach(server.path, Role.DECODE, "m", "unix:x")
            grant = ComputeGrant(other, SystemClock())
            async with asyncio.timeout(20):
                await grant.acquire(ComputeDemand())  # the device is free for it without the return of the other
                assert hung.poll() is None
                grant.release(1)  # at once, or it would hang in its grant, too
                await server.until_attached(1)
            assert await asyncio.to_thread(hung.wait) == -signal.SIGKILL
            assert server.grants.num_revoked == {(Role.PREFILL, "m"): 1}
            other.close()
    finally:
        loop.remove_reader(server.grants.doorbell_fd)
        server.close()


# Timers, under virtual time


class ManualFence:
    """Processes that are not real: they exit by `exit`, and unless ``survives_kill`` when they are killed."""

    def __init__(self) -> None:
        self.watched: list[int] = []
        self.survives_kill = False
        self.killed_at_s: dict[int, float] = {}
        """Index of the process in ``watched`` → when it was killed."""

    def watch(self, pid: int) -> int:
        self.watched.append(os.eventfd(0, os.EFD_NONBLOCK))
        return self.watched[-1]

    def expect_exit(self) -> None:
        pass

    def kill(self, watch_fd: int) -> None:
        self.killed_at_s.setdefault(self.watched.index(watch_fd), asyncio.get_running_loop().time())
        if not self.survives_kill:
            os.eventfd_write(watch_fd, 1)

    def exit(self, index: int) -> None:
        os.eventfd_write(self.watched[index], 1)


class Scenario:
    """A server under virtual time, and processes that attach by messages alone."""

    def __init__(self, path: Path, arbiter: ArbiterConfig | None = None) -> None:
        self.fence = ManualFence()
        self.server = Server(path, self.fence, BEAT_EVERY_S, arbiter=arbiter)
        self.connections: list[socket.socket] = []

    async def attach(self, **hello: str) -> str:
        """Name of the worker that the reply gives."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.connections.append(connection)
        connection.connect(str(self.server.path))
        message = hello or {"role": "decode", "model": "m", "address": ""}
        connection.send(json.dumps(message).encode())
        reply = await asyncio.get_running_loop().sock_recv(connection, MAX_MESSAGE_BYTES)
        return str(json.loads(reply)["worker"])

    async def attach_ready(self) -> str:
        worker = await self.attach()
        self.connections[-1].send(b'{"ready": true}')
        await self.server.until_ready(1)
        return worker

    def close(self) -> None:
        self.server.close()
        for connection in self.connections:
            connection.close()


def play(
    path: Path, story: Callable[[Scenario], Coroutine[Any, Any, None]], arbiter: ArbiterConfig | None = None
) -> Scenario:
    async def run() -> Scenario:
        scenario = Scenario(path, arbiter)
        try:
            await story(scenario)
        finally:
            scenario.close()
        return scenario

    return run_virtually(run())


def test_a_ready_worker_without_heartbeats_is_killed(tmp_path: Path) -> None:
    async def story(scenario: Scenario) -> None:
        await scenario.attach_ready()
        await asyncio.sleep(60)
        assert scenario.server.unit.workers == {}

    first_check_s = BEAT_EVERY_S
    killed_at_s = play(tmp_path / "a.sock", story).fence.killed_at_s
    assert killed_at_s == {0: pytest.approx(first_check_s + MAX_SILENT_CHECKS * BEAT_EVERY_S)}


def test_a_worker_in_a_debugger_needs_no_heartbeats(tmp_path: Path) -> None:
    async def story(scenario: Scenario) -> None:
        worker = scenario.server.unit.workers[await scenario.attach_ready()]
        own_pid = worker.pid
        with debugged_process() as worker.pid:
            await asyncio.sleep(100 * MAX_SILENT_CHECKS * BEAT_EVERY_S)
            assert scenario.fence.killed_at_s == {}
        worker.pid = own_pid
        await asyncio.sleep(2 * MAX_SILENT_CHECKS * BEAT_EVERY_S)

    assert list(play(tmp_path / "a.sock", story).fence.killed_at_s) == [0], "without the debugger it is killed"


def test_a_worker_with_a_heartbeat_in_every_tenth_check_is_not_killed(tmp_path: Path) -> None:
    async def story(scenario: Scenario) -> None:
        worker = await scenario.attach_ready()
        for _ in range(20):
            await asyncio.sleep(10 * BEAT_EVERY_S)
            scenario.server.grants.page.add(scenario.server.attach.slot_of(worker), Word.HEARTBEATS, 1)

    assert play(tmp_path / "a.sock", story).fence.killed_at_s == {}


@pytest.mark.parametrize(("longest_s", "kill_s", "late_s"), [(10, 60, 2 * BEAT_EVERY_S), (1, 4, BEAT_EVERY_S)])
def test_a_hung_worker_is_revoked_and_killed_after_the_times_of_the_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, longest_s: float, kill_s: float, late_s: float
) -> None:
    revoked_at_s: list[float] = []

    async def story(scenario: Scenario) -> None:
        page, loop, slots = scenario.server.grants.page, asyncio.get_running_loop(), list[int]()
        for role in Role:
            name = await scenario.attach(role=role, model="m", address="")
            slots.append(scenario.server.attach.slot_of(name))
            page.write(slots[-1], Word.DEMAND, 1)
            scenario.server.grants.arbitrate()
        while not page.read(slots[1], Word.GRANTED_STEPS):
            await asyncio.sleep(0.1)
        revoked_at_s.append(loop.time())
        while loop.time() < 100:
            page.add(slots[1], Word.BUSY_NS, 1)
            await asyncio.sleep(1)
        assert list(scenario.server.unit.workers) == [name]

    arbiter = ArbiterConfig(longest_grant_s=longest_s, kill_after_s=kill_s)
    killed_at_s = play(tmp_path / "a.sock", story, arbiter).fence.killed_at_s
    assert longest_s <= revoked_at_s[0] <= longest_s + late_s
    assert list(killed_at_s) == [0]
    assert kill_s <= killed_at_s[0] <= kill_s + late_s
    assert "prefill-m#1 has not returned its recalled grant: revoked" in caplog.text
    assert "prefill-m#1 hangs in a step: killed" in caplog.text


@pytest.mark.parametrize("follows_the_first", [False, True])
def test_a_worker_that_hangs_while_it_wakes_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, follows_the_first: bool
) -> None:
    told_at_s: list[float] = []

    async def story(scenario: Scenario) -> None:
        worker = scenario.server.unit.workers[await scenario.attach()]
        for engine in (EngineState.ASLEEP, EngineState.AWAKE):
            worker.tell(engine)
            told_at_s.append(asyncio.get_running_loop().time())
            scenario.server.attach.tell(WorkerCommand(worker.name, worker.told, worker.num_told))
            if follows_the_first and engine is EngineState.ASLEEP:
                scenario.connections[-1].send(b'{"done": 1}')
            await asyncio.sleep(200)
        await asyncio.sleep(1000)
        assert scenario.server.unit.workers == {}

    (killed_at_s,) = play(tmp_path / "a.sock", story).fence.killed_at_s.values()
    waited_s = killed_at_s - told_at_s[1]
    assert 0 <= waited_s - MAX_UNANSWERED_CHECKS * BEAT_EVERY_S <= 2 * BEAT_EVERY_S
    assert "decode-m#1 was told to be awake 300 s ago and is not: killed" in caplog.text


def test_a_worker_that_follows_its_commands_in_time_is_not_killed(tmp_path: Path) -> None:
    async def story(scenario: Scenario) -> None:
        worker = scenario.server.unit.workers[await scenario.attach()]
        for number in range(1, 5):
            worker.tell(EngineState.ASLEEP if number % 2 else EngineState.AWAKE)
            await asyncio.sleep((MAX_UNANSWERED_CHECKS - 2) * BEAT_EVERY_S)
            scenario.connections[-1].send(b'{"done": %d}' % number)
            await asyncio.sleep(1000 * (number % 2))

    assert play(tmp_path / "a.sock", story).fence.killed_at_s == {}


@pytest.mark.parametrize("fault", ["no heartbeats", "hangs in a step"])
def test_a_worker_that_was_killed_and_has_not_exited_gets_no_request(tmp_path: Path, fault: str) -> None:
    async def story(scenario: Scenario) -> None:
        scenario.fence.survives_kill = True
        name = await scenario.attach_ready()
        page, slot = scenario.server.grants.page, scenario.server.attach.slot_of(name)
        if fault == "hangs in a step":
            page.write(slot, Word.DEMAND, 1)
            scenario.server.grants.arbitrate()
        while not scenario.fence.killed_at_s:
            page.add(slot, Word.HEARTBEATS, int(fault == "hangs in a step"))
            scenario.server.changes.clear()
            await asyncio.sleep(BEAT_EVERY_S)
        assert not scenario.server.unit.workers[name].ready
        assert scenario.server.changes.is_set(), "the unit schedules without it"
        page.write(slot, Word.DEMAND, 1)
        page.write(slot, Word.GRANTED_STEPS, 0)
        scenario.server.grants.arbitrate()
        assert not page.read(slot, Word.GRANTED_STEPS), "it gets no grant"

    play(tmp_path / "a.sock", story)


def test_a_worker_that_is_not_ready_needs_no_heartbeats(tmp_path: Path) -> None:
    async def story(scenario: Scenario) -> None:
        worker = await scenario.attach()
        await asyncio.sleep(1000)
        assert worker in scenario.server.unit.workers

    assert play(tmp_path / "a.sock", story).fence.killed_at_s == {}


def test_a_worker_that_detaches_and_does_not_exit_is_killed(tmp_path: Path) -> None:
    async def story(scenario: Scenario) -> None:
        worker = await scenario.attach_ready()
        scenario.connections[0].close()
        await scenario.server.until_ready(0)
        assert worker in scenario.server.unit.workers, "its leases remain while it can write"
        await asyncio.sleep(4.9)
        assert scenario.fence.killed_at_s == {}
        await asyncio.sleep(0.2)
        assert scenario.server.unit.workers == {}

    assert play(tmp_path / "a.sock", story).fence.killed_at_s == {0: pytest.approx(5.0)}


def test_a_worker_that_detaches_and_exits_is_not_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def story(scenario: Scenario) -> None:
        await scenario.attach_ready()
        scenario.connections[0].close()
        await asyncio.sleep(3)
        scenario.fence.exit(0)
        await scenario.server.until_attached(0)
        await asyncio.sleep(60)

    assert play(tmp_path / "a.sock", story).fence.killed_at_s == {}
    assert "killed" not in caplog.text


def test_a_lost_worker_takes_no_further_writer(tmp_path: Path) -> None:
    async def story(scenario: Scenario) -> None:
        worker = await scenario.attach()
        await scenario.attach(writer_for=worker)
        scenario.fence.survives_kill = True
        scenario.fence.exit(0)
        while scenario.server.attach._attachments[worker].is_owner_alive:
            await asyncio.sleep(0)
        with pytest.raises(KeyError, match="worker"):
            await scenario.attach(writer_for=worker)
        assert worker in scenario.server.unit.workers, "its writer has not exited"
        scenario.fence.exit(1)
        await scenario.server.until_attached(0)

    play(tmp_path / "a.sock", story)


def test_a_worker_that_was_killed_and_has_not_exited_is_not_ready_again(tmp_path: Path) -> None:
    """Under MPS an end may take seconds."""

    async def story(scenario: Scenario) -> None:
        worker = await scenario.attach_ready()
        scenario.fence.survives_kill = True
        scenario.server.attach.end_group("of a reason", device_has_failed=False)
        scenario.connections[0].send(b'{"ready": true}')
        await asyncio.sleep(1)
        assert not scenario.server.unit.workers[worker].ready

    play(tmp_path / "a.sock", story)


def test_after_a_failure_of_the_device_no_worker_attaches_before_the_last_one_has_exited(tmp_path: Path) -> None:
    """None of them may be filling the weights when they are forgotten."""

    async def story(scenario: Scenario) -> None:
        for _ in range(2):
            await scenario.attach()
        scenario.fence.survives_kill = True
        server = scenario.server
        server.attach.end_group("of a reason", device_has_failed=True)
        scenario.fence.exit(0)
        await server.until_attached(1)
        with pytest.raises(ConnectionResetError):  # no refusal: a worker tries again
            await scenario.attach()
        assert isinstance(server.memory, Memory) and server.memory.num_forgotten == 0
        scenario.fence.exit(1)
        await server.until_attached(0)
        assert server.memory.num_forgotten == 1
        await scenario.attach()

    play(tmp_path / "a.sock", story)


def test_weights_are_forgotten_even_if_no_worker_is_left_when_the_failure_is_found(tmp_path: Path) -> None:
    async def story(scenario: Scenario) -> None:
        scenario.server.attach.end_group("of a reason", device_has_failed=True)
        assert isinstance(scenario.server.memory, Memory) and scenario.server.memory.num_forgotten == 1
        await scenario.attach()

    play(tmp_path / "a.sock", story)
