"""What the attach server has of a worker: how silent it is, and what is closed and cancelled at its end."""

import asyncio
import os
import socket

import pytest

from kvstore.attachment_record import AttachmentRecord
from kvstore.progress_page import ProgressPage, new_progress_fd
from kvstore.worker_slots import EngineState, WorkerRecord
from muxmesh.types import Role
from tests.support.debugged_process import debugged_process


def record_of(pid: int | None = None, ready: bool = True) -> AttachmentRecord:
    """The attachment of a worker. ``pid``: None for a process that runs."""
    progress_fd = new_progress_fd(1, 1)
    progress = ProgressPage(progress_fd, 1, 1)
    os.close(progress_fd)
    worker = WorkerRecord("w", Role.DECODE, "m", "", os.getpid() if pid is None else pid, ready=ready)
    return AttachmentRecord(worker, 0, progress)


def test_checks_without_a_new_heartbeat_are_counted() -> None:
    record = record_of()
    assert [record.count_silent_checks(beat) for beat in (0, 0, 0, 1, 1)] == [0, 1, 2, 0, 1]


def test_checks_do_not_count_while_the_worker_is_not_ready() -> None:
    record = record_of(ready=False)
    assert [record.count_silent_checks(0) for _ in range(3)] == [0, 0, 0]
    record.worker.ready = True
    assert record.count_silent_checks(0) == 1
    record.worker.ready = False
    assert record.count_silent_checks(0) == 0


def test_checks_do_not_count_while_a_debugger_is_attached() -> None:
    with debugged_process() as pid:
        record = record_of(pid)
        assert [record.count_silent_checks(0) for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(("is_debugged", "counts"), [(False, [0, 1, 2]), (True, [0, 0, 0])])
def test_checks_of_a_command_that_is_not_followed_count_unless_a_debugger_is_attached(
    is_debugged: bool, counts: list[int]
) -> None:
    with debugged_process() as pid:
        record = record_of(pid if is_debugged else None)
        record.worker.tell(EngineState.ASLEEP)
        assert [record.count_unanswered_checks() for _ in range(3)] == counts


async def test_a_process_that_is_removed_is_not_watched_and_nothing_of_it_stays_open() -> None:
    record, loop = record_of(), asyncio.get_running_loop()
    connection, peer = socket.socketpair()
    watch_fd, write_fd = os.pipe()
    fds = (watch_fd, connection.fileno())
    record.processes[watch_fd] = connection
    for fd in fds:
        loop.add_reader(fd, print)
    record.remove_process(watch_fd)
    assert record.processes == {}
    for fd in fds:
        assert not loop.remove_reader(fd), "the event loop does not watch it any more"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    assert peer.recv(1) == b"", "the process at the other end sees the end"
    peer.close()
    os.close(write_fd)


async def test_what_would_happen_to_the_worker_later_is_cancelled() -> None:
    async def check() -> None:
        await asyncio.Event().wait()

    record = record_of()
    record.cancel_all()  # with nothing to cancel
    record.kill_timer = asyncio.get_running_loop().call_later(3600, print)
    record.proof = asyncio.create_task(check())
    record.cancel_all()
    assert record.kill_timer.cancelled()
    with pytest.raises(asyncio.CancelledError):
        await record.proof
