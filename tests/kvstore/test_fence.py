"""The contract of `Fence`, with child processes. Under MPS they are clients of a daemon of the fake control program."""

import asyncio
import os
import select
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager

import pytest

from kvstore.fence import Fence, HostFence
from kvstore.mps_fence import MpsFence
from muxmesh.background_task import background
from muxmesh.clock import SystemClock
from tests.support.mps import FakeDaemon, fake_daemon

Child = subprocess.Popen[bytes]
StartChild = Callable[..., AbstractContextManager[Child]]


def fail(reason: str, *_: object) -> None:
    raise AssertionError(reason)


@contextmanager
def child_process(*command: str) -> Iterator[Child]:
    """A child process, by default one that runs until it is killed."""
    with subprocess.Popen(command or ("sleep", "1000"), stdin=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


class Fences:
    """A fence, and how its processes are started."""

    def __init__(self, fence: Fence, start: StartChild) -> None:
        self.fence = fence
        self._start = start

    @contextmanager
    def watched_child(self, *command: str) -> Iterator[tuple[Child, int]]:
        """A child process and the fence's file descriptor for it."""
        with (self._start if not command else child_process)(*command) as child:
            watch_fd = self.fence.watch(child.pid)
            try:
                yield child, watch_fd
            finally:
                os.close(watch_fd)


@asynccontextmanager
async def mps_fence(daemon: FakeDaemon) -> AsyncIterator[MpsFence]:
    fence = MpsFence(daemon.control, SystemClock(), fail, fail, release_within_s=60)
    async with background(fence.run(), "fence", fail):
        yield fence
    fence.close()


@pytest.fixture(params=["host", "mps"])
async def fences(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fences]:
    if request.param == "host":
        yield Fences(HostFence(), child_process)
        return
    with fake_daemon(tmp_path_factory.mktemp("m")) as daemon:
        async with mps_fence(daemon) as fence:
            yield Fences(fence, daemon.client)


def has_exited(watch_fd: int) -> bool:
    return bool(select.select([watch_fd], [], [], 0)[0])


async def until_exited(*watch_fds: int) -> None:
    async with asyncio.timeout(20):
        while not all(map(has_exited, watch_fds)):
            await asyncio.sleep(0)


async def test_a_running_process_is_not_reported(fences: Fences) -> None:
    with fences.watched_child() as (_, watch_fd):
        assert not has_exited(watch_fd)


async def test_a_killed_process_is_reported(fences: Fences) -> None:
    with fences.watched_child() as (child, watch_fd):
        fences.fence.kill(watch_fd)
        await until_exited(watch_fd)
        assert child.wait() == -signal.SIGKILL


async def test_a_process_can_be_killed_twice(fences: Fences) -> None:
    with fences.watched_child() as (_, watch_fd):
        fences.fence.kill(watch_fd)
        fences.fence.kill(watch_fd)
        await until_exited(watch_fd)


async def test_a_stopped_process_is_killed_too(fences: Fences) -> None:
    with fences.watched_child() as (child, watch_fd):
        child.send_signal(signal.SIGSTOP)
        fences.fence.kill(watch_fd)
        await until_exited(watch_fd)


async def test_a_process_that_exits_by_itself_is_reported_before_it_is_reaped(fences: Fences) -> None:
    with fences.watched_child("cat") as (child, watch_fd):
        assert child.stdin is not None
        child.stdin.close()
        await until_exited(watch_fd)
        assert child.wait() == 0


async def test_a_process_that_has_exited_can_be_killed_without_effect(fences: Fences) -> None:
    with fences.watched_child("true") as (child, watch_fd):
        child.wait()
        fences.fence.kill(watch_fd)
        await until_exited(watch_fd)


async def test_each_watch_of_one_process_reports_its_exit(fences: Fences) -> None:
    with fences.watched_child() as (child, first):
        second = fences.fence.watch(child.pid)
        fences.fence.kill(first)
        await until_exited(first, second)
        os.close(second)


async def test_a_watch_that_is_closed_early_does_not_disturb_the_next_one(fences: Fences) -> None:
    """The next one may have the same number."""
    with fences.watched_child() as (first, _):
        os.close(fences.fence.watch(first.pid))
        with fences.watched_child() as (second, watch_fd):
            first.kill()
            first.wait()
            assert not has_exited(watch_fd)
            fences.fence.kill(watch_fd)
            await until_exited(watch_fd)
            assert second.wait() == -signal.SIGKILL


async def test_a_process_that_does_not_exist_cannot_be_watched(fences: Fences) -> None:
    with subprocess.Popen(["true"]) as child:
        child.wait()
        with pytest.raises(ProcessLookupError):
            fences.fence.watch(child.pid)
