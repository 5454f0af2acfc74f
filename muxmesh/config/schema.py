"""The fields of mesh.yaml with their units, defaults and limits. Frozen; every default is defined here only.

Knows no files, processes or models on disk, and not which cores this machine has.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Iterator
from typing import Annotated, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from muxmesh.errors import ConfigError
from muxmesh.log_format import LogFormat
from muxmesh.quoting import quoted
from muxmesh.scheduling_policy import PolicyName, SchedulingPolicy
from muxmesh.types import DEFAULT_ADDRESS, MAX_PORT, Dtype, KvFormat, Role

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=64)]

DEFAULT_MODEL = "smollm2-135m-instruct"
MIB = 1024 * 1024
MAX_COUNT = 2**31 - 1
"""Upper bound of every number of tokens, threads or requests."""
MAX_BYTES = 2**60
"""Upper bound of every size."""
_SIZE = re.compile(r"\d+(\.\d+)?\s*([kmgtp]i?)?b?", re.IGNORECASE)
SIZE_NEEDED = "must be bytes, or a number and one of KiB, MiB, GiB, TiB, KB, MB, GB, TB"
HOST_NEEDED = "must be a DNS name or an address, without a port"
NETWORK_NEEDED = "must be an address or a network like 10.1.0.0/16"

Location = tuple[str | int, ...]
"""Path of a field: names and list indices."""


class Section(BaseModel):
    """Base of all parts of the configuration. Unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_what_pydantic_misreads(cls, value: object, field: ValidationInfo) -> object:
        """YAML's `yes` and `on` are True, which would become 1; of a size only the beginning would be read."""
        kind = cls.model_fields[field.field_name or ""].annotation
        if isinstance(value, bool) and any(one in (int, float, ByteSize) for one in (kind, *get_args(kind))):
            raise ValueError(f"is {str(value).lower()}; must be a number")
        if kind is ByteSize and isinstance(value, str) and not _SIZE.fullmatch(value.strip()):
            raise ValueError(f"is {quoted(value)}; {SIZE_NEEDED}")
        return value


class SimProfile(Section):
    """Step times of the sim engine, in seconds.

    A step that computes n tokens, which together attend to c earlier tokens, takes
    ``base_s + per_token_s * n + per_context_s * c``.
    """

    base_s: float = Field(default=0.0, ge=0, le=3600)
    """Seconds of each step."""
    per_token_s: float = Field(default=0.0, ge=0, le=3600)
    """Additional seconds for each token that the step computes."""
    per_context_s: float = Field(default=0.0, ge=0, le=3600)
    """Additional seconds for each earlier token that a token of the step attends to."""
    output_tokens: int = Field(default=0, ge=0, le=MAX_COUNT)
    """Output length in tokens at which the engine samples EOS. 0: outputs end at max_new_tokens only."""
    output_lengths: Literal["equal", "geometric"] = "equal"
    """`equal`: all outputs have `output_tokens` tokens. `geometric`: each token is the last one with probability
    `1 / output_tokens`, computed from the previous token, the index and the seed."""

    @model_validator(mode="after")
    def _geometric_needs_a_mean(self) -> Self:
        if self.output_lengths == "geometric" and self.output_tokens == 0:
            raise ValueError("output_lengths: geometric needs output_tokens, the mean length")
        return self


class ComputeShare(Section):
    """The largest part of the device's streaming multiprocessors (SMs) that a worker may use, in percent."""

    prefill: int = Field(default=100, ge=1, le=100)
    """Of the prefill worker."""
    decode: int = Field(default=100, ge=1, le=100)
    """Of the decode worker."""

    def of(self, role: Role) -> int:
        return self.prefill if role == Role.PREFILL else self.decode

    @property
    def is_limit(self) -> bool:
        """Whether a worker may use less than the whole device."""
        return min(self.prefill, self.decode) < 100


class ModelConfig(Section):
    """One model of a unit, served there by a prefill and a decode worker."""

    name: Name
    """The value of GenerateRequest.model for this model."""
    source: str | None = None
    """A catalog name (`muxmesh model list`), a folder in Hugging Face format or a GGUF file. Unset: the catalog name
    `name`."""
    engine: Literal["native", "sim"] = "native"
    """`native` computes the model. `sim` generates deterministic tokens with the step times in `sim`, for tests.
    `torch` is an alias of `native`."""
    dtype: Dtype = "float32"
    """Data type of weights and activations: `float32`, `float16` or `bfloat16`. A CPU computes in float32 only. On a
    GPU float32 is exact (no TF32), and bfloat16 is what most models are published in."""
    kv_cache_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Data type of KV. `auto`: that of `dtype`. On a GPU a model in float32 may keep its KV in half the memory."""
    compute_share: ComputeShare = ComputeShare()
    """Part of the GPU that each worker of the model may use, like `{prefill: 60, decode: 40}`, or one number for both.
    A limit, not a reservation: the sum of all workers may exceed 100."""
    cuda_graphs: bool = True
    """On a GPU: decode steps are captured once for each batch size (1, 2, 4, ... `max_num_seqs`) and replayed."""
    continuous_decode_steps: int | None = Field(default=None, ge=1, le=256)
    """On a GPU, or with `engine: sim`: how many decode steps a worker computes in a row before it schedules again, so
    that the device does not wait for the host after each token. Their tokens are sent together. A run ends early when
    another worker waits for the device, when a request arrives, is cancelled or pre-empted, and after 20 ms. 1: each
    token is sent by itself. Unset: 16, with `engine: sim` 1."""
    block_size: Literal[8, 16, 32] = 16
    """Tokens in a KV block."""
    max_model_len: int | None = Field(default=None, ge=2, le=MAX_COUNT)
    """Limit on prompt and output together, in tokens. Unset: the context length of the model."""
    default_max_new_tokens: int = Field(default=512, ge=1, le=MAX_COUNT)
    """Longest output, in tokens, of a request without max_new_tokens. Context length and KV pool limit it further."""
    generation_config: Literal["auto", "ignore"] = "auto"
    """`auto`: where a request leaves a sampling parameter unset, the value in the model's `generation_config.json`
    applies, and its `max_new_tokens` limits `default_max_new_tokens`. `ignore`: sampling is unmodified unless a request
    asks for more. Ids of end-of-sequence tokens are read from the file in both cases."""
    max_num_seqs: int = Field(default=16, ge=1, le=1024)
    """Sequences in prefill and decode at the same time."""
    kv_answer_tokens: int = Field(default=128, ge=1, le=MAX_COUNT)
    """Output tokens for which KV memory is reserved before a request starts. More is allocated as the output grows. If
    the pool is full, the sequence is pre-empted: its KV is swapped to `kv_swap` or freed, and the sequence resumes when
    memory is free."""
    kv_guaranteed: ByteSize = Field(default=ByteSize(0), ge=0, le=MAX_BYTES)
    """KV memory that this model can always claim from the unit's pool, like `512MiB`, rounded up to whole slabs. Unused
    slabs are lent to other models. They return as the requests of these models end, and by pre-emption after a second.
    The rest of the pool is divided equally at first and by use later."""
    kv_swap_format: KvFormat = "raw"
    """Format of KV in `kv_swap`. `raw` is exact. `int8` needs a quarter of the memory of float32, half of that of
    the other types, but slightly changes the output of a swapped sequence, and its KV does not enter the prefix
    cache."""
    prefill_token_budget: int = Field(default=128, ge=1, le=MAX_COUNT)
    """Prompt tokens computed in one step, or `max_num_seqs` if that is larger. A longer prompt is computed in chunks,
    which get smaller as the context grows. Other workers of the unit and cancelled requests wait until a step ends. 128
    suits a CPU; a GPU is fast from about 2048 on."""
    threads: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """Threads of each worker on a CPU. Unset: one for each core of the unit, and at most the quota of cores of its
    cgroup (container, service), rounded up. Only one worker of a unit computes at a time."""
    sim: SimProfile = SimProfile()
    """Step times and output lengths of `engine: sim`. An error with other engines."""

    @field_validator("engine", mode="before")
    @classmethod
    def _accept_torch_as_native(cls, value: object) -> object:
        return "native" if value == "torch" else value

    @field_validator("compute_share", mode="before")
    @classmethod
    def _accept_one_share_for_both(cls, value: object) -> object:
        if isinstance(value, (dict, ComputeShare)):
            return value
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 100:
            return {"prefill": value, "decode": value}
        raise PydanticCustomError("share", "must be percent from 1 to 100, or two like {prefill: 60, decode: 40}")

    @property
    def kv_dtype(self) -> Dtype:
        """Data type of KV: `kv_cache_dtype` resolved."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    @property
    def max_decode_steps(self) -> int:
        """`continuous_decode_steps` resolved."""
        return self.continuous_decode_steps or (1 if self.engine == "sim" else 16)

    @property
    def step_token_budget(self) -> int:
        """Tokens computed in one step. At least `max_num_seqs`, so that each step has a token of every sequence."""
        return max(self.prefill_token_budget, self.max_num_seqs)


class NetworkConfig(Section):
    """Addresses at which routers on other hosts reach the processes of a unit, beside their unix sockets.

    These services have neither TLS nor authentication: who can connect to them can use the models, end the requests of
    others and read what passes. A firewall or a NetworkPolicy has to admit routers only.
    """

    host: str = Field(pattern=r"^[A-Za-z0-9:][A-Za-z0-9._:-]*$", max_length=253)
    """DNS name or address of the unit's host. The processes of the unit listen on it if it is an address, and on all
    interfaces if it is a name."""
    base_port: int = Field(default=50100, ge=1, le=MAX_PORT)
    """Port of the unit's kvstore. The next ports are those of the workers, in the order of the models in the file: the
    first model has `base_port + 1` for prefill and `base_port + 2` for decode."""
    allow_unencrypted: bool = False
    """Has to be true unless `host` is a loopback address: the traffic is not encrypted, and callers are not checked."""

    @field_validator("host", mode="after")
    @classmethod
    def _refuse_a_port(cls, value: str) -> str:
        if ":" in value:
            try:
                ipaddress.IPv6Address(value)
            except ValueError:
                raise ValueError(f"is {quoted(value)}; {HOST_NEEDED}") from None
        return value

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can connect."""
        address = self._address
        return self.host == "localhost" if address is None else address.is_loopback

    @property
    def listen_host(self) -> str:
        """The host part of the addresses on which the processes listen."""
        return "0.0.0.0" if self._address is None and self.host != "localhost" else self.url_host

    @property
    def url_host(self) -> str:
        """`host` as it stands before a colon and a port."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def _address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None


class UnitConfig(Section):
    """Models that share one device and its KV memory."""

    name: Name = "unit0"
    """Unique in the mesh."""
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda:\d{1,3})$")
    """The device that the unit computes on: `cpu`, or `cuda:N` for a whole GPU. N is CUDA's index: among the GPUs that
    CUDA_VISIBLE_DEVICES names when the mesh starts, else among all, which `nvidia-smi` may list in another order. An
    instance of a GPU in MIG mode is refused."""
    mps: Literal["auto", "on", "off"] = "auto"
    """Whether the workers of a GPU are clients of CUDA MPS, which lets them compute at the same time and limits each to
    its `compute_share`. `auto`: if this machine has nvidia-cuda-mps-control. `on`: the mesh does not start without it.
    The supervisor starts a daemon for each GPU. Without MPS one worker of the unit computes at a time, and
    `compute_share` needs `green_contexts`."""
    green_contexts: bool = False
    """Limits workers to their `compute_share` by green contexts of their own instead of by MPS percentages. Needs
    compute capability 9.0."""
    require_ipc: bool = False
    """If true, the unit refuses to start unless its KV is handed over by GPU IPC (shared device memory)."""
    legacy_ipc: bool = False
    """If true, device memory is shared by legacy IPC handles instead of file descriptors, as it always is if the device
    exports none. kvstore then needs a context on the GPU, and the processes of the unit one PID namespace."""
    cores: tuple[Annotated[int, Field(ge=0, strict=True)], ...] | None = Field(default=None, min_length=1)
    """CPU cores of the unit's workers, like `[0, 1]`. Unset: all cores. Required if several units are on one CPU; their
    cores must be disjoint."""
    kv_pool: ByteSize = Field(default=ByteSize(1024 * MIB), ge=MIB, le=MAX_BYTES)
    """KV memory of all models of the unit, like `2GiB`. On a CPU it is memory of the machine, allocated as it is used.
    If a cgroup (container, service) limits the memory of kvstore, all of it is allocated when kvstore starts, so that
    it counts to that cgroup. On a GPU it is device memory, beside one copy of the weights of each model and 0.75 GiB
    for each worker, more if its batches or its vocabulary are large."""
    kv_swap: ByteSize = Field(default=ByteSize(0), ge=0, le=MAX_BYTES)
    """Host memory for the KV of sequences that are pre-empted when `kv_pool` is full. 0: their KV is freed and computed
    again. On a CPU a larger `kv_pool` is better, unless `kv_swap_format` is int8. For a GPU it is pinned when first
    used."""
    slab: ByteSize = Field(default=ByteSize(16 * MIB), ge=4096, le=MAX_BYTES)
    """Size of the pieces of the pool. Each slab is lent to one model at a time. On a GPU a multiple of 64 bytes."""
    network: NetworkConfig | None = None
    """For routers on other hosts. Unset: the unit's processes listen on unix sockets only, for this host."""
    models: tuple[ModelConfig, ...] = Field(min_length=1)
    """At least one."""

    @field_validator("mps", mode="before")
    @classmethod
    def _accept_what_yaml_reads_as_booleans(cls, value: object) -> object:
        """YAML's `on` and `off` are True and False."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @property
    def is_cuda(self) -> bool:
        return self.device != "cpu"

    @property
    def device_index(self) -> int:
        """N of `cuda:N`; 0 for the CPU."""
        return int(self.device.partition(":")[2] or 0)

    @property
    def ports(self) -> range:
        """The ports of the unit's processes, kvstore first; empty without `network`."""
        first, num = (self.network.base_port, 1 + 2 * len(self.models)) if self.network else (0, 0)
        return range(first, first + num)

    def capacity_tokens(self, model: ModelConfig, token_block_bytes: int) -> int:
        """Tokens of ``model`` that the whole pool holds, where a token block is ``token_block_bytes`` long."""
        return self.kv_pool // self.slab * (self.slab // token_block_bytes) * model.block_size

    def guaranteed_slabs(self, model: ModelConfig) -> int:
        """`ModelConfig.kv_guaranteed` in slabs, rounded up."""
        return -(-model.kv_guaranteed // self.slab)


def _refuse_numbers(value: object) -> object:
    """A number would be read as the 32 bits of an address."""
    if isinstance(value, int):
        raise ValueError(f"is {str(value).lower()}; {NETWORK_NEEDED}")
    return value


class RouterConfig(Section):
    """Limits of the router on requests."""

    max_waiting_requests: int = Field(default=4096, ge=1, le=MAX_COUNT)
    """Capacity of the queue. While it is full, new requests fail with RESOURCE_EXHAUSTED."""
    max_prompt_bytes: ByteSize = Field(default=ByteSize(1 * MIB), ge=1, le=32 * MIB)
    """Longest prompt text in bytes of UTF-8, checked before tokenization. The size limit of a request message follows
    from it: the text, the token ids of the longest context and of the largest vocabulary, and every other field."""
    max_waiting_prompt_bytes: ByteSize = Field(default=ByteSize(64 * MIB), ge=1, le=MAX_BYTES)
    """Text of long prompts that wait to be tokenized, together. A further one fails with RESOURCE_EXHAUSTED."""
    max_restarts: int = Field(default=5, ge=0, le=MAX_COUNT)
    """Limit on consecutive retries of a request whose attempts fail with at most one new token."""
    predictor_budget_s: float = Field(default=0.05, gt=0, le=60)
    """Time limit for predicting the output length of a request. A later prediction is ignored."""
    max_connections: int = Field(default=2048, ge=1, le=1_000_000)
    """Connections of all clients. A further one is closed. The limit on open files, less 256, is a limit too."""
    max_idle_connection_s: float = Field(default=300, ge=1, le=86400)
    """Seconds after which a connection without a call is closed. A client connects again with its next call."""
    max_calls_per_client: int = Field(default=4096, ge=1, le=1_000_000)
    """Calls in progress of one client address (of IPv6: one /64 network); a further one fails with RESOURCE_EXHAUSTED.
    Also the limit of one connection, above which gRPC clients hold calls back."""
    exempt_clients: tuple[Annotated[IPvAnyNetwork, BeforeValidator(_refuse_numbers)], ...] = ()
    """Addresses or networks, like `[10.0.0.5, 10.1.0.0/16]`, to which max_calls_per_client does not apply: servers that
    are the one client of many users. Clients of the router's unix socket are exempt too."""
    slow_client_s: float = Field(default=30, ge=0.1, le=3600)
    """Seconds after which a call ends whose request has not arrived, or whose output the client has not read."""
    log_requests: bool = True
    """If true, the router logs a line for each request that ends: tokens, seconds in queue, prefill and decode, what it
    waited for, and how it ended. The line has no text of prompts or outputs."""


class OrderConfig(Section):
    """The scheduling policy for requests of equal priority, in router, unit and engine."""

    policy: PolicyName = "srtf-aged"
    """`fcfs`: by arrival. `sjf`: least predicted work first. `srtf`: least predicted remaining work first. `srtf-aged`:
    `srtf` with aging, so that ever fewer later requests overtake a waiting one. `hrrn`: highest ratio of waiting time
    to remaining work first. `mlfq`: least work done first, without predictions.
    A policy does not pre-empt running sequences. So among requests that have not started, `srtf` equals `sjf`, and
    `mlfq` equals `fcfs` except for long prompts."""
    longest_lead: float = Field(default=100.0, ge=0, le=1e6)
    """For `srtf-aged`: the largest difference in arrival time at which a later request overtakes an earlier one of the
    same priority, in multiples of the mean work of a request. 0 is `fcfs`."""
    longest_lead_s: float | None = Field(default=None, ge=0, le=1e9)
    """For `srtf-aged`: the same limit in seconds. The smaller limit applies. A value far below `longest_lead` times
    the mean work makes the order that of arrival."""
    mlfq_quantum_s: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """For `mlfq`: quantum of the first level, in seconds of work. The quantum doubles with each level."""
    trace: bool = False
    """If true, kvstore logs each admitted request with the number of requests that it overtook and the reason."""

    def scheduling_policy(self) -> SchedulingPolicy:
        longest_s = math.inf if self.longest_lead_s is None else self.longest_lead_s
        return SchedulingPolicy(self.policy, self.longest_lead, longest_s, self.mlfq_quantum_s)


class MetricsConfig(Section):
    """The HTTP endpoint of `muxmesh up`, with the metrics of all of its processes."""

    listen: str = Field(pattern=r"^.+:\d{1,5}$")
    """HOST:PORT of `/metrics` for Prometheus, `/live` and `/ready`, like `127.0.0.1:9464`. Port 0 is a free one, which
    is printed at the start. It has neither encryption nor a password, and no text of prompts or outputs."""


class MeshConfig(Section):
    """The root of `mesh.yaml`."""

    mesh_id: Name = "default"
    """Part of every Redis key. Meshes that share a Redis need different ids."""
    listen: str = Field(default=DEFAULT_ADDRESS, pattern=r"^.+:\d{1,5}$")
    """HOST:PORT of the public API."""
    redis_url: str | None = Field(default=None, pattern=r"^(redis|rediss|unix)://")
    """URL of an existing Redis. Unset: the supervisor starts a redis-server on a private socket."""
    log_format: LogFormat | None = None
    """Format of the logs of all processes: `text`, or `json` with one object per line. Unset: that in the environment
    variable MUXMESH_LOG_FORMAT, which also applies to what is logged before this file is read; else text."""
    metrics: MetricsConfig | None = None
    """The HTTP endpoint of `muxmesh up`. Unset: none. Services that run without it have their own, by `--metrics`."""
    router: RouterConfig = RouterConfig()
    """Limits of the router on requests, and its log of them."""
    order: OrderConfig = OrderConfig()
    """The scheduling policy."""
    units: tuple[UnitConfig, ...] = Field(
        default=(UnitConfig(models=(ModelConfig(name=DEFAULT_MODEL),)),), min_length=1
    )
    """The units of the mesh."""

    @model_validator(mode="after")
    def _metrics_need_a_port_of_their_own(self) -> Self:
        if self.metrics is not None and self.metrics.listen == self.listen and not self.listen.endswith(":0"):
            raise ValueError(f"metrics.listen: {self.listen} is the address of the public API; choose another port")
        return self

    def with_listen(self, listen: str) -> MeshConfig:
        """The same with another address of the public API. Raises ConfigError if ``listen`` is not HOST:PORT."""
        try:
            return MeshConfig.model_validate({**self.model_dump(exclude_unset=True), "listen": listen})
        except ValidationError as error:
            raise ConfigError(f"listen: is {quoted(listen)}; HOST:PORT is needed") from error

    def check_port_is_fixed(self) -> None:
        """Raises ConfigError if ``listen`` has port 0, a free one: only a supervisor can say which it is."""
        if int(self.listen.rpartition(":")[2]) == 0:
            raise ConfigError(f"listen: is {self.listen}; a free port is for `muxmesh up` only, name one")

    def placements(self) -> Iterator[tuple[UnitConfig, ModelConfig]]:
        """All pairs of a unit and a model that it serves, in the order of the file."""
        return ((unit, model) for unit in self.units for model in unit.models)

    def models(self) -> dict[str, ModelConfig]:
        """Configuration by model name. For a model in several units it is the one in the first unit."""
        models: dict[str, ModelConfig] = {}
        for _, model in self.placements():
            models.setdefault(model.name, model)
        return models

    def units_of(self, model: str) -> tuple[UnitConfig, ...]:
        return tuple(unit for unit, placed in self.placements() if placed.name == model)
