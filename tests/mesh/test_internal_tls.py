"""A unit that serves mTLS on its ports: the router can use them, clients without a certificate of its CA cannot."""

import os
from pathlib import Path

import grpc
import pytest

from muxmesh.rpc.channels import internal_channel
from tests.support.mesh import running_mesh
from tests.support.tls import Authority, serves

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio]

BASE_PORT = 50100


async def accepts(address: str, credentials: grpc.ChannelCredentials | None) -> bool:
    async with internal_channel(address, credentials) as channel:
        return await serves(channel)


async def test_requests_pass_over_ports_that_accept_only_certificates_of_the_mesh(tmp_path: Path) -> None:
    host = f"127.{os.getpid() % 250 + 1}.9.1"
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    pair, other = authority.issue("host", host), stranger.issue("host", host)
    unit = {
        "kv_pool": "16MiB", "models": [{"name": "sim", "engine": "sim"}],
        "network": {"host": host, "base_port": BASE_PORT},
    }  # fmt: skip
    tls = {"cert": str(pair.cert), "key": str(pair.key), "ca": str(authority.pem)}
    async with running_mesh(tmp_path / "mesh", units=[unit], internal_tls=tls) as mesh:
        completion = await mesh.client.generate("Hello", max_new_tokens=20, ignore_eos=True)
        assert len(completion.token_ids) == 20
        roots = authority.pem.read_bytes()
        ours, theirs = (
            grpc.ssl_channel_credentials(roots, one.key.read_bytes(), one.cert.read_bytes()) for one in (pair, other)
        )
        for port in range(BASE_PORT, BASE_PORT + 3):
            address = f"{host}:{port}"
            assert await accepts(address, ours)
            for credentials in (None, theirs, grpc.ssl_channel_credentials(roots)):
                assert not await accepts(address, credentials), address
