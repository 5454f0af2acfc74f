"""`muxmesh health` against a server of the mesh, by address and by the name of a process."""

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from muxmesh.cli.main import main
from muxmesh.clock import SystemClock
from muxmesh.config.runtime import MeshRuntime
from muxmesh.config.schema import MeshConfig
from muxmesh.config.tls_config import TlsConfig
from muxmesh.rpc.server import MeshServer
from muxmesh.rpc.server_credentials import ReloadedCredentials
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from tests.support.tls import Authority


@pytest.fixture
def runtime_file(tmp_path: Path) -> Path:
    config = MeshConfig.model_validate({"units": [{"name": "u", "models": [{"name": "m", "engine": "sim"}]}]})
    runtime = MeshRuntime(config=config, run_dir=tmp_path, cache_dir=tmp_path, redis_url="unix:///x", prepared={})
    runtime.write(tmp_path / "runtime.json")
    return tmp_path / "runtime.json"


async def health(*arguments: str) -> tuple[int, str]:
    """Exit code and output of the command, in a process of its own."""
    command = (sys.executable, "-m", "muxmesh", "health", *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def test_a_service_is_healthy_once_it_serves(tmp_path: Path) -> None:
    addresses = [free_listen_address("127.0.0.1:0"), f"unix:{tmp_path}/s.sock"]
    server = MeshServer({})
    await server.start(addresses)
    try:
        for address in addresses:
            assert await health(address) == (1, f"muxmesh: {address}: NOT_SERVING\n")
        await server.set_serving()
        for address in addresses:
            assert await health(address) == (0, "SERVING\n")
    finally:
        await server.stop(0)


async def test_a_proxy_for_the_internet_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    address, server = free_listen_address("127.0.0.1:0"), MeshServer({})
    await server.start([address])
    await server.set_serving()
    try:
        assert await health(address) == (0, "SERVING\n")
    finally:
        await server.stop(0)


@pytest.mark.parametrize("name", ["kvstore/u", "decode/m"])
async def test_a_process_of_a_mesh_is_found_by_its_name(runtime_file: Path, name: str) -> None:
    server = MeshServer({})
    await server.start([f"unix:{runtime_file.parent}/{name.replace('/', '-')}.sock"])
    await server.set_serving()
    try:
        assert await health("--runtime", str(runtime_file), name) == (0, "SERVING\n")
    finally:
        await server.stop(0)


def test_a_process_that_does_not_run_is_named(runtime_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--runtime", str(runtime_file), "prefill/m"]) == 1
    expected = f"muxmesh: prefill/m: is not running: there is no {runtime_file.parent}/prefill-m.sock\n"
    assert capsys.readouterr().err == expected


def test_an_unknown_process_is_refused_with_those_that_there_are(
    runtime_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["health", "--runtime", str(runtime_file), "prefill/n"]) == 1
    expected = "muxmesh: no process has the name prefill/n; there are kvstore/u, prefill/m, decode/m, router\n"
    assert capsys.readouterr().err == expected


def test_a_missing_runtime_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--runtime", str(tmp_path / "none"), "router"]) == 1
    assert f"muxmesh: {tmp_path}/none: the runtime file cannot be read" in capsys.readouterr().err


def test_an_address_on_which_nothing_listens_is_unhealthy_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = free_listen_address("127.0.0.1:0")
    assert main(["health", address]) == 1
    assert capsys.readouterr().err == f"muxmesh: {address}: Connection refused\n"
    assert main(["health", f"unix:{tmp_path}/none.sock"]) == 1
    assert capsys.readouterr().err == f"muxmesh: unix:{tmp_path}/none.sock: No such file or directory\n"


async def test_a_service_that_does_not_respond_is_unhealthy_after_the_timeout(tmp_path: Path) -> None:
    """It takes connections and reads nothing, like a process that is stopped by a signal."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.sock"))
        server.listen()
        address = f"unix:{tmp_path}/s.sock"
        assert await health(address, "--timeout", "0.2") == (1, f"muxmesh: {address}: no response within 0.2 s\n")


def test_an_address_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "somewhere"]) == 1
    assert capsys.readouterr().err == "muxmesh: address: is 'somewhere'; the port is missing, such as somewhere:50051\n"


def test_a_probe_loads_neither_the_serving_side_nor_the_schema_of_the_runtime_file() -> None:
    script = "import sys, muxmesh.cli.main, muxmesh.cli.health; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"pydantic", "numpy", "redis", "uvloop", "numba", "muxmesh.client"} & set(done.stdout.split())


async def test_a_service_with_tls_is_asked_with_tls(tmp_path: Path) -> None:
    ca, other = Authority(tmp_path), Authority(tmp_path, "other")
    files, mine = ca.issue("a", "mesh.example.org"), ca.issue("me")
    tls = TlsConfig(cert=str(files.cert), key=str(files.key), client_ca=str(ca.pem))
    address, server = free_listen_address("127.0.0.1:0"), MeshServer({})
    await server.start([address], {address: ReloadedCredentials(tls, SystemClock()).credentials})
    await server.set_serving()
    with_ca = ("--tls-ca", str(ca.pem), "--tls-server-name", "mesh.example.org")
    pair = ("--tls-cert", str(mine.cert), "--tls-key", str(mine.key))
    try:
        assert await health(address, *with_ca, *pair) == (0, "SERVING\n")
        assert await health(address) == (
            1, f"muxmesh: {address}: Socket closed; if that server serves TLS, call it with `tls` (--tls or --tls-ca)\n"
        )  # fmt: skip
        code, printed = await health(address, *with_ca)
        assert code == 1 and "set `cert` and `key` (--tls-cert, --tls-key)" in printed
        code, printed = await health(address, "--tls-ca", str(other.pem))
        assert code == 1 and "is not signed by a CA that this client trusts" in printed
    finally:
        await server.stop(0)


def test_tls_is_not_for_the_sockets_of_a_mesh(runtime_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--runtime", str(runtime_file), "router", "--tls"]) == 1
    assert capsys.readouterr().err == "muxmesh: --tls: has no effect with --runtime: its unix sockets have no TLS\n"
