"""Routers and services of units check each other's certificates; unix sockets need none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from muxmesh.clock import ManualClock
from muxmesh.config.runtime import Endpoint
from muxmesh.config.tls_config import InternalTlsConfig
from muxmesh.errors import ConfigError
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.internal_tls import (
    internal_certificate_problems,
    internal_channel_credentials,
    internal_server_credentials,
)
from muxmesh.rpc.server import MeshServer
from muxmesh.supervisor.mesh_supervisor import free_listen_address
from tests.support.tls import NOW_S, Authority, PairFiles, serves


def config(pair: PairFiles, ca: Authority) -> InternalTlsConfig:
    return InternalTlsConfig(cert=str(pair.cert), key=str(pair.key), ca=str(ca.pem))


@asynccontextmanager
async def unit(tls: InternalTlsConfig | None, folder: Path) -> AsyncIterator[Endpoint]:
    """A service of a unit with a port and a unix socket."""
    port, socket = free_listen_address("127.0.0.1:0"), f"unix:{folder}/s.sock"
    endpoint, server = Endpoint("kvstore/u", socket, port, (socket, port)), MeshServer({})
    async with internal_server_credentials(tls, endpoint, ManualClock(NOW_S), pytest.fail) as credentials:
        await server.start(endpoint.listen, credentials)
        await server.set_serving()
        try:
            yield endpoint
        finally:
            await server.stop(0)


async def accepts(address: str, credentials: grpc.ChannelCredentials | None) -> bool:
    async with internal_channel(address, credentials) as channel:
        return await serves(channel)


async def test_a_unit_accepts_a_router_with_a_certificate_of_the_mesh_and_nobody_else(tmp_path: Path) -> None:
    mesh, other = Authority(tmp_path, "mesh"), Authority(tmp_path, "other")
    router, stranger = mesh.issue("router", "router.example"), other.issue("stranger")
    async with unit(config(mesh.issue("unit"), mesh), tmp_path) as endpoint:
        port = endpoint.remote_address
        assert await accepts(port, internal_channel_credentials(config(router, mesh)))
        assert not await accepts(port, None)
        assert not await accepts(port, internal_channel_credentials(config(stranger, mesh)))
        assert not await accepts(port, grpc.ssl_channel_credentials(mesh.pem.read_bytes()))
        assert await accepts(endpoint.address, None), "its unix socket has no TLS"


async def test_a_router_talks_to_no_unit_that_another_ca_vouches_for_or_that_is_another_host(tmp_path: Path) -> None:
    mesh, other = Authority(tmp_path, "mesh"), Authority(tmp_path, "other")
    credentials = internal_channel_credentials(config(mesh.issue("router"), mesh))
    for pair in (other.issue("unit"), mesh.issue("elsewhere", "unit-9.example")):
        async with unit(config(pair, mesh), tmp_path) as endpoint:
            assert not await accepts(endpoint.remote_address, credentials)


async def test_without_it_a_port_serves_plain_text(tmp_path: Path) -> None:
    assert internal_channel_credentials(None) is None
    async with unit(None, tmp_path) as endpoint:
        assert await accepts(endpoint.remote_address, None)


def test_files_that_no_router_or_unit_could_use_are_named_by_their_fields(tmp_path: Path) -> None:
    mesh, late = Authority(tmp_path), Authority(tmp_path, "late")
    pair, expired = mesh.issue("a"), late.issue_expired("b")
    assert not list(internal_certificate_problems(config(pair, mesh), NOW_S))
    cases = {
        "cert": InternalTlsConfig(cert=str(expired.cert), key=str(expired.key), ca=str(late.pem)),
        "key": InternalTlsConfig(cert=str(pair.cert), key=str(expired.key), ca=str(mesh.pem)),
        "ca": InternalTlsConfig(cert=str(pair.cert), key=str(pair.key), ca=str(pair.key)),
    }
    for field, tls in cases.items():
        assert [name for name, _ in internal_certificate_problems(tls, NOW_S)] == [field]
    with pytest.raises(ConfigError, match=r"internal_tls: .*is not the key of the certificate"):
        internal_channel_credentials(cases["key"])
