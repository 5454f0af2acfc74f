"""A real server whose certificates change: what new connections get, and what becomes of those that are there."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxmesh.background_task import background
from muxmesh.clock import ManualClock
from muxmesh.config.tls_config import TlsConfig
from muxmesh.errors import ConfigError
from muxmesh.rpc import server_credentials
from muxmesh.rpc.server import MeshServer
from muxmesh.rpc.server_credentials import ReloadedCredentials
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from tests.support.tls import NOW_S, Authority, PairFiles, serves

SERVING = health_pb2.HealthCheckResponse.SERVING


class Clock(ManualClock):
    """A clock on a day on which the certificates of the tests are valid."""

    def unix_s(self) -> float:
        return NOW_S


@dataclass
class Server:
    address: str
    certificates: ReloadedCredentials

    def channel(self, ca: Authority, pair: PairFiles | None = None) -> grpc.aio.Channel:
        key, cert = (pair.key.read_bytes(), pair.cert.read_bytes()) if pair else (None, None)
        credentials = grpc.ssl_channel_credentials(ca.pem.read_bytes(), key, cert)
        return grpc.aio.secure_channel(self.address, credentials, options=[("grpc.use_local_subchannel_pool", 1)])

    async def accepts(self, ca: Authority, pair: PairFiles | None = None) -> bool:
        """Whether a new connection of a client that trusts ``ca`` comes about."""
        async with self.channel(ca, pair) as channel:
            return await serves(channel)


@asynccontextmanager
async def serving(files: PairFiles, client_ca: Path | None = None) -> AsyncIterator[Server]:
    address = free_listen_address("127.0.0.1:0")
    tls = TlsConfig(cert=str(files.cert), key=str(files.key), client_ca=client_ca and str(client_ca))
    certificates, server = ReloadedCredentials(tls, Clock()), MeshServer({})
    await server.start([address], {address: certificates.credentials})
    await server.set_serving()
    try:
        yield Server(address, certificates)
    finally:
        await server.stop(0)


async def test_only_tls_is_served_at_an_address_with_credentials(tmp_path: Path) -> None:
    ca, other = Authority(tmp_path), Authority(tmp_path, "other")
    async with serving(ca.issue("a")) as server, grpc.aio.insecure_channel(server.address) as plain:
        assert await server.accepts(ca)
        assert not await server.accepts(other)
        assert not await serves(plain)


async def test_other_addresses_of_the_server_stay_without_tls(tmp_path: Path) -> None:
    files = Authority(tmp_path).issue("a")
    certificates = ReloadedCredentials(TlsConfig(cert=str(files.cert), key=str(files.key)), Clock())
    tls, socket, server = free_listen_address("127.0.0.1:0"), f"unix:{tmp_path}/s.sock", MeshServer({})
    await server.start([tls, socket], {tls: certificates.credentials})
    await server.set_serving()
    try:
        async with grpc.aio.insecure_channel(socket) as channel:
            assert await serves(channel)
    finally:
        await server.stop(0)


async def test_new_connections_get_the_new_certificate_and_old_ones_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, server_credentials.__name__)
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    files = old.issue("a")
    async with serving(files) as server, server.channel(old) as before:
        assert await serves(before)
        watch = health_pb2_grpc.HealthStub(before).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        files.replace_by(new.issue("b"))
        assert await server.accepts(old)  # nothing has looked yet
        server.certificates.look()
        assert await server.accepts(new)
        assert not await server.accepts(old)
        assert await serves(before)
        assert not watch.done()
        watch.cancel()
    expected = f"tls: {files.cert}: new connections get the new certificate, valid until 3000-01-01 00:00 UTC"
    assert caplog.messages == [expected]


async def test_a_first_connection_after_a_replacement_gets_the_new_certificate(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    files = old.issue("a")
    async with serving(files) as server:
        files.replace_by(new.issue("b"))
        server.certificates.look()
        assert await server.accepts(new)


async def test_links_are_followed_anew_as_kubernetes_changes_them(tmp_path: Path) -> None:
    """`tls.crt` is a link through `..data`, which is itself replaced by a link to another folder."""
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    for name, pair in (("1", old.issue("a")), ("2", new.issue("b"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tls.crt").write_bytes(pair.cert.read_bytes())
        (tmp_path / name / "tls.key").write_bytes(pair.key.read_bytes())
    (tmp_path / "..data").symlink_to("1")
    mounted = PairFiles(tmp_path / "tls.crt", tmp_path / "tls.key")
    for path in (mounted.cert, mounted.key):
        path.symlink_to(f"..data/{path.name}")
    async with serving(mounted) as server:
        assert await server.accepts(old)
        (tmp_path / "..data_tmp").symlink_to("2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        server.certificates.look()
        assert await server.accepts(new)


async def test_a_broken_replacement_keeps_the_old_certificate_and_logs_one_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ca = Authority(tmp_path)
    files, later = ca.issue("a"), ca.issue("later")
    async with serving(files) as server:
        whole = files.cert.read_bytes()
        files.cert.write_bytes(whole[:300])
        for _ in range(4):
            server.certificates.look()
        assert await server.accepts(ca)
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "has a certificate that is incomplete or damaged; the one before stays in use" in caplog.text
        files.replace_by(later)
        server.certificates.look()
        assert await server.accepts(ca)


async def test_a_key_that_is_replaced_after_its_certificate_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ca, new = Authority(tmp_path), Authority(tmp_path, "new")
    files, other = ca.issue("a"), new.issue("b")
    async with serving(files) as server:
        files.cert.write_bytes(other.cert.read_bytes())
        server.certificates.look()
        assert await server.accepts(ca)
        files.key.write_bytes(other.key.read_bytes())
        server.certificates.look()
        assert await server.accepts(new)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_with_a_ca_of_clients_only_their_certificates_are_accepted_and_the_ca_may_change(tmp_path: Path) -> None:
    ca, next_ca = Authority(tmp_path), Authority(tmp_path, "next")
    mine, foreign = ca.issue("client", "me"), next_ca.issue("client", "me")
    client_ca = tmp_path / "clients.pem"
    client_ca.write_bytes(ca.pem.read_bytes())
    async with serving(ca.issue("a"), client_ca) as server:
        assert [await server.accepts(ca, pair) for pair in (None, foreign, mine)] == [False, False, True]
        assert not await server.accepts(ca, ca.issue_expired("late", "me"))
        client_ca.write_bytes(next_ca.pem.read_bytes())
        server.certificates.look()
        assert [await server.accepts(ca, pair) for pair in (None, foreign, mine)] == [False, True, False]


async def test_the_watch_looks_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_credentials, "LOOK_EVERY_S", 0.01)
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    files = old.issue("a")
    async with serving(files) as server, background(server.certificates.watch(), "certificates"):
        files.replace_by(new.issue("b"))
        async with asyncio.timeout(20):
            while not await server.accepts(new):
                pass


def test_files_that_cannot_be_used_are_a_configuration_error(tmp_path: Path) -> None:
    tls = TlsConfig(cert=str(tmp_path / "none.pem"), key=str(tmp_path / "none.key"))
    with pytest.raises(ConfigError, match=r"^tls: .*/none\.pem: cannot be read: No such file or directory$"):
        ReloadedCredentials(tls, Clock())


async def test_a_router_starts_with_a_certificate_that_has_expired_and_takes_the_renewal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ca = Authority(tmp_path)
    files, renewed = ca.issue_expired("a"), ca.issue("b")
    async with serving(files) as server:
        assert not await server.accepts(ca)
        for _ in range(3):
            server.certificates.look()
        assert caplog.messages == [
            f"tls: {files.cert}: the certificate in use has expired on 2020-01-06 00:00 UTC; renew it"
        ]
        files.replace_by(renewed)
        server.certificates.look()
        assert await server.accepts(ca)
