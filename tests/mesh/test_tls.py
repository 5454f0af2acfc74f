"""A real mesh with TLS on its public address: who is served, what the others are told, and new certificates."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from muxmesh.client import NO_RETRIES, MeshClient, Tls
from muxmesh.errors import TlsFailed, Unavailable
from tests.support.mesh import SIM_MODEL, RunningMesh, running_mesh
from tests.support.tls import Authority, PairFiles

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]

UNITS = [{"kv_pool": "64MiB", "slab": "1MiB", "models": [SIM_MODEL]}]


@dataclass
class TlsMesh:
    """A mesh that asks clients for a certificate of `ca`."""

    mesh: RunningMesh
    ca: Authority
    files: PairFiles
    """Those that the router serves."""
    mine: PairFiles
    """A certificate that the mesh accepts."""

    def client(self, tls: Tls | bool) -> MeshClient:
        return MeshClient(self.mesh.address, retries=NO_RETRIES, tls=tls)

    def tls(self, ca: Authority) -> Tls:
        return Tls(ca=ca.pem, cert=self.mine.cert, key=self.mine.key)

    async def failure(self, tls: Tls | bool) -> Unavailable:
        async with self.client(tls) as client:
            with pytest.raises(Unavailable) as caught:
                await client.list_models()
        return caught.value

    async def until_served_for(self, ca: Authority) -> None:
        """Waits until new connections get a certificate of ``ca``."""
        async with asyncio.timeout(60):
            while True:
                try:
                    async with self.client(self.tls(ca)) as client:
                        await client.list_models()
                        return
                except TlsFailed:
                    await asyncio.sleep(0.05)

    async def command(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Exit code, output and errors of a command of the client."""
        return await muxmesh(*arguments, MUXMESH_ADDRESS=self.mesh.address, **environment)


async def muxmesh(*arguments: str, **environment: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "muxmesh", *arguments,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment},
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TlsMesh]:
    folder = tmp_path_factory.mktemp("tls")
    ca = Authority(folder)
    files, mine = ca.issue("server"), ca.issue("client", "me")
    section = {"cert": str(files.cert), "key": str(files.key), "client_ca": str(ca.pem)}
    async with running_mesh(folder, tls=section, units=UNITS) as mesh:
        yield TlsMesh(mesh, ca, files, mine)


async def test_a_client_with_a_certificate_is_served(running: TlsMesh) -> None:
    async with running.client(running.tls(running.ca)) as client:
        completion = await client.generate("over TLS", max_new_tokens=5)
    assert completion.finish.num_output_tokens == 5


async def test_a_client_without_a_certificate_is_refused(running: TlsMesh) -> None:
    error = await running.failure(Tls(ca=running.ca.pem))
    assert "if that server asks for a certificate of the client, set `cert` and `key`" in str(error)


async def test_a_client_with_a_certificate_of_another_ca_is_refused(running: TlsMesh, tmp_path: Path) -> None:
    foreign = Authority(tmp_path).issue("client", "me")
    error = await running.failure(Tls(ca=running.ca.pem, cert=foreign.cert, key=foreign.key))
    assert "if that server has not accepted the client's certificate" in str(error)


async def test_plain_text_is_refused(running: TlsMesh) -> None:
    error = await running.failure(False)
    assert str(error).endswith("if that server serves TLS, call it with `tls` (--tls or --tls-ca)")


async def test_the_unix_socket_of_the_router_needs_no_certificate(running: TlsMesh) -> None:
    assert [model.name for model in await running.mesh.client.list_models()] == ["sim"]


async def test_commands_take_the_files_as_options_or_variables(running: TlsMesh) -> None:
    ca, cert, key = (str(path) for path in (running.ca.pem, running.mine.cert, running.mine.key))
    options = ("--tls-ca", ca, "--tls-cert", cert, "--tls-key", key)
    variables = {"MUXMESH_TLS_CA": ca, "MUXMESH_TLS_CERT": cert, "MUXMESH_TLS_KEY": key}
    workload = (
        "--workload",
        "rate=50 lengths=U(8,9)/(4,5) requests=3",
        "--calibrate",
        "0",
        "--allow-slow-driver",
        "--quiet",
    )
    health, status, generated, loaded = await asyncio.gather(
        running.command("health", running.mesh.address, *options),
        running.command("status", "--json", *options),
        running.command("generate", "--json", "--max-new-tokens", "3", "x", **variables),
        running.command("loadtest", "--json", *workload, **variables),
    )
    assert health == (0, "SERVING\n", "")
    assert [status[0], generated[0], loaded[0]] == [0, 0, 0], (status, generated, loaded)
    assert json.loads(status[1])["models"][0]["model"] == "sim"
    assert json.loads(generated[1])["num_output_tokens"] == 3
    assert json.loads(loaded[1])["completed"] == 3


async def test_a_command_without_tls_is_told_what_is_missing(running: TlsMesh) -> None:
    code, out, err = await running.command("status")
    assert (code, out) == (1, "")
    assert err.endswith("if that server serves TLS, call it with `tls` (--tls or --tls-ca)\n")
    assert len(err.splitlines()) == 1


async def test_new_connections_get_a_new_certificate_and_a_stream_goes_on(
    running: TlsMesh, tmp_path: Path
) -> None:  # fmt: skip
    new = Authority(tmp_path, "new")
    async with running.client(running.tls(running.ca)) as client:
        stream = client.stream("a long output", max_new_tokens=8000)
        await anext(stream)
        running.files.replace_by(new.issue("server"))
        await running.until_served_for(new)
        assert "not signed by a CA" in str(await running.failure(running.tls(running.ca)))
        assert (await anext(stream)).token_ids
        await stream.aclose()
    running.files.replace_by(running.ca.issue("server-again"))
    await running.until_served_for(running.ca)


async def test_a_certificate_that_has_expired_is_reported_and_its_renewal_needs_no_restart(running: TlsMesh) -> None:
    running.files.replace_by(running.ca.issue_expired("late"))
    await running.mesh.restart("router")
    error = await running.failure(running.tls(running.ca))
    assert type(error) is TlsFailed
    assert "the server's certificate has expired" in str(error)
    running.files.replace_by(running.ca.issue("renewed"))
    await running.until_served_for(running.ca)


async def test_up_greets_over_its_own_socket_and_shows_how_to_call_with_tls(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    ca.issue("server")
    config, state = tmp_path / "mesh.yaml", tmp_path / "state"
    config.write_text(
        "tls: {cert: ca-server.pem, key: ca-server.key}\n"
        "units: [{kv_pool: 64MiB, models: [{name: sim, engine: sim, sim: {base_s: 0.001}}]}]\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "muxmesh", "up", "-c", str(config), "--listen", "127.0.0.1:0", "--state-dir", str(state),
        "--hello", "Hello?", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    try:
        async with asyncio.timeout(120):
            text = ""  # a thread writes each of the two streams, so their lines come in any order
            while not ("Ctrl-C stops the mesh" in text and "output tokens" in text):
                line = await process.stdout.readline()
                assert line, text
                lines.append(line.decode())
                text = "".join(lines)
            address = next(line for line in lines if line.startswith("muxmesh ready on ")).split()[-1]
            assert "no mesh answers" not in text and "no TLS connection" not in text
            assert f'muxmesh generate --address {address} --tls-ca ca.pem --chat "Name three colours."' in text
            assert f'SyncMeshClient("{address}", tls=Tls(ca="ca.pem"))' in text
            assert f"ca.pem: the CA that signed {tmp_path}/ca-server.pem" in text
            found = await muxmesh("health", address, "--tls-ca", str(ca.pem))
            assert found == (0, "SERVING\n", "")
            listed = await muxmesh("model", "ps", "--json", "--state-dir", str(state))
            assert [row["model"] for row in json.loads(listed[1])] == ["sim"]
    finally:
        process.terminate()
        await process.communicate()
