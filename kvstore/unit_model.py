"""The shape and the limits of a model on a unit, and how they follow from the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import UnitConfig
from muxmesh.kv_cost import PREFILL_CHUNK_TOKENS
from muxmesh.models.model_spec import KvShape, ModelSpec


@dataclass(frozen=True, slots=True)
class UnitModel:
    """What a unit knows of one of its models.

    ``max_num_seqs``: sequences in the batch of each worker. ``max_resident_seqs``: sequences of each worker with token
    blocks, paused ones included; None: as ``max_num_seqs``. ``guaranteed_slabs``: lower bound of the model's quota
    while it is awake. ``kv_need``: expected rate of requests x bytes of a token block; None: not known. ``is_pinned``,
    ``starts_asleep``: see `ModelStates`. ``prefill_token_budget``: prompt tokens of a prefill step.
    """

    shape: KvShape
    max_num_seqs: int
    max_model_len: int
    guaranteed_slabs: int = 0
    max_resident_seqs: int | None = None
    kv_need: float | None = None
    is_pinned: bool = False
    starts_asleep: bool = False
    prefill_token_budget: int = PREFILL_CHUNK_TOKENS

    @property
    def resident_limit(self) -> int:
        """``max_resident_seqs`` with its default."""
        return self.max_num_seqs if self.max_resident_seqs is None else self.max_resident_seqs

    @staticmethod
    def of(unit: UnitConfig, model: ModelConfig, spec: ModelSpec) -> UnitModel:
        """The limits that the configuration sets for ``model``."""
        shape = spec.kv_shape(model.block_size, model.kv_dtype)
        return UnitModel(
            shape=shape,
            max_num_seqs=model.max_num_seqs,
            max_model_len=model.max_model_len or spec.context_len,
            guaranteed_slabs=unit.guaranteed_slabs(model),
            max_resident_seqs=model.max_num_seqs + model.paused_limit,
            kv_need=None if model.expected_rate is None else model.expected_rate * shape.token_block_bytes,
            is_pinned=model.pinned,
            starts_asleep=model.start == "asleep",
            prefill_token_budget=model.step_token_budget,
        )
