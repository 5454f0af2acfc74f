"""A mesh whose unit has ports with TLS: the router uses them, and nobody without a certificate of the mesh can."""

import os
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxmesh.rpc.channels import internal_channel
from tests.support.mesh import running_mesh
from tests.support.tls import Authority

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio]

BASE_PORT = 50100


async def serves(address: str, credentials: grpc.ChannelCredentials | None) -> bool:
    async with internal_channel(address, credentials) as channel:
        try:
            response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


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
            assert await serves(address, ours)
            for credentials in (None, theirs, grpc.ssl_channel_credentials(roots)):
                assert not await serves(address, credentials), address
