"""The commands of an operator that the supervisor takes on a private socket: models that are loaded and unloaded."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc

from muxmesh.errors import InvalidRequest
from muxmesh.internal.v1 import admin_pb2, admin_pb2_grpc
from muxmesh.rpc.server import MeshServer
from muxmesh.supervisor.model_loading import ModelLoading

_log = logging.getLogger("supervisor")

Context = grpc.aio.ServicerContext[Any, Any]


class SupervisorAdminService(admin_pb2_grpc.SupervisorAdminServiceServicer):
    """See the proto. A command is carried out to its end, even if its caller disconnects."""

    def __init__(self, loading: ModelLoading) -> None:
        self._loading = loading
        self._running: set[asyncio.Task[Any]] = set()

    async def LoadModel(self, request: admin_pb2.LoadModelRequest, context: Context) -> admin_pb2.LoadModelResponse:
        """See the proto. Raises what `ModelLoading.load` raises."""
        try:
            model = json.loads(request.model_json)
        except ValueError as error:
            raise InvalidRequest("model_json", f"is no JSON: {error}") from error
        if not isinstance(model, dict):
            raise InvalidRequest("model_json", "must be an object with the fields of a model in mesh.yaml")
        return admin_pb2.LoadModelResponse(unit=await self._finish("load", self._loading.load(request.unit, model)))

    async def UnloadModel(
        self, request: admin_pb2.UnloadModelRequest, context: Context
    ) -> admin_pb2.UnloadModelResponse:
        """See the proto. Raises what `ModelLoading.unload` raises."""
        await self._finish("unload", self._loading.unload(request.model))
        return admin_pb2.UnloadModelResponse()

    async def _finish(self, command: str, work: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.create_task(work, name=f"model {command}")
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:  # its caller may have gone
            _log.warning("%s: %s", task.get_name(), error)

    async def cancel(self) -> None:
        """Ends what is running: the mesh stops."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@asynccontextmanager
async def serving_commands(loading: ModelLoading, address: str) -> AsyncIterator[None]:
    """Serves on ``address`` while the block runs."""
    service = SupervisorAdminService(loading)
    register = functools.partial(admin_pb2_grpc.add_SupervisorAdminServiceServicer_to_server, service)
    server = MeshServer({admin_pb2.DESCRIPTOR.services_by_name["SupervisorAdminService"]: register})
    await server.start([address])
    await server.set_serving()
    try:
        yield
    finally:
        await service.cancel()
        await server.stop(0)
