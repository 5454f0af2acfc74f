"""The status of a unit as `Mesh.GetStatus` shows it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

from kvstore.device_memory import Transport
from kvstore.grant_page import GrantPage, Word
from kvstore.leases import LeaseState
from kvstore.tenant_service import TenantUse
from kvstore.unit import Unit
from kvstore.worker_slots import WorkerRecord
from muxmesh.config.schema import UnitConfig
from muxmesh.process_state import own_memory_bytes
from muxmesh.types import SWAP_PAGE_BYTES
from muxmesh.v1 import mesh_pb2

MAX_LISTED_TENANTS = 100


def unit_status(
    config: UnitConfig,
    unit: Unit,
    transport: Transport,
    page: GrantPage,
    slot_of: Callable[[str], int],
    now_s: float,
    unix_s: float,
) -> mesh_pb2.UnitStatus:
    """``slot_of``: slot of a worker, by its name, in the grant page. ``now_s``, ``unix_s``: the same moment, on the
    unit's monotonic clock and on that of all machines.
    """
    counts = unit.leases.count_by_owner()
    copied_bytes = sum(
        _copied_bytes(page, slot_of(worker.name), unit.models[worker.model].shape.kv_bytes_per_token)
        for worker in unit.workers.values()
        if worker.model in unit.models  # it may outlive its model
    )
    return mesh_pb2.UnitStatus(
        unit=config.name,
        device=config.device,
        transport=transport,
        connected=True,
        pool=_pool_status(unit, copied_bytes),
        models=[_model_status(unit, name, now_s, unix_s) for name in unit.models],
        workers=[
            _worker_status(worker, counts[worker.name], page, slot_of(worker.name)) for worker in unit.workers.values()
        ],
        tenants=_tenants(unit.tenant_use()),
    )


def _tenants(use: Mapping[str, TenantUse]) -> list[mesh_pb2.TenantUse]:
    """Named by their ids."""
    most_served = heapq.nlargest(MAX_LISTED_TENANTS, use.items(), key=lambda item: (item[1].service_s, item[0]))
    return [
        mesh_pb2.TenantUse(
            tenant=tenant,
            service_s=one.service_s,
            num_bands_ahead=one.group,
            num_queued_requests=one.num_queued,
            num_leases=one.num_running,
        )
        for tenant, one in most_served
    ]


def _copied_bytes(page: GrantPage, slot: int, kv_bytes_per_token: int) -> int:
    """KV that a worker has written and not computed. An engine without KV writes none."""
    written = page.read(slot, Word.KV_BYTES_WRITTEN)  # read first, as it is counted last
    return max(0, written - page.read(slot, Word.NUM_COMPUTED_TOKENS) * kv_bytes_per_token)


def _pool_status(unit: Unit, copied_bytes: int) -> mesh_pb2.PoolStatus:
    leases, pool, swap = unit.leases, unit.pool, unit.swap
    leased_bytes, cached_bytes = unit.leased_bytes(), unit.cached_bytes()
    lent_bytes = (pool.num_slabs - pool.num_free_slabs) * unit.slab_bytes
    return mesh_pb2.PoolStatus(
        pool_bytes=pool.num_slabs * unit.slab_bytes,
        slab_bytes=unit.slab_bytes,
        num_slabs=pool.num_slabs,
        num_free_slabs=pool.num_free_slabs,
        leased_bytes=leased_bytes,
        cached_bytes=cached_bytes,
        num_handoffs=leases.num_handoffs,
        fragmented_bytes=lent_bytes - leased_bytes - cached_bytes,
        swap_bytes=swap.num_pages * SWAP_PAGE_BYTES,
        swap_used_bytes=(swap.num_pages - swap.num_free_pages) * SWAP_PAGE_BYTES,
        num_swapped_leases=sum(leases.count_states(model)[LeaseState.SWAPPED] for model in unit.models),
        num_leases_expired=leases.num_expired,
        num_leases_orphaned=leases.num_orphaned,
        kv_bytes_copied=copied_bytes,
    )


def _model_status(unit: Unit, model: str, now_s: float, unix_s: float) -> mesh_pb2.UnitModelStatus:
    record = unit.states.models[model]
    limits, states = unit.models[model], unit.leases.count_states(model)
    queried, hit = unit.blocks.queried_and_hit(model)
    return mesh_pb2.UnitModelStatus(
        model=model,
        num_leased_token_blocks=unit.blocks.num_in_use(model),
        num_free_token_blocks=unit.blocks.num_available(model),
        num_cached_token_blocks=unit.blocks.num_cached(model),
        num_prefix_tokens_queried=queried * limits.shape.block_size,
        num_prefix_tokens_hit=hit * limits.shape.block_size,
        quota_bytes=unit.quotas.slabs[model] * unit.slab_bytes,
        num_leases=states.total() - states[LeaseState.CREDIT],
        num_credits=states[LeaseState.CREDIT],
        num_queued_requests=unit.admission.count(model),
        max_num_seqs=limits.max_num_seqs,
        state=record.state,
        state_since_unix_s=unix_s - (now_s - record.since_s),
        last_used_unix_s=unix_s - (now_s - record.last_used_s),
        pinned=record.is_pinned,
        num_wakes=record.num_wakes,
        waking_s=record.waking_s,
        last_waking_s=record.last_waking_s,
        token_block_bytes=limits.shape.token_block_bytes,
    )


def _worker_status(worker: WorkerRecord, num_leases: int, page: GrantPage, slot: int) -> mesh_pb2.WorkerStatus:
    return mesh_pb2.WorkerStatus(
        name=worker.name,
        role=worker.role.value,
        model=worker.model,
        pid=worker.pid,
        ready=worker.ready,
        num_leases=num_leases,
        num_steps=page.read(slot, Word.NUM_STEPS),
        num_computed_tokens=page.read(slot, Word.NUM_COMPUTED_TOKENS),
        kv_bytes_written=page.read(slot, Word.KV_BYTES_WRITTEN),
        busy_s=page.read(slot, Word.BUSY_NS) / 1e9,
        swap_out_bytes=page.read(slot, Word.SWAP_OUT_BYTES),
        swap_in_bytes=page.read(slot, Word.SWAP_IN_BYTES),
        swap_s=page.read(slot, Word.SWAP_NS) / 1e9,
        engine=worker.engine or "",
        own_memory_bytes=own_memory_bytes(worker.pid),
    )
