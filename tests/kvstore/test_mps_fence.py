"""The fence under MPS, with clients of a daemon that fails in every way of the fake control program."""

import asyncio
import contextlib
import os
import resource
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from kvstore.mps_fence import MpsFence
from muxmesh.background_task import background
from muxmesh.clock import SystemClock
from muxmesh.errors import Unavailable
from tests.kvstore.test_fence import Child, fail, has_exited, until_exited
from tests.support.mps import FakeDaemon, fake_daemon


class Group:
    """What a fence has reported of its group."""

    def __init__(self) -> None:
        self.ended: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()
        self.given_up: asyncio.Queue[str] = asyncio.Queue()

    def end(self, reason: str, device_has_failed: bool) -> None:
        self.ended.put_nowait((reason, device_has_failed))

    async def next_end(self) -> tuple[str, bool]:
        async with asyncio.timeout(20):
            return await self.ended.get()

    async def next_give_up(self) -> str:
        async with asyncio.timeout(20):
            return await self.given_up.get()


@pytest.fixture
def answer_within_s() -> float:
    return 60


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory, answer_within_s: float) -> Iterator[FakeDaemon]:
    with fake_daemon(tmp_path_factory.mktemp("m"), answer_within_s) as daemon:
        yield daemon


@asynccontextmanager
async def running_fence(
    daemon: FakeDaemon, group: Group, release_within_s: float = 0.1, poll_every_s: float = 0.02
) -> AsyncIterator[MpsFence]:
    """A fence that polls often. A client is overdue soon after its exit."""
    fence = MpsFence(
        daemon.control, SystemClock(), group.end, group.given_up.put_nowait, release_within_s, poll_every_s, 60
    )
    async with background(fence.run(), "fence", fail):
        yield fence
    fence.close()


async def until_listed(fence: MpsFence, pid: int) -> None:
    async with asyncio.timeout(20):
        is_listed = False
        while not is_listed:
            with contextlib.suppress(Unavailable):  # the time limit of a question may be short
                is_listed = await fence.is_client(pid)


@asynccontextmanager
async def fenced_client(daemon: FakeDaemon, group: Group, **times: float) -> AsyncIterator[tuple[MpsFence, Child, int]]:
    """A fence, a client that the daemon lists, and the fence's file descriptor for it. See `running_fence`."""
    async with running_fence(daemon, group, **times) as fence:
        with daemon.client() as client:
            watch_fd = fence.watch(client.pid)
            await until_listed(fence, client.pid)
            yield fence, client, watch_fd
            os.close(watch_fd)


async def test_the_daemon_terminates_a_client_before_it_is_killed(daemon: FakeDaemon) -> None:
    async with running_fence(daemon, Group(), release_within_s=60) as fence:
        with daemon.client() as client, daemon.client() as neighbour:
            watch_fd = fence.watch(client.pid)
            fence.kill(watch_fd)
            await until_exited(watch_fd)
            assert client.wait() == -signal.SIGKILL
            assert f"TERMINATED {client.pid}" in daemon.log
            assert neighbour.poll() is None
            os.close(watch_fd)


async def test_a_client_that_has_exited_is_not_reported_while_the_daemon_lists_it(daemon: FakeDaemon) -> None:
    group = Group()
    async with fenced_client(daemon, group) as (_, client, watch_fd):
        daemon.fail("keeps_clients")
        client.kill()
        client.wait()
        reason, device_has_failed = await group.next_end()
        assert reason == f"exited and not released in time: process {client.pid}: the MPS daemon still lists it"
        assert not device_has_failed
        assert await group.next_give_up() == reason
        assert not has_exited(watch_fd)
        daemon.recover("keeps_clients")
        with daemon.client():  # the fake daemon forgets the dead when a connection ends
            pass
        await until_exited(watch_fd)


@pytest.mark.parametrize(("how", "answer_within_s"), [("silent", 1.0), ("nonsense", 60)])
async def test_a_client_is_in_quarantine_while_the_daemon_does_not_answer(daemon: FakeDaemon, how: str) -> None:
    group = Group()
    async with fenced_client(daemon, group) as (fence, client, watch_fd):
        daemon.fail(how)
        fence.kill(watch_fd)
        reason, device_has_failed = await group.next_end()
        assert reason.startswith(f"exited and not released in time: process {client.pid}: the MPS daemon")
        assert not device_has_failed
        await group.next_give_up()
        assert client.wait() == -signal.SIGKILL
        assert not has_exited(watch_fd)
        daemon.recover(how)
        await until_exited(watch_fd)


async def test_a_fault_ends_the_group_once(daemon: FakeDaemon) -> None:
    group = Group()
    async with fenced_client(daemon, group, release_within_s=60) as (fence, _, watch_fd):
        assert group.ended.empty()
        daemon.fail("fault")
        reason, device_has_failed = await group.next_end()
        assert reason.endswith("is in FAULT: the work of all its clients has failed")
        assert device_has_failed
        fence.kill(watch_fd)
        await until_exited(watch_fd)
        assert group.ended.empty() and group.given_up.empty()


async def test_a_fault_is_found_at_once_when_a_process_announces_its_end(daemon: FakeDaemon) -> None:
    """It would be over before the next regular question."""
    group = Group()
    async with fenced_client(daemon, group, release_within_s=60, poll_every_s=3600) as (fence, _, _):
        daemon.fail("fault")
        fence.expect_exit()
        reason, device_has_failed = await group.next_end()
        assert "is in FAULT" in reason and device_has_failed


async def test_a_daemon_that_is_killed_and_started_again_ends_the_group(daemon: FakeDaemon) -> None:
    """Its server lives on without it: a client of that server is released only when the server has exited."""
    group = Group()
    async with fenced_client(daemon, group) as (fence, client, watch_fd):
        (server,) = await daemon.control.servers()
        daemon.process.kill()
        daemon.process.wait()
        with fake_daemon(daemon.pipe_dir.parent):
            reason, device_has_failed = await group.next_end()
            assert reason == f"MPS server {server.pid} is gone: its daemon has restarted or stopped it"
            assert device_has_failed
            fence.kill(watch_fd)
            assert await asyncio.to_thread(client.wait) == -signal.SIGKILL
            assert "not released in time" in (await group.next_end())[0]
            assert not has_exited(watch_fd)
            os.kill(server.pid, signal.SIGKILL)
            await until_exited(watch_fd)


async def test_the_end_of_the_fence_leaves_processes_alone(daemon: FakeDaemon) -> None:
    async with running_fence(daemon, Group(), release_within_s=60) as fence:
        with daemon.client() as client:
            watch_fd = fence.watch(client.pid)
            fence.close()
            assert has_exited(watch_fd)
            assert client.poll() is None
            os.close(watch_fd)


async def test_a_process_that_is_being_terminated_is_killed_at_the_end_of_the_fence(daemon: FakeDaemon) -> None:
    daemon.fail("silent")
    async with running_fence(daemon, Group(), release_within_s=60) as fence:
        daemon.recover("silent")
        with daemon.client() as client:
            watch_fd = fence.watch(client.pid)
            daemon.fail("silent")
            fence.kill(watch_fd)
            fence.close()
            assert client.wait() == -signal.SIGKILL
            os.close(watch_fd)


async def test_a_process_that_cannot_be_watched_leaves_no_open_file(daemon: FakeDaemon) -> None:
    fence = MpsFence(daemon.control, SystemClock(), Group().end, fail)
    before = set(os.listdir("/proc/self/fd"))
    lowest = os.dup(0)
    os.close(lowest)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            fence.watch(os.getpid())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(os.listdir("/proc/self/fd")) == before


async def test_the_fence_leaves_no_open_files(daemon: FakeDaemon) -> None:
    before = set(os.listdir("/proc/self/fd"))
    async with running_fence(daemon, Group(), release_within_s=60) as fence:
        for _ in range(2):
            with daemon.client() as client:
                watch_fd = fence.watch(client.pid)
                fence.kill(watch_fd)
                await until_exited(watch_fd)
                os.close(watch_fd)
    assert set(os.listdir("/proc/self/fd")) == before
