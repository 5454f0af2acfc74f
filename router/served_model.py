"""What the router knows of a model: limits, tokenizer, template. No weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from muxmesh.config.runtime import MeshRuntime
from muxmesh.config.schema import ModelConfig
from muxmesh.errors import ModelNotFound
from muxmesh.models.prepare import model_spec
from muxmesh.models.spec import ModelSpec
from muxmesh.models.tokenizer import TextModel, load_text_model


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model that this router serves."""

    name: str
    unit: str
    config: ModelConfig
    spec: ModelSpec
    text: TextModel
    capacity_tokens: int
    """What the whole KV pool of its unit holds."""

    @property
    def max_model_len(self) -> int:
        """Prompt and answer together, in tokens."""
        return self.config.max_model_len or self.spec.context_len


def find_model(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    """The model called ``name``. Raises ModelNotFound."""
    if name not in models:
        raise ModelNotFound(f"model: {name!r} is not served; served: {', '.join(sorted(models))}")
    return models[name]


def load_models(runtime: MeshRuntime) -> dict[str, ServedModel]:
    """Every model of the mesh. Raises ModelUnsupported if a folder has no usable tokenizer."""
    models = {}
    for name, (unit, config) in runtime.config.models().items():
        folder = runtime.prepared[name].folder
        spec = model_spec(folder)
        capacity = unit.capacity_tokens(config, spec.kv_shape(config.block_size, config.dtype).token_block_bytes)
        models[name] = ServedModel(name, unit.name, config, spec, load_text_model(folder), capacity)
    return models
