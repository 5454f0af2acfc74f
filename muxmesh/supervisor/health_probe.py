"""Asks the services of a mesh for their health over gRPC. Knows no process."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxmesh.rpc.channels import internal_channel


class HealthProbe:
    """A connection to the health service at one address. It survives restarts of the process that serves there."""

    def __init__(self, address: str) -> None:
        """``address``: `unix:` and the path of a socket. Needs a running event loop."""
        self._socket = Path(address.removeprefix("unix:"))
        self._channel = internal_channel(address)
        self._stub = health_pb2_grpc.HealthStub(self._channel)

    async def ask(self) -> bool:
        """Waits, without a time limit, for any response; whether it serves does not matter.

        False if none can come, or if the socket's file is gone: the processes that are connected are served, and no
        other can connect.
        """
        if not self._socket.exists():
            return False
        try:
            await self._stub.Check(health_pb2.HealthCheckRequest())
        except grpc.aio.AioRpcError:
            return False
        return True

    async def close(self) -> None:
        """Closes the connection. A pending `ask` returns False."""
        await self._channel.close()


async def wait_until_serving(address: str) -> None:
    """Waits, without a time limit, until the service at ``address`` reports SERVING."""
    async with internal_channel(address) as channel:
        while True:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for response in watch:
                    if response.status == health_pb2.HealthCheckResponse.SERVING:
                        watch.cancel()
                        return
            await asyncio.sleep(0.05)
