"""Which models of a mesh are profiled, and what bounds their measurements. Starts nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import PreparedModel
from muxmesh.config.schema import MeshConfig, UnitConfig
from muxmesh.errors import ConfigError
from muxmesh.models.model_spec import KvShape, ModelSpec
from muxmesh.models.prepared_model import model_spec
from muxmesh.placement.measured_cells import Cell
from muxmesh.profiler.grid import ModelLimits, num_kv_tokens
from muxmesh.quoting import named
from muxmesh.types import blocks_for

_TIMED = (
    "engine", "dtype", "kv_cache_dtype", "block_size", "prefill_token_budget", "threads", "cuda_graphs",
    "continuous_decode_steps", "sim",
)  # fmt: skip
"""Settings of a model that its step times depend on."""


@dataclass(frozen=True, slots=True)
class ProfiledModel:
    """A model on a unit, prepared for its device."""

    unit: UnitConfig
    config: ModelConfig
    prepared: PreparedModel
    spec: ModelSpec

    @property
    def source(self) -> str:
        """The name of the model in a profile: that of its files, since a plan may serve it under any name."""
        return self.config.source or self.config.name

    @property
    def shape(self) -> KvShape:
        return self.spec.kv_shape(self.config.block_size, self.config.kv_dtype)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weight image; 1 for the sim engine, which has none."""
        return 1 if self.prepared.image is None else self.prepared.image.stat().st_size

    @property
    def max_model_len(self) -> int:
        return self.config.max_model_len or self.spec.context_len

    @property
    def limits(self) -> ModelLimits:
        max_kv_tokens = self.unit.capacity_tokens(self.config, self.shape.token_block_bytes)
        return ModelLimits(self.source, self.config.max_num_seqs, self.max_model_len, max_kv_tokens)


def profiled_models(
    config: MeshConfig, prepared: Mapping[str, Mapping[str, PreparedModel]], unit: str | None = None
) -> list[ProfiledModel]:
    """The models of the units on one kind of device, each once; only those of ``unit`` if it is given.

    On a CPU they are measured on all cores, whatever cores their units have. A model on several units is that of the
    one with the largest batch.

    Raises ConfigError if the units are on several kinds of devices, or one model has several settings: a profile has
    one table for each model.
    """
    units = [one for one in config.units if unit in (None, one.name)]
    if not units:
        raise ConfigError(f"--unit: no unit has the name {named(unit or '')}; units: {_names(config.units)}")
    if len({(one.is_cuda, one.mps, one.green_contexts) for one in units}) > 1:
        raise ConfigError(
            "the units are on different kinds of devices, or differ in mps or green_contexts; a profile is of one: "
            f"choose a unit with --unit: {_names(units)}"
        )
    found: dict[str, ProfiledModel] = {}
    for on, model in ((one, model) for one in units for model in one.models):
        files = prepared[on.name][model.name]
        whole = on.model_copy(update={"cores": None})
        profiled = ProfiledModel(whole, model, files, model_spec(files.folder))
        before = found.setdefault(profiled.source, profiled)
        if model.max_num_seqs > before.config.max_num_seqs:
            found[profiled.source] = profiled
        if differing := list(_differences(before.config, model)):
            raise ConfigError(
                f"{before.config.name} and {model.name} are the same model with another {', '.join(differing)}; "
                "profile them into two files"
            )
    return list(found.values())


def _differences(one: ModelConfig, other: ModelConfig) -> Iterator[str]:
    return (field for field in _TIMED if getattr(one, field) != getattr(other, field))


def _names(units: Sequence[UnitConfig]) -> str:
    return ", ".join(one.name for one in units)


def pool_bytes(model: ProfiledModel, cells: Sequence[Cell]) -> int:
    """Bytes of the KV pool that each of ``cells`` needs of a model, in whole slabs; at most the unit's pool."""
    num_blocks = blocks_for(max(map(num_kv_tokens, cells)), model.config.block_size)
    num_slabs = blocks_for(num_blocks, model.unit.slab // model.shape.token_block_bytes)
    return min(num_slabs, model.unit.kv_pool // model.unit.slab) * model.unit.slab
