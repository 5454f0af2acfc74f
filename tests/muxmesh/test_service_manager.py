import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

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
        manager.tell("")
        manager.tell("the unit is lost")
        manager.stopping()
        found = [listener.recv(1000) for _ in range(3)]
    assert found == [b"READY=1\nSTATUS=ready", b"STATUS=not ready: the unit is lost", b"STOPPING=1\nSTATUS=stopping"]
    assert environment == {"HOME": "/"}, "children send nothing"


def test_without_a_service_manager_nothing_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager({}).tell("")
    assert caplog.records == []


def test_a_socket_that_is_gone_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "none")}).tell("")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("the service manager cannot be told 'READY=1': ")
