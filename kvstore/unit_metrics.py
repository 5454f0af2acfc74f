"""The metrics of a unit, read from its state at each scrape. Counters and sizes only: no table of blocks is walked.

What a worker counts by itself (steps, busy seconds, swap copies) its own process exports, see `worker.worker_metrics`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from kvstore.device_memory import Transport
from kvstore.leases import LeaseState
from kvstore.model_states import ModelState
from kvstore.unit import Unit
from muxmesh.config.schema import UnitConfig
from muxmesh.metrics.family import Family, Labels, counter, gauge
from muxmesh.types import SWAP_PAGE_BYTES, Role

_UNIT = ("unit",)
_MODEL = ("unit", "model_name")


def unit_families(
    config: UnitConfig,
    unit: Unit,
    transport: Transport,
    num_overtaken: Mapping[str, int],
    num_revoked: Mapping[tuple[Role, str], int] = MappingProxyType({}),
    num_held_up: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[Family]:
    """``num_overtaken``: by model, see `KvStoreService`. ``num_revoked``, ``num_held_up``: see `GrantTable`."""
    name = config.name
    yield gauge(
        "muxmesh_unit_info", "1; the labels have the device, and how its memory is passed to workers.",
        ("unit", "device", "transport"), {(name, config.device, str(transport)): 1},
    )  # fmt: skip
    yield from _pool_families(name, unit)
    yield from _lease_families(name, unit)
    yield from _cache_families(name, unit)
    yield gauge(
        "muxmesh_workers_ready", "Attached workers that accept requests.", ("unit", "model_name", "role"),
        {
            (name, model, role.value): len(unit.ready_workers(role, model))
            for model in unit.models for role in Role
        },
    )  # fmt: skip
    yield from _state_families(name, unit)
    yield counter("muxmesh_credits_total", "Credits issued to requests.", _UNIT, {(name,): unit.num_decisions})
    yield counter(
        "muxmesh_grants_revoked_total", "Recalled compute grants that a worker did not return in time.",
        ("unit", "model_name", "role"),
        {
            (name, model, role.value): num_revoked.get((role, model), 0)
            for model in unit.models for role in Role
        },
    )  # fmt: skip
    yield counter(
        "muxmesh_decodes_held_up_total", "Times that prefills held up a decode worker too long, stall budget used up.",
        _MODEL, {(name, model): num_held_up.get(model, 0) for model in unit.models},
    )  # fmt: skip
    yield counter(
        "muxmesh_overtaken_requests_total", "Earlier requests that still waited when a later one got its credit.",
        _MODEL, {(name, model): num_overtaken.get(model, 0) for model in unit.models},
    )  # fmt: skip


def _pool_families(name: str, unit: Unit) -> Iterator[Family]:
    pool, swap = unit.pool, unit.swap
    leased, cached, free = unit.leased_bytes(), unit.cached_bytes(), pool.num_free_slabs * unit.slab_bytes
    states = {
        "leased": leased,
        "cached": cached,
        "fragmented": pool.num_slabs * unit.slab_bytes - free - leased - cached,
        "free": free,
    }
    yield gauge(
        "muxmesh_pool_bytes", "Bytes of the KV pool by state; their sum is its size.", ("unit", "state"),
        {(name, state): size for state, size in states.items()},
    )  # fmt: skip
    swap_states = {"used": swap.num_pages - swap.num_free_pages, "free": swap.num_free_pages}
    yield gauge(
        "muxmesh_swap_region_bytes", "Bytes of the swap region by state.", ("unit", "state"),
        {(name, state): pages * SWAP_PAGE_BYTES for state, pages in swap_states.items()},
    )  # fmt: skip
    yield gauge(
        "muxmesh_quota_bytes", "Quota of each model in the KV pool.", _MODEL,
        {(name, model): slabs * unit.slab_bytes for model, slabs in unit.quotas.slabs.items()},
    )  # fmt: skip


def _lease_families(name: str, unit: Unit) -> Iterator[Family]:
    states = {model: unit.leases.count_states(model) for model in unit.models}
    yield gauge(
        "muxmesh_leases", "Leases by state.", ("unit", "model_name", "state"),
        {(name, model, state.value): counts[state] for model, counts in states.items() for state in LeaseState},
    )  # fmt: skip
    yield counter(
        "muxmesh_leases_expired_total", "Credits that no worker acquired in time.", _UNIT,
        {(name,): unit.leases.num_expired},
    )  # fmt: skip
    yield counter(
        "muxmesh_leases_orphaned_total", "Leases that ended because their owner did.", _UNIT,
        {(name,): unit.leases.num_orphaned},
    )  # fmt: skip


def _state_families(name: str, unit: Unit) -> Iterator[Family]:
    records = unit.states.models
    states: dict[Labels, float] = {
        (name, model, state.value): int(record.state is state)
        for model, record in records.items()
        for state in ModelState
    }
    yield gauge(
        "muxmesh_model_state", "1 for the state that the model is in, 0 for the others.",
        ("unit", "model_name", "state"), states,
    )  # fmt: skip
    yield counter(
        "muxmesh_model_wakes_total", "How often the model was woken.", _MODEL,
        {(name, model): record.num_wakes for model, record in records.items()},
    )  # fmt: skip
    yield counter(
        "muxmesh_model_waking_seconds_total", "Seconds for which the model was waking.", _MODEL,
        {(name, model): record.waking_s for model, record in records.items()},
    )  # fmt: skip


def _cache_families(name: str, unit: Unit) -> Iterator[Family]:
    usage: dict[Labels, float] = {}
    queried: dict[Labels, float] = {}
    hit: dict[Labels, float] = {}
    for model, limits in unit.models.items():
        usage[name, model] = unit.blocks.num_in_use(model) / unit.pool.capacity_blocks(model)
        num_queried, num_hit = unit.blocks.queried_and_hit(model)
        queried[name, model] = num_queried * limits.shape.block_size
        hit[name, model] = num_hit * limits.shape.block_size
    yield gauge(
        "vllm:kv_cache_usage_perc", "Fraction of the unit's KV pool in use by the model, from 0 to 1.", _MODEL, usage,
    )  # fmt: skip
    yield counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", _MODEL, queried)
    yield counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", _MODEL, hit)
