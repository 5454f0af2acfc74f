"""The commands for the models of a unit: sleep, wake, add and remove. Each call waits until its command is done.

The rules are in `kvstore.model_states`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from kvstore.model_states import ModelRecord, ModelState, workers_of
from kvstore.service import KvStoreService
from kvstore.unit import Unit
from kvstore.unit_model import UnitModel
from muxmesh.block_hashes import KvIdentity
from muxmesh.clock import Clock
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import UnitConfig
from muxmesh.errors import InvalidRequest, ModelNotFound, RequestAborted, Unauthenticated
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.quoting import quoted


@dataclass(frozen=True, slots=True)
class PlacedModel:
    """A model as the runtime file has it: its configuration, its limits on the unit, and the identity of its KV."""

    config: ModelConfig
    limits: UnitModel
    identity: KvIdentity


class PlacedModels:
    """What other parts of kvstore look up of a unit's models. The maps change when models are added and removed."""

    def __init__(self, models: Mapping[str, PlacedModel]) -> None:
        self.configs = {name: model.config for name, model in models.items()}
        self.fingerprints = {name: model.identity.weights for name, model in models.items()}
        """Of the weights."""
        self.identities = {name: model.identity.text for name, model in models.items()}
        self.on_changed: Callable[[], None] = lambda: None
        """Called after a model was added or removed."""

    def add(self, name: str, model: PlacedModel) -> None:
        self.configs[name] = model.config
        self.fingerprints[name], self.identities[name] = model.identity.weights, model.identity.text
        self.on_changed()

    def remove(self, name: str) -> None:
        for part in (self.configs, self.fingerprints, self.identities):
            part.pop(name, None)
        self.on_changed()


ReadModel = Callable[[str], PlacedModel]
"""What the runtime file says of a model of this unit now. Raises ConfigError if it has no such model."""

Context = grpc.aio.ServicerContext[Any, Any]


class ModelService(kvstore_pb2_grpc.UnitModelServiceServicer):
    """Serves UnitModelService of one unit. `on_changed` is called after each change of the unit."""

    def __init__(
        self,
        config: UnitConfig,
        unit: Unit,
        clock: Clock,
        service: KvStoreService,
        read_model: ReadModel,
        placed: PlacedModels,
    ) -> None:
        """``read_model`` reads the runtime file again. ``placed``: has the models of ``unit``."""
        self._config = config
        self._unit = unit
        self._clock = clock
        self._service = service
        self._read_model = read_model
        self._placed = placed
        service.on_changed.append(self.on_changed)
        self._waits: dict[asyncio.Future[None], Callable[[], bool]] = {}
        """Call that waits → whether its command is done."""

    async def SleepModel(
        self, request: kvstore_pb2.SleepModelRequest, context: Context
    ) -> kvstore_pb2.SleepModelResponse:
        """See the proto. Raises ModelNotFound; InvalidRequest if the weights would have to leave a GPU."""
        record = self._record(request.model)
        if request.drop_weights and self._config.is_cuda:
            raise InvalidRequest(
                "drop_weights",
                f"unit {self._config.name} is on a GPU, where one copy of the weights belongs to all workers of the "
                "model as long as the unit runs; sleep without it",
            )
        num_sleeps = record.num_sleeps
        self._unit.states.sleep(request.model, self._clock.monotonic_s(), request.drop_weights)
        await self._until(lambda: record.num_sleeps > num_sleeps or self._sleeps_as_told(request.model))
        return kvstore_pb2.SleepModelResponse()

    async def WakeModel(self, request: kvstore_pb2.WakeModelRequest, context: Context) -> kvstore_pb2.WakeModelResponse:
        """See the proto. Raises ModelNotFound; RequestAborted if the model is told to sleep, or removed, before."""
        record, states = self._record(request.model), self._unit.states
        num_wakes = record.num_wakes

        def is_awake() -> bool:
            return record.num_wakes > num_wakes or record.state is ModelState.AWAKE

        def is_wanted() -> bool:
            return record.wanted_by_command and states.models.get(request.model) is record

        states.wake(request.model)
        await self._until(lambda: is_awake() or not is_wanted())
        if not is_awake():
            raise RequestAborted(f"{quoted(request.model)} was told to sleep, or was removed, before it was awake")
        return kvstore_pb2.WakeModelResponse()

    async def AddModel(self, request: kvstore_pb2.AddModelRequest, context: Context) -> kvstore_pb2.AddModelResponse:
        """See the proto. Raises InvalidRequest; ConfigError if the runtime file does not have the model;
        Unauthenticated if the caller may be on another host.
        """
        name = request.model
        if self._config.is_cuda:
            raise InvalidRequest(
                "unit",
                f"{self._config.name} is on a GPU, where the memory for weights is allocated when the unit starts; add "
                "the model to mesh.yaml and restart the mesh",
            )
        _check_is_local(context)
        if self._unit.serves(name):  # kvstore started again meanwhile, and read it
            return kvstore_pb2.AddModelResponse()
        model = await asyncio.to_thread(self._read_model, name)
        try:
            self._unit.add_model(name, model.limits, self._clock.monotonic_s())
        except ValueError as error:
            problem = f"{quoted(name)} cannot be added to unit {self._config.name}: {error}"
            raise InvalidRequest("model", problem) from error
        self._placed.add(name, model)
        self._service.model_added()
        return kvstore_pb2.AddModelResponse()

    async def RemoveModel(
        self, request: kvstore_pb2.RemoveModelRequest, context: Context
    ) -> kvstore_pb2.RemoveModelResponse:
        """See the proto. Raises ModelNotFound; Unauthenticated as `AddModel`."""
        _check_is_local(context)
        self._record(request.model)
        self._service.remove_model(request.model)
        await self._until(lambda: request.model not in self._unit.models)
        return kvstore_pb2.RemoveModelResponse()

    def on_changed(self) -> None:
        """Removes the models that the unit has removed, whose call may have ended, and ends calls that are done."""
        for model in self._placed.configs.keys() - self._unit.models.keys():
            self._placed.remove(model)
        for future, is_done in self._waits.items():
            if not future.done() and is_done():
                future.set_result(None)

    def _record(self, model: str) -> ModelRecord:
        if model not in self._unit.states.models:
            served = ", ".join(sorted(self._unit.models))
            raise ModelNotFound(f"model: {quoted(model)} is not on unit {self._config.name}; it has: {served}")
        return self._unit.states.models[model]

    def _sleeps_as_told(self, model: str) -> bool:
        record = self._unit.states.models.get(model)
        is_asleep = record is None or record.state is ModelState.ASLEEP
        own = workers_of(model, self._unit.workers.values())
        return is_asleep and all(worker.engine is worker.told for worker in own)

    async def _until(self, is_done: Callable[[], bool]) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waits[future] = is_done
        try:
            self._service.changed()
            await future
        finally:
            del self._waits[future]


def _check_is_local(context: Context) -> None:
    if not context.peer().startswith("unix"):
        raise Unauthenticated("models are added and removed over the unix socket of the unit only, by its supervisor")
