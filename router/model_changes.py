"""Models that come and go while a router runs: it follows the runtime file.

A change does not affect running requests. The limits on the size of messages and connections stay those of the models
with which the router started.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from muxmesh.config.runtime import MeshRuntime
from muxmesh.models.prepared_model import kv_identity, model_spec
from router.request_metrics import RequestMetrics
from router.served_models import ServedModels, load_model, warn_of_chat
from router.unit_link import PlacedModel
from router.units import Units

_log = logging.getLogger(__name__)


def placed_model(runtime: MeshRuntime, unit: str, model: str) -> PlacedModel:
    """A model of a unit as the runtime has it."""
    unit_config, config = runtime.model(unit, model)
    prepared = runtime.prepared_model(unit, model)
    shape = model_spec(prepared.folder).kv_shape(config.block_size, config.kv_dtype)
    capacity_tokens = unit_config.capacity_tokens(config, shape.token_block_bytes)
    return PlacedModel(config, kv_identity(unit_config, config, prepared), capacity_tokens)


class ModelChanges:
    """Adds and removes what a router has of a model. One change at a time."""

    def __init__(self, runtime_file: Path, models: ServedModels, units: Units, metrics: RequestMetrics) -> None:
        self._runtime_file = runtime_file
        self._models = models
        self._units = units
        self._metrics = metrics
        self._changing = asyncio.Lock()

    async def read_runtime(self) -> None:
        """Serves the models that the runtime file names now. Raises ConfigError if a file of them cannot be read."""
        async with self._changing:
            runtime = await asyncio.to_thread(MeshRuntime.read, self._runtime_file)
            named, served = runtime.config.models().keys(), {model.name for model in self._models}
            for name in served - named:
                self._remove(name)
            for name in sorted(named - served):
                await self._add(runtime, name)

    async def _add(self, runtime: MeshRuntime, name: str) -> None:
        model = await asyncio.to_thread(load_model, runtime, name)
        for link in self._units:
            if link.name in model.units:
                link.add_model(name, placed_model(runtime, link.name, name))
        self._metrics.add_model(name, model.limits.max_model_len)
        self._models.add(model)
        warn_of_chat(model)
        _log.info("serves %s, on %s", name, ", ".join(model.units))

    def _remove(self, name: str) -> None:
        self._models.remove(name)
        for link in self._units:
            link.remove_model(name)
        self._metrics.remove_model(name)
        _log.info("serves %s no more", name)
