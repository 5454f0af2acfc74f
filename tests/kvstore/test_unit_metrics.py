"""The metrics of a unit, from its state."""

from typing import Any

import pytest

from kvstore.device_memory import Transport
from kvstore.unit import CREDIT_TTL_S, Unit
from kvstore.unit_metrics import unit_families
from muxmesh.block_hashes import block_hashes
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import UnitConfig
from muxmesh.types import SWAP_PAGE_BYTES, Role
from tests.kvstore.small_unit import SHAPES, SLAB_BYTES, attach_ready, decoding, make_unit, queued, schedule

CONFIG = UnitConfig(name="u", models=(ModelConfig(name="a"),))


def metrics(unit: Unit, num_overtaken: dict[str, int] | None = None) -> dict[str, dict[Any, Any]]:
    """The samples of each metric, by the values of their labels after the unit."""
    num_revoked = {(Role.DECODE, "a"): 3}
    families = unit_families(CONFIG, unit, Transport.VMM_FD, num_overtaken or {}, num_revoked, {"b": 2})
    return {one.name: {labels[1:]: value for labels, value in one.samples.items()} for one in families}


def test_the_states_of_the_pool_sum_to_its_size() -> None:
    unit = make_unit()
    attach_ready(unit, "a")
    attach_ready(unit, "b")
    lease, decode = decoding(unit, 1, 24)
    decoding(unit, 2, 16, "b")
    unit.release(lease.ref, decode, block_hashes(range(16), 8, b"root"))
    sizes = metrics(unit)["muxmesh_pool_bytes"]
    assert sizes["leased",] == SHAPES["b"].token_block_bytes
    assert sizes["cached",] == 2 * SHAPES["a"].token_block_bytes
    assert sizes["fragmented",] > 0
    assert sum(sizes.values()) == 4 * SLAB_BYTES
    usage = metrics(unit)["vllm:kv_cache_usage_perc"]
    assert usage["a",] == usage["c",] == 0
    assert usage["b",] == pytest.approx(1 / unit.pool.capacity_blocks("b"))


def test_leases_are_counted_by_state() -> None:
    unit = make_unit(max_num_seqs=2, swap_bytes=3 * SWAP_PAGE_BYTES)
    prefill, _ = attach_ready(unit, "a")
    lease, decode = decoding(unit, 1, 8)
    unit.leases.begin_swap_out(lease.ref, decode, SWAP_PAGE_BYTES + 1)
    unit.leases.finish_swap_out(lease.ref, decode)
    unit.offer("router", queued(2))
    schedule(unit)
    found = metrics(unit)
    leases = found["muxmesh_leases"]
    assert {labels: count for labels, count in leases.items() if count} == {("a", "swapped"): 1, ("a", "credit"): 1}
    assert found["muxmesh_swap_region_bytes"] == {("used",): 2 * SWAP_PAGE_BYTES, ("free",): SWAP_PAGE_BYTES}
    assert found["muxmesh_credits_total"] == {(): 2}
    schedule(unit, CREDIT_TTL_S)
    unit.offer("router", queued(3))
    (issued,) = schedule(unit, CREDIT_TTL_S).credits
    unit.acquire(issued.lease.ref, prefill)
    unit.worker_exited(prefill)
    found = metrics(unit)
    assert (found["muxmesh_leases_expired_total"], found["muxmesh_leases_orphaned_total"]) == ({(): 1}, {(): 1})
    assert found["muxmesh_workers_ready"]["a", "prefill"] == 0
    assert found["muxmesh_workers_ready"]["a", "decode"] == 1


def test_the_prefix_cache_is_counted_in_tokens() -> None:
    unit = make_unit()
    attach_ready(unit, "a")
    hashes = block_hashes(range(24), 8, b"root")
    lease, decode = decoding(unit, 1, 24)
    unit.release(lease.ref, decode, hashes)
    unit.offer("router", queued(2, num_tokens=24, hashes=hashes, max_cached_tokens=23))
    schedule(unit)
    found = metrics(unit)
    assert found["vllm:prefix_cache_queries_total"]["a",] == found["vllm:prefix_cache_hits_total"]["a",] == 16


def test_quotas_overtaken_requests_and_the_transport_are_shown() -> None:
    unit = make_unit(num_slabs=7)
    found = metrics(unit, {"a": 5})
    assert sum(found["muxmesh_quota_bytes"].values()) == 7 * SLAB_BYTES
    assert found["muxmesh_overtaken_requests_total"] == {("a",): 5, ("b",): 0, ("c",): 0}
    revoked = {labels: value for labels, value in found["muxmesh_grants_revoked_total"].items() if value}
    assert revoked == {("a", "decode"): 3}
    assert found["muxmesh_decodes_held_up_total"] == {("a",): 0, ("b",): 2, ("c",): 0}
    assert found["muxmesh_unit_info"] == {("cpu", "vmm fd"): 1}
