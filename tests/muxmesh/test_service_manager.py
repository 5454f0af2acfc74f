import asyncio
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from muxmesh.background_task import background
from muxmesh.service_manager import ServiceManager


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(20)
        yield listener


@pytest.mark.parametrize("is_abstract", [False, True])
def test_each_change_is_a_message(tmp_path: Path, is_abstract: bool) -> None:
    path = str(tmp_path / "notify")
    environment = {"NOTIFY_SOCKET": f"@{path}" if is_abstract else path, "HOME": "/"}
    with listening(f"\0{path}" if is_abstract else path) as listener:
        manager = ServiceManager(environment)
        manager.report("")
        manager.report("the unit is lost")
        manager.stopping()
        found = [listener.recv(1000) for _ in range(3)]
    assert found == [b"READY=1\nSTATUS=ready", b"STATUS=not ready: the unit is lost", b"STOPPING=1\nSTATUS=stopping"]
    assert environment == {"HOME": "/"}, "children send nothing"


def test_without_a_service_manager_nothing_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager({}).report("")
    assert caplog.records == []


def test_a_socket_that_is_gone_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "none")}).report("")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("the service manager did not get 'READY=1': ")


@pytest.mark.parametrize(
    ("watchdog_us", "pid", "is_watched"), [("3000", "", True), ("3000", "1", False), ("", "", False)]
)
async def test_a_watched_process_reports_that_its_event_loop_runs(
    tmp_path: Path, watchdog_us: str, pid: str, is_watched: bool
) -> None:
    path = str(tmp_path / "notify")
    environment = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": watchdog_us, "WATCHDOG_PID": pid or str(os.getpid())}
    with listening(path) as listener:
        listener.setblocking(False)
        manager = ServiceManager(environment)
        async with background(manager.keep_alive(), "watchdog"), asyncio.timeout(20):
            if is_watched:
                loop = asyncio.get_running_loop()
                assert [await loop.sock_recv(listener, 100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            else:
                await manager.keep_alive()
                with pytest.raises(BlockingIOError):
                    listener.recv(100)
    assert environment == {}
