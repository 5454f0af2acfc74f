"""The fields of mesh.yaml with their units, defaults and limits. Frozen; every default is defined here only.

The settings of a model are in `model_config`. Knows no files, processes or models on disk, and not which cores this
machine has.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, ByteSize, Field, IPvAnyNetwork, ValidationError, field_validator, model_validator

from muxmesh.config.access_config import AccessConfig
from muxmesh.config.arbiter_config import ArbiterConfig
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.section import HOST_NEEDED, MAX_BYTES, MAX_COUNT, MIB, NETWORK_NEEDED, Name, Section
from muxmesh.config.tls_config import InternalTlsConfig, TlsConfig
from muxmesh.cuda.sm_groups import SmShare
from muxmesh.errors import ConfigError
from muxmesh.fairness import Fairness
from muxmesh.log_format import LogFormat
from muxmesh.quoting import quoted
from muxmesh.scheduling_policy import PolicyName, SchedulingPolicy
from muxmesh.types import DEFAULT_ADDRESS, MAX_PORT, PreemptionMode, Role

DEFAULT_MODEL = "smollm2-135m-instruct"
MAX_ROUTERS = 64


class NetworkConfig(Section):
    """Addresses at which routers on other hosts reach the processes of a unit, beside their unix sockets.

    Without `internal_tls` these services have neither TLS nor authentication: who can connect to them can use the
    models, end the requests of others and read what passes. A firewall or a NetworkPolicy has to admit routers only.
    """

    host: str = Field(pattern=r"^[A-Za-z0-9:][A-Za-z0-9._:-]*$", max_length=253)
    """DNS name or address of the unit's host. The processes of the unit listen on it if it is an address, and on all
    interfaces if it is a name."""
    base_port: int = Field(default=50100, ge=1, le=MAX_PORT)
    """Port of the unit's kvstore. The next ports are those of the workers, in the order of the models in the file: the
    first model has `base_port + 1` for prefill and `base_port + 2` for decode."""
    allow_unencrypted: bool = False
    """Has to be true unless `host` is a loopback address or the mesh has `internal_tls`: the traffic is not encrypted,
    and callers are not checked."""

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
    green_contexts: bool | Literal["auto"] = "auto"
    """Limits workers to their `compute_share` by green contexts of their own instead of by MPS percentages, so in
    eights of SMs. Needs compute capability 9.0. `auto`: for clients of MPS on such GPUs, because cuBLAS, which computes
    matrix products, leaves out parts of them there under most percentages. With `false` a worker whose products are
    wrong does not start."""
    require_ipc: bool = False
    """If true, the unit refuses to start unless its KV is handed over by GPU IPC (shared device memory)."""
    legacy_ipc: bool = False
    """If true, device memory is shared by legacy IPC handles instead of file descriptors, as it always is if the device
    exports none. kvstore then needs a context on the GPU, and the processes of the unit one PID namespace."""
    tensor_parallel: int = Field(default=1, ge=1, le=1024)
    """Devices that compute each step together, from `device` on, each with a part of every model. More than 1: for
    `muxmesh plan` and `muxmesh simulate`. No engine can run it yet: `muxmesh up` and `muxmesh prepare` refuse it."""
    cores: tuple[Annotated[int, Field(ge=0, strict=True)], ...] | None = Field(default=None, min_length=1)
    """CPU cores of the unit's workers, like `[0, 1]`. Unset: all cores. Required if several units are on one CPU; their
    cores must be disjoint."""
    kv_pool: ByteSize = Field(default=ByteSize(1024 * MIB), ge=MIB, le=MAX_BYTES)
    """KV memory of all models of the unit, like `2GiB`; with `tensor_parallel` on each device. On a CPU it is memory of
    the machine, allocated as it is used. If a cgroup (container, service) limits the memory of kvstore, all of it is
    allocated when kvstore starts, so that it counts to that cgroup. On a GPU it is device memory, beside one copy of
    the weights of each model and 0.75 GiB for each worker, more if its batches or its vocabulary are large."""
    kv_swap: ByteSize = Field(default=ByteSize(0), ge=0, le=MAX_BYTES)
    """Host memory for the KV of sequences that are pre-empted when `kv_pool` is full. 0: their KV is freed and computed
    again. On a CPU a larger `kv_pool` is better, unless `kv_swap_format` is int8. For a GPU it is pinned when first
    used."""
    preemption_mode: PreemptionMode = "auto"
    """What becomes of the KV of a sequence whose memory another one needs. `auto`: by expected cost, from the measured
    speed of copies and prefill and the time that the sequence will wait, it is swapped to `kv_swap`, freed and computed
    again, or kept while other memory will be free soon. `swap` and `recompute`: always that, as far as `kv_swap` has
    room. `keep`: paused sequences keep their KV, but growing sequences and models within their quota take that
    of others."""
    slab: ByteSize = Field(default=ByteSize(16 * MIB), ge=4096, le=MAX_BYTES)
    """Size of the pieces of the pool, with `tensor_parallel` on each device. Each slab is lent to one model at a time.
    On a GPU a multiple of 64 bytes."""
    arbiter: ArbiterConfig = ArbiterConfig()
    """Which workers of the unit compute at the same time, and in which order."""
    network: NetworkConfig | None = None
    """For routers on other hosts. Unset: the unit's processes listen on unix sockets only, for this host."""
    max_awake_models: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """How many models of the unit are awake at the same time. Unset: all may be. A request for a model that sleeps
    wakes it; if no more may be awake, the least recently used idle one falls asleep for it. If none becomes idle within
    5 s, the one with the fewest requests does, once its running sequences have finished. Those with `pinned` stay
    awake."""
    idle_sleep_s: float | None = Field(default=None, gt=0, le=1e9)
    """Seconds without a request after which a model falls asleep, so that its KV memory is free for the others. Unset:
    only when another one has to wake."""
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
    def limits_by_green_contexts(self) -> bool:
        """Whether green contexts limit workers to their shares; `auto` is decided on the machine with the GPU."""
        return self.green_contexts is True

    def green_share(self, model: ModelConfig, role: Role) -> SmShare | None:
        """The SMs to which a green context limits a worker. None: it may use all, or MPS limits it."""
        if not self.limits_by_green_contexts or model.compute_share.of(role) == 100:
            return None
        workers = [(each.name, its_role) for each in self.models for its_role in Role]
        shares = tuple(each.compute_share.of(its_role) for each in self.models for its_role in Role)
        return SmShare(shares, workers.index((model.name, role)))

    @property
    def device_index(self) -> int:
        """N of `cuda:N`; 0 for the CPU."""
        return int(self.device.partition(":")[2] or 0)

    def resolved_arbiter(self, uses_mps: bool) -> ArbiterConfig:
        """`arbiter` with nothing left open. ``uses_mps``: the workers are clients of an MPS daemon."""
        has_limits = any(model.compute_share.is_limit for model in self.models)
        has_slos = any(model.slo is not None for model in self.models)
        return self.arbiter.resolved(
            is_cuda=self.is_cuda,
            uses_mps=uses_mps,
            has_limits=has_limits,
            has_slos=has_slos,
            num_models=len(self.models),
        )

    def arbiter_share(self, model: ModelConfig, role: Role, uses_mps: bool) -> float:
        """The part of the device that a worker uses while it computes, in (0, 1].

        On a GPU without MPS processes take turns on the whole device, whatever their `compute_share`.
        """
        return model.compute_share.of(role) / 100 if uses_mps or not self.is_cuda else 1.0

    @property
    def ports(self) -> range:
        """The ports of the unit's processes, kvstore first; empty without `network`."""
        first, num = (self.network.base_port, 1 + 2 * len(self.models)) if self.network else (0, 0)
        return range(first, first + num)

    @property
    def total_slab(self) -> int:
        """Bytes of a slab on all of the unit's devices: each holds a part of every token block."""
        return self.slab * self.tensor_parallel

    def capacity_tokens(self, model: ModelConfig, token_block_bytes: int) -> int:
        """Tokens of ``model`` that the whole pool holds, where a token block is ``token_block_bytes`` long."""
        return self.kv_pool // self.slab * (self.total_slab // token_block_bytes) * model.block_size

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
    """Capacity of the queue. While it is full, new requests fail with RESOURCE_EXHAUSTED. Half of it is divided equally
    among the models and kept for them, so that requests of one model do not fill it for the others."""
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
    The same order decides which sequences a decode worker computes when it has more than `max_num_seqs`: a queued
    request with less than half of the remaining work of a running one, or of a better priority class, pre-empts it
    (`max_paused_seqs` of a model limits that)."""
    longest_lead: float = Field(default=100.0, ge=0, le=1e6)
    """For `srtf-aged`: the largest difference in arrival time at which a later request overtakes an earlier one of the
    same priority, in multiples of the mean work of a request. 0 is `fcfs`."""
    longest_lead_s: float | None = Field(default=None, ge=0, le=1e9)
    """For `srtf-aged`: the same limit in seconds. The smaller limit applies. A value far below `longest_lead` times
    the mean work makes the order that of arrival."""
    max_wait_s: float | None = Field(default=None, gt=0, le=1e9)
    """Seconds of waiting after which a request is overdue: it precedes all others, of better priority classes too, and
    is not pre-empted. It bounds starvation by others; under overload overdue requests wait for each other, in the order
    of arrival. Unset: better classes always go first, so set it above the longest queue that a class of offline work
    may have."""
    wait_bound_s: float | None = Field(default=None, gt=0, le=1e9)
    """Bound on the seconds that an admitted request waits for its first token, as long as the units keep their speed.
    Requests are refused when more wait than start within half of it, and one that has waited for half of it is overdue,
    as after `max_wait_s`. Unset: only `router.max_waiting_requests` limits the queue."""
    mlfq_quantum_s: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """For `mlfq`: quantum of the first level, in seconds of work. The quantum doubles with each level."""
    fairness: bool = True
    """Whether tenants get equal service, by their weights, while they compete for a unit (docs/fairness.md). Priority
    classes then act within each tenant. With a single tenant it changes nothing."""
    fairness_band_s: float = Field(default=0.5, ge=0.01, le=1e6)
    """Seconds of the device by which a tenant may be ahead of the least served one before the requests of others go
    first; below that the policy decides between tenants too."""
    overdue_share: float = Field(default=0.25, gt=0, le=1)
    """With `max_wait_s`: the part of a model's slots that overdue requests may take before all others while several
    tenants compete. A tenant that is alone may take all."""
    trace: bool = False
    """If true, kvstore logs each admitted request with the number of requests that it overtook and the reason, and each
    sequence that has to free its memory for another; decode workers log each pre-emption with its reason."""

    def fairness_settings(self) -> Fairness | None:
        """None: tenants are not told apart."""
        return Fairness(self.fairness_band_s, self.overdue_share) if self.fairness else None

    @property
    def longest_queue_s(self) -> float:
        """Seconds within which all waiting requests should start; infinite without `wait_bound_s`."""
        return math.inf if self.wait_bound_s is None else self.wait_bound_s / 2

    def scheduling_policy(self) -> SchedulingPolicy:
        longest_s = math.inf if self.longest_lead_s is None else self.longest_lead_s
        max_wait_s = min(math.inf if self.max_wait_s is None else self.max_wait_s, self.longest_queue_s)
        return SchedulingPolicy(self.policy, self.longest_lead, longest_s, self.mlfq_quantum_s, max_wait_s)


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
    tls: TlsConfig | None = None
    """TLS on `listen`. Unset: the public API is served in plain text. The unix sockets of the mesh have no TLS, since
    only the user who runs the mesh can connect to them."""
    internal_tls: InternalTlsConfig | None = None
    """TLS on the ports of units (`network`), whose services then accept only the routers of this mesh. Unset: plain
    text for everyone who can connect, which has to be allowed for each unit."""
    redis_url: str | None = Field(default=None, pattern=r"^(rediss?(\+sentinel|\+cluster)?|unix)://")
    """URL of an existing Redis: `redis://HOST:PORT`, `rediss://` with TLS, `unix://PATH`,
    `redis+sentinel://HOST:PORT,HOST:PORT/SERVICE` or `redis+cluster://HOST:PORT,HOST:PORT`. Unset: the supervisor
    starts a redis-server on a private socket."""
    log_format: LogFormat | None = None
    """Format of the logs of all processes: `text`, or `json` with one object per line. Unset: that in the environment
    variable MUXMESH_LOG_FORMAT, which also applies to what is logged before this file is read; else text."""
    metrics: MetricsConfig | None = None
    """The HTTP endpoint of `muxmesh up`. Unset: none. Services that run without it have their own, by `--metrics`."""
    access: AccessConfig = AccessConfig()
    """Who may send requests: everybody who can connect, or the tenants with an API key."""
    routers: int = Field(default=1, ge=1, le=MAX_ROUTERS)
    """Routers that `muxmesh up` starts. They share `listen`: the kernel divides connections among them, and a client
    whose router is lost connects to another one. All of them order requests together."""
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

    def with_absolute_paths(self, base_dir: Path) -> MeshConfig:
        """The same with the files of TLS from ``base_dir``. Sources of models are resolved when they are prepared."""
        sections = {"tls": self.tls, "internal_tls": self.internal_tls}
        return self.model_copy(update={name: one.absolute(base_dir) for name, one in sections.items() if one})

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
