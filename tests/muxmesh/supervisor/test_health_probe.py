"""Health of a service, with real servers."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxmesh.rpc.server import MeshServer
from muxmesh.supervisor.health_probe import HealthProbe, wait_until_serving


@pytest.fixture
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path that is short enough for sockets."""
    return tmp_path_factory.mktemp("s")


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Ends the stream of each watcher after one status: NOT_SERVING twice, then SERVING."""

    def __init__(self) -> None:
        self.num_watches = 0

    async def Check(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def Watch(self, request: Any, context: Any) -> Any:
        self.num_watches += 1
        status = health_pb2.HealthCheckResponse
        yield status(status=status.SERVING if self.num_watches == 3 else status.NOT_SERVING)


async def test_waiting_for_a_service_continues_until_it_is_serving(state_dir: Path) -> None:
    address, health = f"unix:{state_dir / 's.sock'}", Health()
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    server.add_insecure_port(address)
    await server.start()
    async with asyncio.timeout(20):
        await wait_until_serving(address)
    assert health.num_watches == 3
    await server.stop(0)


async def test_waiting_for_a_service_starts_before_its_server(state_dir: Path) -> None:
    address, server = f"unix:{state_dir / 's.sock'}", MeshServer({})
    waiting = asyncio.create_task(wait_until_serving(address))
    async with asyncio.timeout(20):
        await asyncio.sleep(0)  # the watch begins
        await server.start([address])
        await server.set_serving()
        await waiting
    await server.stop(0)


async def test_a_service_responds_whether_it_serves_or_not(state_dir: Path) -> None:
    address, server = f"unix:{state_dir / 's.sock'}", MeshServer({})
    probe = HealthProbe(address)
    async with asyncio.timeout(20):
        assert await probe.ask() is False, "nothing listens yet"
        await server.start([address])
        while not await probe.ask():
            await asyncio.sleep(0.01)
        await server.set_serving()
        assert await probe.ask() is True
        await server.stop(0)
        assert await probe.ask() is False
    await probe.close()


async def test_a_process_that_listens_and_says_nothing_does_not_respond(state_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(state_dir / "s.sock"))
        silent.listen()
        probe = HealthProbe(f"unix:{state_dir / 's.sock'}")
        async with asyncio.timeout(60):
            assert await probe.ask() is False
        await probe.close()


async def test_a_service_whose_socket_is_deleted_does_not_respond(state_dir: Path) -> None:
    path, server = state_dir / "s.sock", MeshServer({})
    probe = HealthProbe(f"unix:{path}")
    async with asyncio.timeout(20):
        await server.start([f"unix:{path}"])
        assert await probe.ask() is True
        path.unlink()
        assert await probe.ask() is False
        await server.stop(0)
    await probe.close()
