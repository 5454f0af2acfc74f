"""Adds a model to a running mesh, and removes one: the steps over all of its processes, and how they are undone.

    load      runtime file > kvstore > workers > router
    unload    runtime file > router > kvstore, whose running sequences finish > workers

Each process that starts meanwhile reads the runtime file, and so has the same models as the others soon. This
module does not know how a process starts (`mesh_supervisor`) or how a unit adds a model (`kvstore.model_service`).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import Any

from muxmesh.config.load import Problem, parse_mesh_config
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import MeshRuntime, PreparedModel, ProcessKey
from muxmesh.config.runtime_changes import with_model, without_model
from muxmesh.config.schema import MeshConfig, UnitConfig
from muxmesh.errors import ConfigError, InvalidRequest, MeshError, ModelNotFound
from muxmesh.internal.v1 import admin_pb2, admin_pb2_grpc, kvstore_pb2, kvstore_pb2_grpc
from muxmesh.machine_limits import memory_limit
from muxmesh.models.prepared_model import (
    machine_problems,
    model_problems,
    packing_of,
    prepare_model,
    prepared_problems,
)
from muxmesh.quoting import quoted
from muxmesh.rpc.channels import internal_channel
from muxmesh.rpc.status_codes import response_of
from muxmesh.supervisor.mesh_supervisor import MeshSupervisor
from muxmesh.types import Role

_log = logging.getLogger("supervisor")
_CALL_S = 60.0


class ModelLoading:
    """Loads and unloads models of one supervisor's mesh, one after another."""

    def __init__(self, mesh: MeshSupervisor) -> None:
        self._mesh = mesh
        self._changing = asyncio.Lock()

    async def load(self, unit: str, model: dict[str, Any]) -> str:
        """Adds ``model``, as in mesh.yaml, to a unit; returns the unit's name. After an error nothing has changed.

        ``unit``: empty for the only one. Raises ConfigError, ModelUnsupported or InvalidRequest if the model cannot be
        served there; Unavailable if its workers do not start.
        """
        async with self._changing:
            before = self._mesh.runtime
            placed = unit_of(before, unit)
            added = checked_with_model(before, placed, model)
            prepared = await asyncio.to_thread(_prepare, before, placed, added)
            after = with_model(before, placed.name, added, prepared)
            _refuse(prepared_problems(after.config, after.prepared, memory_limit()))
            after.check_socket_paths()
            await self._add(before, after, placed.name, added.name)
            _log.info("%s is loaded on unit %s", added.name, placed.name)
            return placed.name

    async def _add(self, before: MeshRuntime, after: MeshRuntime, unit: str, model: str) -> None:
        async with AsyncExitStack() as undo:
            try:
                undo.push_async_callback(self._publish, before)
                self._mesh.set_runtime(after)
                await self._unit_call(unit, "AddModel", kvstore_pb2.AddModelRequest(model=model))
                undo.push_async_callback(self._remove_from_unit, unit, model)
                await self._mesh.start_workers(unit, model)
                undo.push_async_callback(self._mesh.stop_processes, _workers(after, unit, model))
                await asyncio.gather(*(self._router_call(key.name) for key in after.router_keys()))
            except asyncio.CancelledError:  # the mesh stops: there is nothing to undo
                undo.pop_all()
                raise
            undo.pop_all()

    async def unload(self, model: str) -> None:
        """Removes a model from every unit that has it. Its running sequences finish first.

        Raises ModelNotFound; InvalidRequest if it is the last model of a unit, or on a GPU.
        """
        async with self._changing:
            before = after = self._mesh.runtime
            units = before.config.units_of(model)
            if not units:
                names = ", ".join(before.config.models())
                raise ModelNotFound(f"model: {quoted(model)} is not in this mesh; it has: {names}")
            for unit in units:
                _check_removable(unit, model)
                after = without_model(after, unit.name, model)
            workers = [name for unit in units for name in _workers(before, unit.name, model)]
            await self._publish(after)
            for unit in units:
                await self._remove_from_unit(unit.name, model, timeout_s=None)
            await self._mesh.stop_processes(workers)
            _log.info("%s is unloaded", model)

    async def _publish(self, runtime: MeshRuntime) -> None:
        """Makes ``runtime`` that of the mesh. A router that is not reached reads it when it starts."""
        self._mesh.set_runtime(runtime)
        await asyncio.gather(*(self._tell_router(key.name) for key in runtime.router_keys()))

    async def _tell_router(self, name: str) -> None:
        try:
            await self._router_call(name)
        except MeshError as error:
            _log.warning("the %s has not read the runtime file: %s", name, error)

    async def _remove_from_unit(self, unit: str, model: str, timeout_s: float | None = _CALL_S) -> None:
        """Returns when the unit does not have the model, or cannot say so: the caller goes on in any case."""
        try:
            await self._unit_call(unit, "RemoveModel", kvstore_pb2.RemoveModelRequest(model=model), timeout_s)
        except ModelNotFound:  # kvstore started again, and read the new file
            pass
        except MeshError as error:  # it ended meanwhile: with it the leases of the model
            _log.warning("unit %s has not confirmed that %s is removed: %s", unit, quoted(model), error)

    async def _unit_call(self, unit: str, method: str, request: Any, timeout_s: float | None = _CALL_S) -> None:
        address = self._mesh.runtime.endpoints()[ProcessKey("kvstore", unit)].address
        async with internal_channel(address) as channel:
            call = getattr(kvstore_pb2_grpc.UnitModelServiceStub(channel), method)
            await response_of(call(request, timeout=timeout_s, wait_for_ready=True))

    async def _router_call(self, name: str) -> None:
        async with internal_channel(self._mesh.runtime.admin_address(name)) as channel:
            stub = admin_pb2_grpc.RouterAdminServiceStub(channel)
            request = admin_pb2.ReadRuntimeRequest()
            await response_of(stub.ReadRuntime(request, timeout=_CALL_S, wait_for_ready=True))


def unit_of(runtime: MeshRuntime, name: str) -> UnitConfig:
    """The unit ``name``; an empty name is the only one. Raises ConfigError, InvalidRequest."""
    if name:
        return runtime.unit(name)
    if len(runtime.config.units) > 1:
        names = ", ".join(unit.name for unit in runtime.config.units)
        raise InvalidRequest("unit", f"is needed, because the mesh has several; one of: {names}")
    return runtime.config.units[0]


def checked_with_model(runtime: MeshRuntime, unit: UnitConfig, model: dict[str, Any]) -> ModelConfig:
    """``model``, as in mesh.yaml, at the end of ``unit``. Raises ConfigError as for a mesh.yaml; InvalidRequest."""
    if unit.is_cuda:
        raise InvalidRequest(
            "unit",
            f"{unit.name} is on a GPU, whose memory is divided when the unit starts; add the model to mesh.yaml and "
            "start the mesh again",
        )
    name = str(model.get("name", ""))
    if name in runtime.config.models():
        raise InvalidRequest("name", f"{quoted(name)} is the name of another model of this mesh; give another --name")
    with_units = runtime.config.model_copy(update={"units": runtime.config.units})  # set, even if they are the default
    content, index = with_units.model_dump(mode="json", exclude_unset=True), runtime.config.units.index(unit)
    content["units"][index]["models"].append(model)
    place, limit = ("units", index, "models", len(unit.models)), memory_limit()

    def found(config: MeshConfig) -> Iterable[Problem]:
        yield from machine_problems(config, limit)
        problems = model_problems(config, runtime.run_dir, runtime.cache_dir)
        yield from (one for one in problems if one[0][: len(place)] == place)  # the others were checked at the start

    config = parse_mesh_config(json.dumps(content), "the mesh with this model", found).config
    return config.units[index].models[-1]


def _check_removable(unit: UnitConfig, model: str) -> None:
    """Raises InvalidRequest if ``unit`` has to keep ``model`` as long as it runs."""
    if unit.is_cuda:
        raise InvalidRequest(
            "name",
            f"{quoted(model)} is on unit {unit.name}, a GPU, whose memory is divided when the unit starts; remove it "
            "from mesh.yaml and start the mesh again",
        )
    if len(unit.models) == 1:
        raise InvalidRequest("name", f"{quoted(model)} is the last model of unit {unit.name}; stop the mesh")


def _prepare(runtime: MeshRuntime, unit: UnitConfig, model: ModelConfig) -> PreparedModel:
    """Raises ConfigError."""
    folder, cache_dir = runtime.run_dir, runtime.cache_dir
    try:
        return prepare_model(model, packing_of(unit), folder, cache_dir, lambda phase, done, total: None)
    except OSError as error:
        raise ConfigError(f"{model.name} cannot be prepared in {cache_dir}: {error.strerror or error}") from error


def _refuse(problems: Iterable[Problem]) -> None:
    found = [problem for _, problem in problems]
    if found:
        raise ConfigError("the mesh with this model: " + "; ".join(found))


def _workers(runtime: MeshRuntime, unit: str, model: str) -> list[str]:
    endpoints = runtime.endpoints()
    return [endpoints[ProcessKey(role, unit, model)].name for role in Role]
