"""Combinations of fields of mesh.yaml that are invalid although each field is valid, and settings without effect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import MeshConfig, UnitConfig
from muxmesh.config.section import Location
from muxmesh.config.slo_config import NO_OBJECTIVE
from muxmesh.quoting import quoted
from muxmesh.scheduling_policy import PolicyName
from muxmesh.types import MAX_PORT

ORDER_FIELDS: dict[str, PolicyName] = {
    "longest_lead": "srtf-aged",
    "longest_lead_s": "srtf-aged",
    "mlfq_quantum_s": "mlfq",
}
"""Fields that apply to one policy only."""

SAME_IN_ALL_UNITS = (
    "source", "engine", "dtype", "kv_cache_dtype", "sim", "max_model_len", "default_max_new_tokens",
    "generation_config", "slo",
)  # fmt: skip
"""Fields that clients can observe, or that identify the model. They are equal in every unit that serves the model."""

MAX_UNIT_MODELS = 64
"""Models of a unit, each with a worker for each role: half of `MAX_WORKERS` in kvstore/grant_page.py."""
GPU_SLAB_ALIGNMENT = 64
"""Bytes. 16 elements of float32: kernels load 16 bytes at a time from addresses that they know to be multiples."""
_GPU_FIELDS = ("mps", "green_contexts", "require_ipc", "legacy_ipc")
"""Fields of a unit that apply to GPUs only."""
_GPU_MODEL_FIELDS = ("cuda_graphs",)
"""Fields of a model that apply to GPUs only."""

_ARBITER_FIELDS = {
    "over_subscription": ("temporal", "spatial"),
    "urgent_slack_s": ("fcfs", "roundrobin", "temporal", "spatial"),
    "max_overtakes": ("spatial",),
    "max_stall_s": ("fcfs", "temporal", "spatial"),
    "stall_budget": ("fcfs", "roundrobin", "temporal", "spatial"),
    "longest_grant_s": ("spatial",),
}
"""Fields of the arbiter, and the modes that ignore them."""


def order_without_effect(config: MeshConfig) -> Iterator[tuple[Location, str]]:
    """(location, problem) of each policy setting that the chosen policy ignores."""
    for field, policy in ORDER_FIELDS.items():
        if field in config.order.model_fields_set and config.order.policy != policy:
            yield ("order", field), f"has no effect with policy: {config.order.policy}; it is for {policy}"
    given = config.order.model_fields_set
    if not config.order.fairness:
        for field in ("fairness_band_s", "overdue_share"):
            if field in given:
                yield ("order", field), "has no effect with fairness: false"
    elif "overdue_share" in given and config.order.max_wait_s is None:
        yield ("order", "overdue_share"), "has no effect without max_wait_s"


def tensor_parallel_problems(config: MeshConfig) -> Iterator[tuple[Location, str]]:
    """(location, problem) of units that no engine can run."""
    for index, unit in enumerate(config.units):
        if unit.tensor_parallel > 1:
            yield (
                ("units", index, "tensor_parallel"),
                f"is {unit.tensor_parallel}; no engine can compute a model on several devices yet, so only "
                "`muxmesh simulate` accepts it; plan with --max-tensor-parallel 1",
            )


def contradictions(config: MeshConfig) -> Iterator[tuple[Location, str]]:
    """(location, problem) of each combination of fields that is invalid although each field is valid."""
    if int(config.listen.rpartition(":")[2]) > MAX_PORT:
        yield ("listen",), f"port is larger than {MAX_PORT}"
    yield from _core_problems(config)
    yield from _network_problems(config)
    units: set[str] = set()
    first_of: dict[str, tuple[UnitConfig, ModelConfig]] = {}
    for unit_index, unit in enumerate(config.units):
        location: Location = ("units", unit_index)
        if unit.name in units:
            yield (*location, "name"), f"{quoted(unit.name)} is the name of another unit"
        units.add(unit.name)
        if unit.slab > unit.kv_pool:
            yield (*location, "slab"), f"is {unit.slab} bytes, larger than kv_pool ({unit.kv_pool} bytes)"
        guaranteed, slabs = sum(map(unit.guaranteed_slabs, unit.models)), unit.kv_pool // unit.slab
        if guaranteed > slabs:
            yield (
                (*location, "kv_pool"),
                f"has {slabs} slabs of {unit.slab} bytes; kv_guaranteed of the models needs {guaranteed} slabs",
            )
        if unit.is_cuda and unit.slab % GPU_SLAB_ALIGNMENT:
            yield (*location, "slab"), f"is {unit.slab} bytes; on a GPU it must be a multiple of {GPU_SLAB_ALIGNMENT}"
        for field in _GPU_FIELDS:
            if not unit.is_cuda and field in unit.model_fields_set:
                yield (*location, field), f"has no effect with device: {unit.device}; it is for device: cuda:N"
        for field, problem in _arbiter_problems(unit):
            yield (*location, "arbiter", field), problem
        if (
            unit.is_cuda
            and unit.limits_by_green_contexts
            and not any(model.compute_share.is_limit for model in unit.models)
        ):
            yield (*location, "green_contexts"), "has no effect: no model of the unit has a compute_share below 100"
        if len(unit.models) > MAX_UNIT_MODELS:
            yield (*location, "models"), f"has {len(unit.models)} models; a unit has at most {MAX_UNIT_MODELS}"
        for field, problem in _awake_problems(unit):
            yield (*location, field), problem
        for model_index, model in enumerate(unit.models):
            for field, problem in _model_problems(unit, model, model_index, first_of):
                yield (*location, "models", model_index, field), problem


def _awake_problems(unit: UnitConfig) -> Iterator[tuple[str, str]]:
    """(field, problem) of limits on awake models that some model of the unit could never meet."""
    limit, num_pinned = unit.max_awake_models, sum(model.pinned for model in unit.models)
    if limit is None:
        return
    num_started = sum(model.start == "awake" or (model.pinned and model.start is None) for model in unit.models)
    if num_pinned > limit or (num_pinned == limit and num_pinned < len(unit.models)):
        needed = min(num_pinned + 1, len(unit.models))
        yield (
            "max_awake_models",
            f"is {limit}, but {num_pinned} models are pinned: the others could never wake; must be at least {needed}",
        )
    elif num_started > limit:
        yield (
            "max_awake_models",
            f"is {limit}, but {num_started} models start awake or are pinned; must be at least {num_started}",
        )


def _arbiter_problems(unit: UnitConfig) -> Iterator[tuple[str, str]]:
    """(field, problem) of each setting that the chosen mode, or the unit, ignores."""
    mode, is_set = unit.arbiter.mode, unit.arbiter.model_fields_set
    for field, ignored_by in _ARBITER_FIELDS.items():
        if field not in is_set:
            continue
        if mode in ignored_by:
            yield field, f"has no effect with mode: {mode}"
        elif field == "over_subscription" and unit.is_cuda and unit.mps == "off":
            yield field, "has no effect with mps: off; it is for mps: auto or on"
        elif field == "urgent_slack_s" and all(model.slo is None for model in unit.models):
            yield field, "has no effect: no model of the unit has an slo"


def _core_problems(config: MeshConfig) -> Iterator[tuple[Location, str]]:
    """Units on the CPU of one host compute at the same time, so their cores must be disjoint."""
    owners: dict[tuple[str, int], str] = {}
    for unit_index, unit in enumerate(config.units):
        location: Location = ("units", unit_index)
        host = _host(unit)
        if unit.cores is None:
            on_cpu = sum(not other.is_cuda and _host(other) == host for other in config.units)
            if on_cpu > 1 and not unit.is_cuda:
                yield (
                    (*location, "cores"),
                    f"is required, such as cores: [0]: {on_cpu} units are on {quoted(unit.device)}",
                )
            continue
        for core, count in Counter(unit.cores).items():
            if count > 1:
                yield (*location, "cores"), f"lists core {core} {count} times"
        for core in unit.cores:
            if (owner := owners.setdefault((host, core), unit.name)) != unit.name:
                yield (*location, "cores"), f"core {core} is also in unit {owner}; units need disjoint cores"
        for model_index, model in enumerate(unit.models):
            if model.threads is not None and model.threads > len(unit.cores):
                yield (
                    (*location, "models", model_index, "threads"),
                    f"is {model.threads}; the unit has {len(unit.cores)} cores",
                )


def _host(unit: UnitConfig) -> str:
    """The host of a unit. Empty: that of routers, as without `network` there is no other."""
    return "" if unit.network is None or unit.network.is_loopback else unit.network.host


def _network_problems(config: MeshConfig) -> Iterator[tuple[Location, str]]:
    """Ports above the last one, ports of two units on one host, and unencrypted traffic that is not allowed."""
    earlier: list[UnitConfig] = []
    if config.internal_tls is not None and all(unit.network is None for unit in config.units):
        yield ("internal_tls",), "has no effect: no unit has `network`, and unix sockets need no TLS"
    for unit_index, unit in enumerate(config.units):
        if unit.network is None:
            continue
        location: Location = ("units", unit_index, "network")
        ports = f"{unit.ports[0]} to {unit.ports[-1]}"
        if unit.ports[-1] > MAX_PORT:
            yield (*location, "base_port"), f"the unit needs the ports {ports}; the last one is {MAX_PORT}"
        for other in earlier:
            shared = range(max(unit.ports[0], other.ports[0]), min(unit.ports[-1], other.ports[-1]) + 1)
            if other.network is not None and other.network.host == unit.network.host and shared:
                yield (
                    (*location, "base_port"),
                    f"the unit needs the ports {ports}; port {shared[0]} of {unit.network.host} is that of unit "
                    f"{other.name}",
                )
        if config.internal_tls is not None:
            if unit.network.allow_unencrypted:
                yield (*location, "allow_unencrypted"), "has no effect with internal_tls: all ports of units have TLS"
        elif not unit.network.is_loopback and not unit.network.allow_unencrypted:
            yield (
                (*location, "host"),
                f"{unit.network.host} may be reached from other hosts, and the unit's services have neither TLS nor "
                "authentication; set internal_tls, or, if a firewall or a NetworkPolicy admits routers only, "
                "allow_unencrypted: true",
            )
        earlier.append(unit)


def _model_problems(
    unit: UnitConfig, model: ModelConfig, index: int, first_of: dict[str, tuple[UnitConfig, ModelConfig]]
) -> Iterator[tuple[str, str]]:
    """(field, problem) of one model. ``first_of`` maps names to earlier models; this model is added."""
    if any(other.name == model.name for other in unit.models[:index]):
        yield "name", f"{quoted(model.name)} is the name of another model"
    first_unit, first = first_of.setdefault(model.name, (unit, model))
    for field in SAME_IN_ALL_UNITS:
        if first_unit is not unit and getattr(first, field) != getattr(model, field):
            yield field, f"differs from {quoted(model.name)} in unit {first_unit.name}; must be equal in all units"
    if model.expected_rate is not None and any(other.expected_rate is None for other in unit.models):
        yield "expected_rate", "has no effect: other models of the unit have none; set it for all of them or for none"
    yield from _device_problems(unit, model)
    if model.slo is not None and model.slo.is_empty:
        yield "slo", NO_OBJECTIVE
    if model.engine != "sim" and "sim" in model.model_fields_set:
        yield "sim", f"has no effect with engine: {model.engine}; it is for sim"


def _device_problems(unit: UnitConfig, model: ModelConfig) -> Iterator[tuple[str, str]]:
    """(field, problem) of settings of a model that its unit's device does not have."""
    if unit.is_cuda:
        if model.engine == "sim":
            yield "engine", f"sim computes on no GPU; the unit's device is {unit.device}"
        if model.threads is not None:
            yield "threads", f"has no effect with device: {unit.device}; it is for device: cpu"
        if model.compute_share.is_limit and unit.mps == "off" and not unit.limits_by_green_contexts:
            yield "compute_share", "has no effect with mps: off; it is for mps: auto or on, or green_contexts: true"
        if model.kv_cache_dtype == "float32" and model.dtype != "float32":
            yield (
                "kv_cache_dtype",
                f"is float32, more exact than dtype: {model.dtype}; it may be auto, float16 or bfloat16",
            )
        return
    for field in ("dtype", "kv_cache_dtype"):
        value = getattr(model, field)
        if value not in ("auto", "float32"):
            yield field, f"is {value}; a CPU computes in float32 only"
    for field in _GPU_MODEL_FIELDS:
        if field in model.model_fields_set:
            yield field, f"has no effect with device: {unit.device}; it is for device: cuda:N"
    if model.engine != "sim" and "continuous_decode_steps" in model.model_fields_set:
        yield (
            "continuous_decode_steps",
            f"has no effect with engine: {model.engine} on device: {unit.device}; "
            "it is for device: cuda:N and for engine: sim",
        )
