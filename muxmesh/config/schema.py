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

from muxmesh.order import Order, Policy
from muxmesh.types import DEFAULT_ADDRESS, KvFormat

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]

DEFAULT_MODEL = "smollm2-135m-instruct"
MIB = 1024 * 1024
LAST_PORT = 65535

Location = tuple[str | int, ...]
"""Path of a field: names and list indices."""


class Section(BaseModel):
    """Base of every part of the configuration: unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: object, field: ValidationInfo) -> object:
        """YAML's `yes` and `on` would count as 1."""
        kind = cls.model_fields[field.field_name or ""].annotation
        if isinstance(value, bool) and any(one in (int, float, ByteSize) for one in (kind, *get_args(kind))):
            raise ValueError(f"is {str(value).lower()}; a number is needed")
        return value


class SimProfile(Section):
    """Step times of the sim engine: ``base_s + per_token_s * tokens in the step + per_context_s * earlier tokens that
    they look back at, summed``.
    """

    base_s: float = Field(default=0.0, ge=0, le=3600)
    """Seconds of an empty step."""
    per_token_s: float = Field(default=0.0, ge=0, le=3600)
    """Seconds for each token computed in the step."""
    per_context_s: float = Field(default=0.0, ge=0, le=3600)
    """Seconds for each earlier token that a token in the step looks back at."""
    output_tokens: int = Field(default=0, ge=0)
    """Answers end by themselves after so many tokens; 0: only at max_new_tokens."""
    output_lengths: Literal["equal", "geometric"] = "equal"
    """`geometric`: each token is the last with a chance of one in `output_tokens`, drawn from the token before it, its
    place and the seed; with a seed of its own, nobody can tell in advance how long an answer gets."""

    @model_validator(mode="after")
    def _lengths_have_a_mean(self) -> Self:
        if self.output_lengths == "geometric" and self.output_tokens == 0:
            raise ValueError("output_lengths: geometric needs output_tokens, the mean length")
        return self


class ModelConfig(Section):
    """One model, served by one prefill and one decode worker of its unit."""

    name: Name
    """What clients write into GenerateRequest.model."""
    source: str | None = None
    """A catalog name (`muxmesh model list`), a folder in Hugging Face style or a GGUF file. Unset: the catalog name
    `name`."""
    engine: Literal["torch", "sim"] = "torch"
    """`torch` computes; `sim` gives deterministic tokens at the speed of `sim`, for tests and load."""
    dtype: Literal["float32"] = "float32"
    """Of weights, activations and KV."""
    block_size: Literal[8, 16, 32] = 16
    """Tokens in a KV block."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Prompt and answer together, in tokens. Unset: the model's own context length."""
    default_max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer, in tokens, for a request that does not say; it is cut to what context and pool hold."""
    max_num_seqs: int = Field(default=16, ge=1, le=1024)
    """Requests in prefill and decode at the same time."""
    kv_answer_tokens: int = Field(default=128, ge=1)
    """Room for so much of the answer is reserved before a request starts. More is taken while the answer grows; if the
    pool has no more, the answer gives way: its KV goes to `kv_swap`, or is given back, and it goes on when there is
    room."""
    kv_guaranteed: ByteSize = Field(default=ByteSize(0), ge=0)
    """Memory of the unit's pool that this model can count on, like `512MiB`, in whole slabs. What it does not use is
    lent to others and comes back as their requests end, after a second by making them give way. The rest of the pool
    is shared out equally at first, then by use."""
    kv_swap_format: KvFormat = "raw"
    """What is written to `kv_swap`: `raw` is exact. `int8` takes a quarter of the room and changes an answer that was
    swapped a little; what came back from it is never shared through the prefix cache."""
    prefill_token_budget: int = Field(default=128, ge=1)
    """Prompt tokens computed in one step: a longer prompt is computed in chunks, smaller ones deep in a long prompt.
    A step is what other workers wait for and what a cancelled request still finishes. `max_num_seqs` is used if that
    is more."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of each worker. Unset: every core that the process may use; only one worker of a unit computes
    at a time."""
    sim: SimProfile = SimProfile()
    """For `engine: sim`."""


class UnitConfig(Section):
    """The models placed on one device, sharing its memory."""

    name: Name = "unit0"
    """Unique in the mesh."""
    device: Literal["cpu"] = "cpu"
    """Where the unit computes."""
    kv_pool: ByteSize = Field(default=ByteSize(1024 * MIB), ge=MIB)
    """Memory for the KV cache of all models, like `2GiB`."""
    kv_swap: ByteSize = Field(default=ByteSize(0), ge=0)
    """Host memory for the KV of answers that give way when `kv_pool` is full, and come back when there is room. 0:
    their KV is dropped and computed again. On a CPU a larger `kv_pool` is better, unless `kv_swap_format` is int8."""
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
    """Limits at the door."""

    max_waiting_requests: int = Field(default=4096, ge=1)
    """More waiting requests than this are refused with RESOURCE_EXHAUSTED."""
    max_prompt_bytes: ByteSize = Field(default=ByteSize(1 * MIB), ge=1)
    """Longest prompt text, before tokenizing."""
    max_restarts: int = Field(default=5, ge=0)
    """How often in a row one request is computed again when no attempt gets past its first token."""
    predictor_budget_s: float = Field(default=0.05, gt=0, le=60)
    """A prediction of the answer's length that takes longer is done without."""


class OrderConfig(Section):
    """Who goes first among requests of one priority, everywhere in the mesh."""

    policy: Policy = "srtf-aged"
    """`fcfs`: by arrival. `sjf`, `srtf`: least predicted work first, whole or left. `srtf-aged`: the same, but whoever
    waits gets older. `hrrn`: by the ratio of waiting and work. `mlfq`: by what was used, without predictions.
    Nobody who has begun is pre-empted: between requests that wait for the first time `srtf` is `sjf`, and `mlfq` is
    `fcfs` but for long prompts."""
    longest_lead: float = Field(default=100.0, ge=0, le=1e6)
    """For `srtf-aged`: no request is overtaken by one of its priority that came later than so many times the work of
    a typical request. 0 is `fcfs`."""
    longest_lead_s: float | None = Field(default=None, ge=0, le=1e9)
    """For `srtf-aged`: the same in seconds; the smaller one counts. Far less than `longest_lead` comes to makes the
    order that of arrival."""
    mlfq_quantum_s: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """For `mlfq`: seconds of work at the first level; each level has twice that of the one before."""
    trace: bool = False
    """A line in the kvstore's log for each request that is let in: which, how many it overtook, and why."""

    def order(self) -> Order:
        """The function itself."""
        longest_s = math.inf if self.longest_lead_s is None else self.longest_lead_s
        return Order(self.policy, self.longest_lead, longest_s, self.mlfq_quantum_s)


_ORDER_FIELDS: dict[str, Policy] = {
    "longest_lead": "srtf-aged",
    "longest_lead_s": "srtf-aged",
    "mlfq_quantum_s": "mlfq",
}
"""Settings of one policy alone."""


class MeshConfig(Section):
    """A whole mesh: `mesh.yaml`."""

    listen: str = Field(default=DEFAULT_ADDRESS, pattern=r"^.+:\d{1,5}$")
    """HOST:PORT of the public API."""
    redis_url: str | None = Field(default=None, pattern=r"^(redis|rediss|unix)://")
    """A Redis of your own. Unset: the mesh starts one on a private socket."""
    router: RouterConfig = RouterConfig()
    """Limits at the door."""
    order: OrderConfig = OrderConfig()
    """Who goes first."""
    units: tuple[UnitConfig, ...] = Field(
        default=(UnitConfig(models=(ModelConfig(name=DEFAULT_MODEL),)),), min_length=1
    )
    """One for each device."""

    def models(self) -> dict[str, tuple[UnitConfig, ModelConfig]]:
        """Model name → its unit and itself."""
        return {model.name: (unit, model) for unit in self.units for model in unit.models}


def order_without_effect(config: MeshConfig) -> Iterator[tuple[Location, str]]:
    """Settings of another policy than the one in use."""
    for field, policy in _ORDER_FIELDS.items():
        if field in config.order.model_fields_set and config.order.policy != policy:
            yield ("order", field), f"has no effect with policy: {config.order.policy}; it is for {policy}"


def contradictions(config: MeshConfig) -> Iterator[tuple[Location, str]]:
    """Fields that are right by themselves and wrong together, each with what would be right."""
    if int(config.listen.rpartition(":")[2]) > LAST_PORT:
        yield ("listen",), f"the last port is {LAST_PORT}"
    units: set[str] = set()
    models: set[str] = set()
    devices: dict[str, str] = {}
    for unit_index, unit in enumerate(config.units):
        place: Location = ("units", unit_index)
        if unit.name in units:
            yield (*place, "name"), f"{unit.name!r} is the name of another unit"
        if unit.device in devices:
            yield (
                (*place, "device"),
                f"{unit.device!r} is the device of unit {devices[unit.device]}; put all models there",
            )
        if unit.slab > unit.kv_pool:
            yield (*place, "slab"), f"{unit.slab} bytes do not fit into kv_pool ({unit.kv_pool} bytes)"
        guaranteed, slabs = sum(map(unit.guaranteed_slabs, unit.models)), unit.kv_pool // unit.slab
        if guaranteed > slabs:
            yield (
                (*place, "kv_pool"),
                f"has {slabs} slabs; the models' kv_guaranteed are {guaranteed} slabs of {unit.slab} bytes",
            )
        units.add(unit.name)
        devices.setdefault(unit.device, unit.name)
        for model_index, model in enumerate(unit.models):
            model_place: Location = (*place, "models", model_index)
            if model.name in models:
                yield (*model_place, "name"), f"{model.name!r} is the name of another model"
            if model.engine != "sim" and "sim" in model.model_fields_set:
                yield (*model_place, "sim"), "has no effect with this engine; write `engine: sim`"
            models.add(model.name)
