from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from router.daemon_thread import DaemonThread


@pytest.fixture
def thread() -> Iterator[DaemonThread]:
    thread = DaemonThread("test thread")
    yield thread
    thread.close()


def test_functions_run_in_the_order_in_which_they_were_submitted(thread: DaemonThread) -> None:
    done: list[int] = []
    futures = [thread.submit(lambda number=number: done.append(number)) for number in range(50)]  # type: ignore[misc]
    futures[-1].result(20)
    assert done == list(range(50))


def test_functions_run_in_one_daemon_thread_of_the_given_name(thread: DaemonThread) -> None:
    first, second = (thread.submit(threading.current_thread).result(20) for _ in range(2))
    assert first is second and first is not threading.current_thread()
    assert first.daemon and first.name == "test thread"


@pytest.mark.parametrize("error", [ValueError("bad"), MemoryError(), SystemExit(3)])
def test_an_error_reaches_the_future_and_does_not_end_the_thread(thread: DaemonThread, error: BaseException) -> None:
    def fail() -> None:
        raise error

    assert thread.submit(fail).exception(20) is error
    assert thread.submit(lambda: 5).result(20) == 5


def test_a_future_that_its_owner_cancels_is_skipped(thread: DaemonThread) -> None:
    release, done = threading.Event(), list[str]()
    thread.submit(lambda: release.wait(20))
    skipped, kept = (thread.submit(lambda name=name: done.append(name)) for name in ("skipped", "kept"))  # type: ignore[misc]
    assert skipped.cancel()
    release.set()
    kept.result(20)
    assert done == ["kept"]


def test_close_cancels_what_has_not_started_and_lets_the_running_function_finish(thread: DaemonThread) -> None:
    release, started = threading.Event(), threading.Event()

    def run() -> str:
        started.set()
        release.wait(20)
        return "finished"

    running, pending = thread.submit(run), thread.submit(lambda: "never")
    assert started.wait(20)
    thread.close()
    with pytest.raises(CancelledError):
        pending.result(20)
    release.set()
    assert running.result(20) == "finished"


def test_a_closed_thread_cancels_further_functions_at_once() -> None:
    thread = DaemonThread("closed")
    thread.close()
    assert thread.submit(lambda: 1).cancelled()
    thread.close()


def test_close_ends_an_idle_thread() -> None:
    thread = DaemonThread("idle")
    running = thread.submit(threading.current_thread).result(20)
    thread.close()
    running.join(20)
    assert not running.is_alive()
