import asyncio
import logging
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from muxmesh.lifecycle import Stop


async def test_a_service_that_serves_ends_by_itself() -> None:
    stop, ended = Stop(), asyncio.Event()

    async def serve(stop: Stop) -> None:
        await stop.wait()
        ended.set()

    running = asyncio.create_task(stop.run(serve))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    stop.set()
    assert await running is True
    assert ended.is_set()


async def test_a_service_that_is_still_starting_is_cancelled() -> None:
    stop = Stop()

    async def serve(stop: Stop) -> None:
        await asyncio.Event().wait()

    running = asyncio.create_task(stop.run(serve))
    await asyncio.sleep(0)
    stop.set()
    assert await running is False


async def test_a_service_that_does_not_end_tells_what_it_waits_for() -> None:
    stop, told, lines = Stop(slow_end_s=0.0), asyncio.Event(), []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.extend(record.getMessage().splitlines())
            told.set()

    async def inner() -> None:
        await told.wait()

    async def serve(stop: Stop) -> None:
        await stop.wait()
        await inner()

    listener = Listener()
    logging.getLogger("muxmesh.lifecycle").addHandler(listener)
    try:
        running = asyncio.create_task(stop.run(serve))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        stop.set()
        async with asyncio.timeout(30):
            assert await running is True
    finally:
        logging.getLogger("muxmesh.lifecycle").removeHandler(listener)
    assert any(line.count("test_lifecycle.py:") == 2 for line in lines)


async def test_an_error_of_the_service_is_raised() -> None:
    async def serve(stop: Stop) -> None:
        raise LookupError("no such unit")

    with pytest.raises(LookupError, match="no such unit"):
        await Stop().run(serve)


def test_a_guarded_program_dies_with_its_parent(tmp_path: Path) -> None:
    """The parent starts a guarded child, tells its pid and is killed."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, subprocess, sys, time\n"
            "child = subprocess.Popen([sys.executable, '-m', 'muxmesh.supervisor.exec_with_parent', str(os.getpid()),"
            " sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(600)'], stdout=subprocess.PIPE)\n"
            "child.stdout.readline()\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    pidfd = os.pidfd_open(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    readable, _, _ = select.select([pidfd], [], [], 20)
    os.close(pidfd)
    assert readable, "the child outlived its parent"
