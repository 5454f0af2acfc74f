"""How a client connects: when, for how long, on which event loop, and what it says if it cannot."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import grpc
import pytest

from muxmesh.client import NO_RETRIES, MeshClient
from muxmesh.errors import DeadlineExceeded, InvalidRequest, RequestAborted, Unavailable
from tests.support.fake_mesh import FakeMesh, fake_mesh, fake_mesh_in_thread

REMEDY = "start one with `muxmesh up`, or set another address"


@contextmanager
def listener(serve: Callable[[socket.socket], None] | None = None) -> Iterator[str]:
    """The address of a server that lets clients connect and calls ``serve`` with each connection, or sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    serve(connection) if serve else None

        thread = Thread(target=accept)
        if serve is not None:
            thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            if serve is not None:
                thread.join()


async def error_at(address: str, call: Callable[[MeshClient], Awaitable[object]] = MeshClient.list_models) -> str:
    async with MeshClient(address, connect_timeout_s=0.05, retries=NO_RETRIES) as client:
        with pytest.raises(Unavailable) as caught:
            await call(client)
    return str(caught.value)


async def test_a_refused_connection_is_reported_with_the_address_and_the_remedy() -> None:
    expected = f"no mesh answers at 127.0.0.1:1 (Connection refused); {REMEDY}"
    assert await error_at("127.0.0.1:1") == expected
    assert await error_at("127.0.0.1:1", lambda client: client.generate("x", model="m")) == expected


async def test_a_host_that_does_not_respond_is_given_up_after_the_connect_timeout() -> None:
    with listener() as address:
        expected = f"no mesh answers at {address} (no connection in 0.05 s); {REMEDY}"
        assert await error_at(address) == expected
        assert await error_at(address, lambda client: client.generate("x", timeout_s=3600)) == expected


async def test_a_connection_that_is_not_there_before_the_deadline_is_a_passed_deadline() -> None:
    with listener() as address:
        async with MeshClient(address) as client:
            with pytest.raises(DeadlineExceeded, match=r"^the deadline passed before the call was complete$"):
                await client.generate("x", model="m", timeout_s=0.05)


async def test_a_server_of_another_protocol_is_no_mesh() -> None:
    def http1(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    with listener(http1) as address:
        assert "Trying to connect an http1.x server" in await error_at(address)


async def test_a_grpc_server_of_another_kind_is_no_mesh() -> None:
    server = grpc.aio.server()
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with MeshClient(address) as client:
            with pytest.raises(
                InvalidRequest, match=f"^address: {address} is no MuxMesh router, or of another version"
            ):
                await client.list_models()
    finally:
        await server.stop(None)


async def test_closing_the_client_ends_a_wait_for_a_connection() -> None:
    with listener() as address:
        client = MeshClient(address, connect_timeout_s=None)
        call = asyncio.create_task(client.list_models())
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(RequestAborted, match="the client is closed"):
            await call


async def test_cancelling_a_wait_for_a_connection_leaves_the_client_usable(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'mesh.sock'}"
    client = MeshClient(address)
    call = asyncio.create_task(client.list_models())
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with fake_mesh(tmp_path), client:
        assert (await client.generate("x", model="m")).text == "abc"


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[FakeMesh]:
    with fake_mesh_in_thread(tmp_path) as fake:
        yield fake


def test_a_client_made_before_any_event_loop_works_on_each_loop_after_it(mesh: FakeMesh) -> None:
    client = MeshClient(mesh.address)

    async def generate() -> str:
        return (await client.generate("x", model="m")).text

    assert [asyncio.run(generate()) for _ in range(3)] == ["abc"] * 3
    asyncio.run(client.close())
    asyncio.run(client.close())
    with pytest.raises(RequestAborted, match="the client is closed"):
        asyncio.run(generate())


def test_a_client_works_on_two_loops_at_once(mesh: FakeMesh) -> None:
    client = MeshClient(mesh.address)

    async def here_and_there() -> tuple[int, int]:
        here = await client.list_models()
        there = await asyncio.to_thread(asyncio.run, client.list_models())
        return len(here), len(there)

    assert asyncio.run(here_and_there()) == (1, 1)
    asyncio.run(client.close())


def test_the_connection_to_this_machine_goes_through_no_proxy() -> None:
    """A proxy of the environment, which gRPC reads when it connects, is at an address where nothing listens."""
    script = """
import asyncio
from muxmesh.client import NO_RETRIES, MeshClient
from tests.support.fake_mesh import fake_mesh
async def main():
    async with fake_mesh("127.0.0.1:0") as mesh, MeshClient(mesh.address, retries=NO_RETRIES) as client:
        print(len(await client.list_models()))
asyncio.run(main())
"""
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://127.0.0.1:1")
    assert run_script(script, **proxies) == "1\n"


def test_after_a_fork_with_a_connection_no_client_hangs(mesh: FakeMesh) -> None:
    script = f"""
import asyncio, os
from muxmesh.client import MeshClient, SyncMeshClient
from muxmesh.errors import RequestAborted
unused, sync, used = MeshClient("{mesh.address}"), SyncMeshClient("{mesh.address}"), MeshClient("{mesh.address}")
sync.list_models()
asyncio.run(used.list_models())
if os.fork() == 0:
    new = SyncMeshClient("{mesh.address}")
    for call in (sync.list_models, lambda: asyncio.run(used.list_models()), new.list_models):
        try:
            call()
        except RequestAborted as error:
            print(error, flush=True)
    sync.close()
    os._exit(0)
os.wait()
print(len(sync.list_models()))
"""
    refused = "a client was connected before this process was forked, after which gRPC does not work; fork before"
    assert [line[: len(refused)] for line in run_script(script).splitlines()] == [refused, refused, refused, "1"]


def test_a_fork_before_the_first_call_does_no_harm(mesh: FakeMesh) -> None:
    script = f"""
import os
from muxmesh.client import SyncMeshClient
unused = SyncMeshClient("{mesh.address}")
if os.fork() == 0:
    for client in (unused, SyncMeshClient("{mesh.address}")):
        print(len(client.list_models()), flush=True)
        client.close()
    os._exit(0)
os.wait()
"""
    assert run_script(script) == "1\n1\n"


def test_after_a_fork_a_client_is_refused_though_those_before_it_are_closed(mesh: FakeMesh) -> None:
    """gRPC keeps threads and connections that a fork does not copy: calls in the new process fail now and then."""
    script = f"""
import os
from muxmesh.client import SyncMeshClient
from muxmesh.errors import RequestAborted
with SyncMeshClient("{mesh.address}") as closed:
    closed.list_models()
if os.fork() == 0:
    try:
        SyncMeshClient("{mesh.address}").list_models()
    except RequestAborted as error:
        print("fork before the first call" in str(error), flush=True)
    os._exit(0)
os.wait()
"""
    assert run_script(script) == "True\n"


def test_a_client_that_is_never_closed_does_not_keep_the_program(mesh: FakeMesh) -> None:
    script = f"""
from muxmesh.client import SyncMeshClient
client = SyncMeshClient("{mesh.address}")
print(len(client.list_models()))
stream = client.stream("x", model="m")
print(next(stream).text)
"""
    assert run_script(script) == "1\na\n"


def run_script(script: str, **environment: str) -> str:
    """The output of a program that ends well and prints no errors. That it has threads and forks is no error here."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout
