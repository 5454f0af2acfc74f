"""The models that a router serves: limits, tokenizer, template, and the units that they are placed on. No weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from muxmesh.config.runtime import MeshRuntime
from muxmesh.config.schema import ModelConfig, UnitConfig
from muxmesh.errors import ModelNotFound
from muxmesh.models.model_spec import ModelSpec
from muxmesh.models.prepared_model import model_spec
from muxmesh.models.tokenizer import TextModel, load_text_model


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What limits the requests for a model, in tokens. ``capacity_tokens``: what the KV pool of a unit holds."""

    max_model_len: int
    capacity_tokens: int
    default_max_new_tokens: int
    eos_token_ids: frozenset[int]

    @staticmethod
    def of(model: ModelConfig, spec: ModelSpec, units: Sequence[tuple[UnitConfig, ModelConfig]]) -> ModelLimits:
        """Limits of a model on ``units``, each with the model as it is placed there."""
        shapes = [placed.block_size for _, placed in units]
        blocks = [spec.kv_shape(size, model.dtype).token_block_bytes for size in shapes]
        capacity = min(unit.capacity_tokens(placed, size) for (unit, placed), size in zip(units, blocks, strict=True))
        max_model_len = model.max_model_len or spec.context_len
        return ModelLimits(max_model_len, capacity, model.default_max_new_tokens, spec.eos_token_ids)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model. ``config`` is that of its first unit; what clients see of it is equal in all of them."""

    name: str
    units: tuple[str, ...]
    config: ModelConfig
    spec: ModelSpec
    text: TextModel
    limits: ModelLimits


class ServedModels:
    """Owns which models are served. Requests that run are not affected by changes."""

    def __init__(self) -> None:
        self._models: dict[str, ServedModel] = {}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def add(self, model: ServedModel) -> None:
        """Serves a model from now on, or with other properties."""
        self._models[model.name] = model

    def remove(self, name: str) -> None:
        """Serves a model no longer. Raises ModelNotFound."""
        del self._models[self.find(name).name]

    def find(self, name: str) -> ServedModel:
        """The model called ``name``. Raises ModelNotFound."""
        if name not in self._models:
            raise ModelNotFound(f"model: {name!r} is not served; served: {', '.join(sorted(self._models))}")
        return self._models[name]


def load_models(runtime: MeshRuntime) -> ServedModels:
    """Every model of the mesh. Raises ModelUnsupported if a folder has no usable tokenizer."""
    served = ServedModels()
    for name, config in runtime.config.models().items():
        folder = runtime.prepared[name].folder
        spec = model_spec(folder)
        units = [runtime.model(unit.name, name) for unit in runtime.config.units_of(name)]
        limits = ModelLimits.of(config, spec, units)
        served.add(
            ServedModel(name, tuple(unit.name for unit, _ in units), config, spec, load_text_model(folder), limits)
        )
    return served
