"""The counts of the other routers of a supervisor, so that a status is that of the mesh, whichever router is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc

from muxmesh.config.runtime import MeshRuntime
from muxmesh.internal.v1 import admin_pb2, admin_pb2_grpc
from muxmesh.rpc.channels import internal_channel
from muxmesh.v1 import mesh_pb2

_TIMEOUT_S = 1.0
_SUMMED = (
    "num_requests_waiting", "num_requests_running", "num_requests_finished", "num_requests_aborted", "num_restarts",
    "prompt_tokens", "output_tokens",
)  # fmt: skip
_TALLIES = ("num_requests", "num_met", "num_ttft_met", "num_tpot_met", "num_e2el_met")


class PeerRouters:
    """Channels to the private sockets of the other routers."""

    def __init__(self, runtime: MeshRuntime, own_name: str) -> None:
        """Without a supervisor no router knows the names of others."""
        names = [key.name for key in runtime.router_keys()] if runtime.has_supervisor else []
        self._channels = [internal_channel(runtime.admin_address(name)) for name in names if name != own_name]

    async def counts(self) -> list[mesh_pb2.RouterModelStatus]:
        """The counts by model of each router that responds."""
        found = await asyncio.gather(*map(_counts_of, self._channels))
        return [model for models in found for model in models]

    async def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels:
            await channel.close()


def with_peers(
    own: list[mesh_pb2.RouterModelStatus], others: Iterable[mesh_pb2.RouterModelStatus]
) -> list[mesh_pb2.RouterModelStatus]:
    """Adds the counts of ``others`` to those of the same model in ``own``. The state of the predictor stays."""
    by_model = {status.model: status for status in own}
    for other in others:
        status = by_model.get(other.model)
        if status is None:
            continue
        for name in _SUMMED:
            setattr(status, name, getattr(status, name) + getattr(other, name))
        if status.HasField("slo"):
            _add(status.slo.total, other.slo.total)
            _add(status.slo.recent, other.slo.recent)
    return own


async def _counts_of(channel: grpc.aio.Channel) -> Iterable[mesh_pb2.RouterModelStatus]:
    try:
        stub = admin_pb2_grpc.RouterAdminServiceStub(channel)
        return (await stub.GetRouterCounts(admin_pb2.GetRouterCountsRequest(), timeout=_TIMEOUT_S)).models
    except grpc.aio.AioRpcError:  # it restarts
        return ()


def _add(tally: mesh_pb2.SloTally, other: mesh_pb2.SloTally) -> None:
    for name in _TALLIES:
        setattr(tally, name, getattr(tally, name) + getattr(other, name))
