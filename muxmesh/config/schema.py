"""The mesh as an operator describes it. Frozen, read once; each default stands here and nowhere else.

Knows nothing of files, processes or models on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from muxmesh.scheduling_policy import PolicyName, SchedulingPolicy
from muxmesh.types import DEFAULT_ADDRESS, KvFormat

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]

DEFAULT_MODEL = "smollm2-135m-instruct"
MIB = 1024 * 1024
MAX_PORT = 65535

Location = tuple[str | int, ...]
"""Path of a field: names and list indices."""


class Section(BaseModel):
    """Base of every part of the configuration: unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: object, field: ValidationInfo) -> object:
        """YAML's `yes` and `on` would count as 1."""
        kind = cls.model_fields[field.field_name or ""].annotation
        if isinstance(value, bool) and any(one in (int, float, ByteSize) for one in (kind, *get_args(kind))):
            raise ValueError(f"is {str(value).lower()}; a number is needed")
        return value


class SimProfile(Section):
    """Step times of the sim engine: ``base_s + per_token_s * tokens in the step + per_context_s * earlier tokens that
    they attend to, summed``.
    """

    base_s: float = Field(default=0.0, ge=0, le=3600)
    """Seconds of an empty step."""
    per_token_s: float = Field(default=0.0, ge=0, le=3600)
    """Seconds for each token computed in the step."""
    per_context_s: float = Field(default=0.0, ge=0, le=3600)
    """Seconds for each earlier token that a token in the step attends to."""
    output_tokens: int = Field(default=0, ge=0)
    """Outputs end by themselves after this many tokens; 0: only at max_new_tokens."""
    output_lengths: Literal["equal", "geometric"] = "equal"
    """`geometric`: each token is the last one with probability `1 / output_tokens`, derived from the token before it,
    its index and the seed; with a seed of its own, no request's length can be told in advance."""

    @model_validator(mode="after")
    def _geometric_needs_a_mean(self) -> Self:
        if self.output_lengths == "geometric" and self.output_tokens == 0:
            raise ValueError("output_lengths: geometric needs output_tokens, the mean length")
        return self


class ModelConfig(Section):
    """One model of a unit, served there by a prefill and a decode worker."""

    name: Name
    """What clients write into GenerateRequest.model."""
    source: str | None = None
    """A catalog name (`muxmesh model list`), a folder in Hugging Face style or a GGUF file. Unset: the catalog name
    `name`."""
    engine: Literal["native", "sim"] = "native"
    """`native` computes the model. `sim` gives deterministic tokens at the speed of `sim`, for tests and load. `torch`,
    the earlier name of `native`, still works."""
    dtype: Literal["float32"] = "float32"
    """Of weights, activations and KV."""
    block_size: Literal[8, 16, 32] = 16
    """Tokens in a KV block."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Prompt and output together, in tokens. Unset: the model's own context length."""
    default_max_new_tokens: int = Field(default=512, ge=1)
    """Longest output, in tokens, of a request that gives none; limited to what context and pool hold."""
    max_num_seqs: int = Field(default=16, ge=1, le=1024)
    """Requests in prefill and decode at the same time."""
    kv_answer_tokens: int = Field(default=128, ge=1)
    """Output tokens for which KV memory is reserved before a request starts. More is allocated while the output grows;
    if the pool is full, the sequence is pre-empted: its KV is swapped to `kv_swap` or freed, and the sequence resumes
    when memory is free."""
    kv_guaranteed: ByteSize = Field(default=ByteSize(0), ge=0)
    """Memory of the unit's pool that this model can always claim, like `512MiB`, in whole slabs. What it does not use
    is lent to other models and returns as their requests end, after a second by pre-emption. The rest of the pool is
    divided equally at first, then by use."""
    kv_swap_format: KvFormat = "raw"
    """What is written to `kv_swap`: `raw` is exact. `int8` takes a quarter of the memory and changes the output of a
    swapped sequence slightly; its KV is never shared through the prefix cache afterwards."""
    prefill_token_budget: int = Field(default=128, ge=1)
    """Prompt tokens computed in one step: a longer prompt is computed in chunks, in smaller ones deep in a long prompt.
    Other workers wait for a step to end, and a cancelled request still finishes it. `max_num_seqs` is used if that is
    more."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of each worker. Unset: every core that the process may use; only one worker of a unit computes
    at a time."""
    sim: SimProfile = SimProfile()
    """For `engine: sim`."""

    @field_validator("engine", mode="before")
    @classmethod
    def _accept_the_earlier_name(cls, value: object) -> object:
        return "native" if value == "torch" else value

    @property
    def step_token_budget(self) -> int:
        """Tokens computed in one step: of prompts, beside one for each sequence that decodes."""
        return max(self.prefill_token_budget, self.max_num_seqs)


class UnitConfig(Section):
    """The models placed on one device, sharing its memory."""

    name: Name = "unit0"
    """Unique in the mesh."""
    device: Literal["cpu"] = "cpu"
    """Where the unit computes."""
    cores: tuple[Annotated[int, Field(ge=0, strict=True)], ...] | None = Field(default=None, min_length=1)
    """CPU cores that the unit's workers may use, like `[0, 1]`. Unset: all of them. Several units on one CPU need
    disjoint cores."""
    kv_pool: ByteSize = Field(default=ByteSize(1024 * MIB), ge=MIB)
    """Memory for the KV cache of all models, like `2GiB`."""
    kv_swap: ByteSize = Field(default=ByteSize(0), ge=0)
    """Host memory for the KV of sequences that are pre-empted while `kv_pool` is full. 0: their KV is freed and
    computed again. On a CPU a larger `kv_pool` is better, unless `kv_swap_format` is int8."""
    slab: ByteSize = Field(default=ByteSize(16 * MIB), ge=4096)
    """The piece of the pool that is lent to one model at a time."""
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    """At least one."""

    def capacity_tokens(self, model: ModelConfig, token_block_bytes: int) -> int:
        """Tokens of one request that the whole pool holds."""
        return self.kv_pool // self.slab * (self.slab // token_block_bytes) * model.block_size

    def guaranteed_slabs(self, model: ModelConfig) -> int:
        """`ModelConfig.kv_guaranteed` in slabs."""
        return -(-model.kv_guaranteed // self.slab)


class RouterConfig(Section):
    """Limits on requests."""

    max_waiting_requests: int = Field(default=4096, ge=1)
    """Further requests are refused with RESOURCE_EXHAUSTED while this many wait."""
    max_prompt_bytes: ByteSize = Field(default=ByteSize(1 * MIB), ge=1)
    """Longest prompt text, before tokenizing."""
    max_restarts: int = Field(default=5, ge=0)
    """How often in a row one request is computed again when no attempt gets past its first token."""
    predictor_budget_s: float = Field(default=0.05, gt=0, le=60)
    """A prediction of the output length that takes longer is not used."""


class OrderConfig(Section):
    """The scheduling order of requests of one priority, everywhere in the mesh."""

    policy: PolicyName = "srtf-aged"
    """`fcfs`: by arrival. `sjf`, `srtf`: least predicted work first, of the whole request or of what remains.
    `srtf-aged`: the same, with aging: a request that waits is overtaken by fewer and fewer. `hrrn`: by the ratio of
    waiting time and work. `mlfq`: by the work done, without predictions.
    Running sequences are not pre-empted: between requests that wait for the first time `srtf` is `sjf`, and `mlfq` is
    `fcfs` except for long prompts."""
    longest_lead: float = Field(default=100.0, ge=0, le=1e6)
    """For `srtf-aged`: no request is overtaken by one of its priority that arrived later than this many times the mean
    work of a request. 0 is `fcfs`."""
    longest_lead_s: float | None = Field(default=None, ge=0, le=1e9)
    """For `srtf-aged`: the same in seconds; the smaller one counts. A value far below `longest_lead` makes the order
    that of arrival."""
    mlfq_quantum_s: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """For `mlfq`: seconds of work at the first level; each level has twice that of the one before."""
    trace: bool = False
    """Logs a line in kvstore for each admitted request: which one, how many it overtook, and why."""

    def scheduling_policy(self) -> SchedulingPolicy:
        """The policy with its settings."""
        longest_s = math.inf if self.longest_lead_s is None else self.longest_lead_s
        return SchedulingPolicy(self.policy, self.longest_lead, longest_s, self.mlfq_quantum_s)


_ORDER_FIELDS: dict[str, PolicyName] = {
    "longest_lead": "srtf-aged",
    "longest_lead_s": "srtf-aged",
    "mlfq_quantum_s": "mlfq",
}
"""Settings of one policy alone."""

_SAME_IN_ALL_UNITS = ("source", "engine", "dtype", "sim", "max_model_len", "default_max_new_tokens")
"""What clients see of a model, and what makes it the same model: equal wherever it is placed."""


class MeshConfig(Section):
    """A whole mesh: `mesh.yaml`."""

    mesh_id: Name = "default"
    """Names the mesh in its Redis keys. Meshes that share a Redis need different ones."""
    listen: str = Field(default=DEFAULT_ADDRESS, pattern=r"^.+:\d{1,5}$")
    """HOST:PORT of the public API."""
    redis_url: str | None = Field(default=None, pattern=r"^(redis|rediss|unix)://")
    """A Redis of your own. Unset: the mesh starts one on a private socket."""
    router: RouterConfig = RouterConfig()
    """Limits on requests."""
    order: OrderConfig = OrderConfig()
    """The scheduling order."""
    units: tuple[UnitConfig, ...] = Field(
        default=(UnitConfig(models=(ModelConfig(name=DEFAULT_MODEL),)),), min_length=1
    )
    """One for each device."""

    def placements(self) -> Iterator[tuple[UnitConfig, ModelConfig]]:
        """Every model of every unit, with its unit."""
        return ((unit, model) for unit in self.units for model in unit.models)

    def models(self) -> dict[str, ModelConfig]:
        """Model name → its configuration; of a model in several units, in the first of them."""
        models: dict[str, ModelConfig] = {}
        for _, model in self.placements():
            models.setdefault(model.name, model)
        return models

    def units_of(self, model: str) -> tuple[UnitConfig, ...]:
        """The units that serve ``model``."""
        return tuple(unit for unit, placed in self.placements() if placed.name == model)


def order_without_effect(config: MeshConfig) -> Iterator[tuple[Location, str]]:
    """Settings of another policy than the one in use."""
    for field, policy in _ORDER_FIELDS.items():
        if field in config.order.model_fields_set and config.order.policy != policy:
            yield ("order", field), f"has no effect with policy: {config.order.policy}; it is for {policy}"


def contradictions(config: MeshConfig) -> Iterator[tuple[Location, str]]:
    """Fields that are right by themselves and wrong together, each with what would be right."""
    if int(config.listen.rpartition(":")[2]) > MAX_PORT:
        yield ("listen",), f"the last port is {MAX_PORT}"
    yield from _core_problems(config)
    units: set[str] = set()
    first_of: dict[str, tuple[UnitConfig, ModelConfig]] = {}
    for unit_index, unit in enumerate(config.units):
        location: Location = ("units", unit_index)
        if unit.name in units:
            yield (*location, "name"), f"{unit.name!r} is the name of another unit"
        units.add(unit.name)
        if unit.slab > unit.kv_pool:
            yield (*location, "slab"), f"{unit.slab} bytes do not fit into kv_pool ({unit.kv_pool} bytes)"
        guaranteed, slabs = sum(map(unit.guaranteed_slabs, unit.models)), unit.kv_pool // unit.slab
        if guaranteed > slabs:
            yield (
                (*location, "kv_pool"),
                f"has {slabs} slabs; the models' kv_guaranteed are {guaranteed} slabs of {unit.slab} bytes",
            )
        for model_index, model in enumerate(unit.models):
            for field, problem in _model_problems(unit, model, model_index, first_of):
                yield (*location, "models", model_index, field), problem


def _core_problems(config: MeshConfig) -> Iterator[tuple[Location, str]]:
    """Units on one CPU compute at the same time, so each of them needs cores of its own."""
    owners: dict[int, str] = {}
    for unit_index, unit in enumerate(config.units):
        location: Location = ("units", unit_index)
        if unit.cores is None:
            if len(config.units) > 1:
                yield (*location, "cores"), f"is needed: there are {len(config.units)} units on {unit.device!r}"
            continue
        if len(set(unit.cores)) < len(unit.cores):
            yield (*location, "cores"), "names a core twice"
        for core in unit.cores:
            if owners.setdefault(core, unit.name) != unit.name:
                yield (*location, "cores"), f"core {core} belongs to unit {owners[core]}; cores are not shared"
        for model_index, model in enumerate(unit.models):
            if model.threads is not None and model.threads > len(unit.cores):
                yield (
                    (*location, "models", model_index, "threads"),
                    f"is {model.threads}; the unit has {len(unit.cores)} cores",
                )


def _model_problems(
    unit: UnitConfig, model: ModelConfig, index: int, first_of: dict[str, tuple[UnitConfig, ModelConfig]]
) -> Iterator[tuple[str, str]]:
    """(field, problem) of one model. ``first_of``: the models before it, by name; this one is added."""
    if any(other.name == model.name for other in unit.models[:index]):
        yield "name", f"{model.name!r} is the name of another model"
    first_unit, first = first_of.setdefault(model.name, (unit, model))
    for field in _SAME_IN_ALL_UNITS:
        if getattr(first, field) != getattr(model, field):
            yield field, f"differs from {model.name!r} in unit {first_unit.name}; it has to be equal in every unit"
    if model.engine != "sim" and "sim" in model.model_fields_set:
        yield "sim", "has no effect with this engine; write `engine: sim`"
