"""The contract of `Fence`, with child processes."""

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest

from kvstore.fence import Fence, HostFence

FENCES: dict[str, Callable[[], Fence]] = {"host": HostFence}


@pytest.fixture(params=FENCES)
def fence(request: pytest.FixtureRequest) -> Fence:
    return FENCES[request.param]()


@contextlib.contextmanager
def watched_child(fence: Fence, *command: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A child process, by default one that runs until it is killed, and the fence's file descriptor for it."""
    with subprocess.Popen(command or ("sleep", "1000"), stdin=subprocess.PIPE) as child:
        watch_fd = fence.watch(child.pid)
        try:
            yield child, watch_fd
        finally:
            child.kill()
            os.close(watch_fd)


def has_exited(watch_fd: int, timeout_s: float) -> bool:
    readable, _, _ = select.select([watch_fd], [], [], timeout_s)
    return bool(readable)


def test_a_running_process_is_not_reported(fence: Fence) -> None:
    with watched_child(fence) as (_, watch_fd):
        assert not has_exited(watch_fd, timeout_s=0)


def test_a_killed_process_is_reported(fence: Fence) -> None:
    with watched_child(fence) as (child, watch_fd):
        fence.kill(watch_fd)
        assert has_exited(watch_fd, timeout_s=20)
        assert child.wait() == -signal.SIGKILL


def test_a_stopped_process_is_killed_too(fence: Fence) -> None:
    with watched_child(fence) as (child, watch_fd):
        child.send_signal(signal.SIGSTOP)
        fence.kill(watch_fd)
        assert has_exited(watch_fd, timeout_s=20)


def test_a_process_that_exits_by_itself_is_reported_before_it_is_reaped(fence: Fence) -> None:
    with watched_child(fence, "cat") as (child, watch_fd):
        assert child.stdin is not None
        child.stdin.close()
        assert has_exited(watch_fd, timeout_s=20)
        assert child.wait() == 0


def test_a_process_that_has_exited_can_be_killed_without_effect(fence: Fence) -> None:
    with watched_child(fence, "true") as (child, watch_fd):
        child.wait()
        fence.kill(watch_fd)
        assert has_exited(watch_fd, timeout_s=0)


def test_each_watch_of_one_process_reports_its_exit(fence: Fence) -> None:
    with watched_child(fence) as (child, first):
        second = fence.watch(child.pid)
        fence.kill(first)
        assert has_exited(first, timeout_s=20) and has_exited(second, timeout_s=20)
        os.close(second)


def test_a_process_that_does_not_exist_cannot_be_watched(fence: Fence) -> None:
    with subprocess.Popen(["true"]) as child:
        child.wait()
        with pytest.raises(ProcessLookupError):
            fence.watch(child.pid)
