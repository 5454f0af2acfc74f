"""The commands of an operator that a router takes on its private socket. The units carry them out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc

from muxmesh.errors import ModelNotFound
from muxmesh.internal.v1 import admin_pb2, admin_pb2_grpc, kvstore_pb2
from muxmesh.quoting import quoted
from muxmesh.rpc.status_codes import response_of
from muxmesh.v1 import mesh_pb2
from router.model_changes import ModelChanges
from router.unit_link import UnitLink
from router.units import Units

Context = grpc.aio.ServicerContext[Any, Any]


class RouterAdminService(admin_pb2_grpc.RouterAdminServiceServicer):
    """See the proto. A command for a model on several units goes to all of them at once."""

    def __init__(
        self, units: Units, changes: ModelChanges, counts: Callable[[], list[mesh_pb2.RouterModelStatus]]
    ) -> None:
        """``counts``: those of this router, by model."""
        self._units = units
        self._changes = changes
        self._counts = counts

    async def PutModelToSleep(
        self, request: admin_pb2.PutModelToSleepRequest, context: Context
    ) -> admin_pb2.PutModelToSleepResponse:
        """See the proto. Raises ModelNotFound; Unavailable if a unit is not reached."""
        sleep = kvstore_pb2.SleepModelRequest(model=request.model, drop_weights=request.drop_weights)
        links = units_with(self._units, request.model, request.unit)
        await _all_of(link.commands.SleepModel(sleep, timeout=context.time_remaining()) for link in links)
        return admin_pb2.PutModelToSleepResponse()

    async def AwakenModel(
        self, request: admin_pb2.AwakenModelRequest, context: Context
    ) -> admin_pb2.AwakenModelResponse:
        """See the proto. Raises as `PutModelToSleep`."""
        wake = kvstore_pb2.WakeModelRequest(model=request.model)
        links = units_with(self._units, request.model, request.unit)
        await _all_of(link.commands.WakeModel(wake, timeout=context.time_remaining()) for link in links)
        return admin_pb2.AwakenModelResponse()

    async def ReadRuntime(
        self, request: admin_pb2.ReadRuntimeRequest, context: Context
    ) -> admin_pb2.ReadRuntimeResponse:
        """See the proto. Raises ConfigError."""
        await self._changes.read_runtime()
        return admin_pb2.ReadRuntimeResponse()

    async def GetRouterCounts(
        self, request: admin_pb2.GetRouterCountsRequest, context: Context
    ) -> admin_pb2.GetRouterCountsResponse:
        """See the proto."""
        return admin_pb2.GetRouterCountsResponse(models=self._counts())


def units_with(units: Units, model: str, unit: str) -> list[UnitLink]:
    """The units that have ``model``: all of them, or ``unit`` only. Raises ModelNotFound if there is none."""
    having = {link.name: link for link in units if model in link.models}
    if not having:
        served = ", ".join(sorted({name for link in units for name in link.models}))
        raise ModelNotFound(f"model: {quoted(model)} is not on any unit; there are: {served}")
    if unit and unit not in having:
        raise ModelNotFound(f"model: {quoted(model)} is not on unit {quoted(unit)}; it is on: {', '.join(having)}")
    return [having[unit]] if unit else list(having.values())


async def _all_of(calls: Iterable[Awaitable[Any]]) -> None:
    """Waits for all calls. Raises the error of the first that failed."""
    await asyncio.gather(*map(response_of, calls))
