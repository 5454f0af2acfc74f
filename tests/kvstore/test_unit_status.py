"""The status of a unit, from its state and the words of its workers."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvstore.device_memory import Transport
from kvstore.grant_page import GrantPage, Word
from kvstore.grant_table import GrantTable
from kvstore.tenant_service import TenantUse
from kvstore.unit import CREDIT_TTL_S, Unit
from kvstore.unit_status import MAX_LISTED_TENANTS, unit_status
from muxmesh.block_hashes import block_hashes
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import UnitConfig
from muxmesh.types import SWAP_PAGE_BYTES, Role
from muxmesh.v1 import mesh_pb2
from tests.kvstore.small_unit import (
    SHAPES,
    SLAB_BYTES,
    attach_ready,
    decoding,
    make_unit,
    queued,
    schedule,
)

CONFIG = UnitConfig(name="unit7", models=(ModelConfig(name="a"),))
ROOT = b"root"


@pytest.fixture
def page() -> Iterator[GrantPage]:
    grants = GrantTable()
    yield grants.page
    grants.close()


def status_of(unit: Unit, page: GrantPage, slots: dict[str, int] | None = None) -> mesh_pb2.UnitStatus:
    numbers = slots or {worker: index for index, worker in enumerate(unit.workers)}
    return unit_status(CONFIG, unit, Transport.VMM_FD, page, numbers.__getitem__, 100.0, 1_000.0)


def test_the_transport_of_the_memory_is_named(page: GrantPage) -> None:
    assert status_of(make_unit(), page).transport == "vmm fd"


def test_tenants_with_requests_are_listed_with_what_they_use(page: GrantPage) -> None:
    unit = make_unit()
    attach_ready(unit, "a")
    assert not status_of(unit, page).tenants
    for entry_id, tenant in ((1, "t"), (2, "t"), (3, "u")):
        unit.offer("r", replace(queued(entry_id), tenant=tenant))
    expected = {"t": 2, "u": 1}
    assert {one.tenant: one.num_queued_requests for one in status_of(unit, page).tenants} == expected
    schedule(unit)
    listed = status_of(unit, page).tenants
    assert {one.tenant: one.num_queued_requests + one.num_leases for one in listed} == expected
    assert any(one.num_leases for one in listed)


def test_of_many_tenants_the_most_served_ones_are_listed(page: GrantPage, monkeypatch: pytest.MonkeyPatch) -> None:
    unit, number = make_unit(), MAX_LISTED_TENANTS + 5
    use = {f"t{index}": TenantUse(float(index), index // 2, 1, 2) for index in range(number)}
    monkeypatch.setattr(unit, "tenant_use", lambda: use)
    listed = status_of(unit, page).tenants
    assert [one.tenant for one in listed] == [f"t{index}" for index in reversed(range(5, number))]
    most = listed[0]
    assert (most.service_s, most.num_bands_ahead, most.num_queued_requests, most.num_leases) == (104.0, 52, 1, 2)


def test_bytes_of_the_pool_are_leased_cached_fragmented_or_free(page: GrantPage) -> None:
    unit = make_unit()
    attach_ready(unit, "a")
    attach_ready(unit, "b")
    lease, decode = decoding(unit, 1, 24)
    decoding(unit, 2, 16, "b")
    unit.release(lease.ref, decode, block_hashes(range(16), 8, ROOT))
    pool = status_of(unit, page).pool
    assert (pool.pool_bytes, pool.slab_bytes, pool.num_slabs) == (4 * SLAB_BYTES, SLAB_BYTES, 4)
    assert pool.leased_bytes == SHAPES["b"].token_block_bytes
    assert pool.cached_bytes == 2 * SHAPES["a"].token_block_bytes
    used_bytes = pool.leased_bytes + pool.cached_bytes + pool.fragmented_bytes
    assert used_bytes + pool.num_free_slabs * SLAB_BYTES == pool.pool_bytes
    assert pool.fragmented_bytes > 0


def test_leases_credits_and_queued_requests_are_counted_by_model(page: GrantPage) -> None:
    unit = make_unit(max_num_seqs=2)
    attach_ready(unit, "a")
    decoding(unit, 1, 24)
    unit.offer("router", queued(2))
    schedule(unit)
    for entry_id, model in ((3, "a"), (4, "a"), (5, "b")):
        unit.offer("router", queued(entry_id, model))
    schedule(unit)
    first, second, third = status_of(unit, page).models
    assert [first.model, second.model, third.model] == ["a", "b", "c"]
    assert (first.num_leases, first.num_credits, first.num_queued_requests, first.max_num_seqs) == (1, 1, 2, 2)
    assert (second.num_leases, second.num_credits, second.num_queued_requests) == (0, 0, 1)
    assert (first.num_leased_token_blocks, second.num_leased_token_blocks) == (4, 0)


def test_the_prefix_cache_is_counted_in_blocks_and_tokens(page: GrantPage) -> None:
    unit = make_unit()
    attach_ready(unit, "a")
    hashes = block_hashes(range(24), 8, ROOT)
    lease, decode = decoding(unit, 1, 24)
    unit.release(lease.ref, decode, hashes)
    unit.offer("router", queued(2, num_tokens=24, hashes=hashes, max_cached_tokens=23))
    assert len(schedule(unit).credits) == 1
    model = status_of(unit, page).models[0]
    assert (model.num_prefix_tokens_queried, model.num_prefix_tokens_hit) == (16, 16)
    assert (model.num_leased_token_blocks, model.num_cached_token_blocks) == (3, 1)


def test_quotas_are_shown_in_bytes(page: GrantPage) -> None:
    unit = make_unit(num_slabs=7)
    models = status_of(unit, page).models
    assert [model.quota_bytes for model in models] == [slabs * SLAB_BYTES for slabs in unit.quotas.slabs.values()]
    assert sum(model.quota_bytes for model in models) == 7 * SLAB_BYTES


def test_swapped_leases_and_their_pages_are_counted(page: GrantPage) -> None:
    unit = make_unit(swap_bytes=3 * SWAP_PAGE_BYTES)
    attach_ready(unit, "a")
    lease, decode = decoding(unit, 1, 8)
    unit.leases.begin_swap_out(lease.ref, decode, SWAP_PAGE_BYTES + 1)
    assert status_of(unit, page).pool.num_swapped_leases == 0, "it is still being copied"
    unit.leases.finish_swap_out(lease.ref, decode)
    pool = status_of(unit, page).pool
    assert (pool.num_swapped_leases, pool.swap_bytes, pool.swap_used_bytes) == (
        1,
        3 * SWAP_PAGE_BYTES,
        2 * SWAP_PAGE_BYTES,
    )


def test_leases_that_ended_without_a_release_are_counted(page: GrantPage) -> None:
    unit = make_unit()
    prefill, _ = attach_ready(unit, "a")
    unit.offer("router", queued(1))
    schedule(unit)
    schedule(unit, CREDIT_TTL_S)
    decoding(unit, 2, 8)
    unit.offer("router", queued(3))
    (issued,) = schedule(unit).credits
    unit.acquire(issued.lease.ref, prefill)
    unit.worker_exited(prefill)
    pool = status_of(unit, page).pool
    assert (pool.num_leases_expired, pool.num_leases_orphaned, pool.num_handoffs) == (1, 1, 1)


@pytest.mark.parametrize(
    ("num_computed_tokens", "excess", "copied"), [(60, 0, 0), (60, 512, 512), (0, 0, 0)], ids=["none", "some", "idle"]
)
def test_kv_that_was_written_and_not_computed_counts_as_copied(
    page: GrantPage, num_computed_tokens: int, excess: int, copied: int
) -> None:
    unit = make_unit()
    prefill, decode = attach_ready(unit, "a")
    per_token = unit.models["a"].shape.kv_bytes_per_token
    page.write(3, Word.NUM_COMPUTED_TOKENS, num_computed_tokens)
    page.write(3, Word.KV_BYTES_WRITTEN, num_computed_tokens * per_token + excess)
    page.write(0, Word.NUM_COMPUTED_TOKENS, 500)  # an engine without KV
    assert status_of(unit, page, {prefill: 0, decode: 3}).pool.kv_bytes_copied == copied


def test_a_worker_is_shown_with_the_words_of_its_slot(page: GrantPage) -> None:
    unit = make_unit()
    prefill, decode = attach_ready(unit, "a")
    unit.attach(Role.DECODE, "b", "unix:b", 77)
    decoding(unit, 1, 8)
    counters = {
        Word.NUM_STEPS: 5,
        Word.NUM_COMPUTED_TOKENS: 60,
        Word.KV_BYTES_WRITTEN: 700,
        Word.BUSY_NS: 8_500_000_000,
        Word.SWAP_OUT_BYTES: 90,
        Word.SWAP_IN_BYTES: 80,
        Word.SWAP_NS: 250_000_000,
    }
    for word, value in counters.items():
        page.write(3, word, value)
    other = next(name for name in unit.workers if name not in (prefill, decode))
    first, second, third = status_of(unit, page, {prefill: 0, decode: 3, other: 1}).workers
    assert (second.name, second.role, second.model, second.pid) == (decode, "decode", "a", 1)
    assert (second.ready, second.num_leases) == (True, 1)
    assert (second.num_steps, second.num_computed_tokens, second.kv_bytes_written) == (5, 60, 700)
    assert (second.busy_s, second.swap_out_bytes, second.swap_in_bytes, second.swap_s) == (8.5, 90, 80, 0.25)
    assert (first.name, first.num_leases, first.num_steps) == (prefill, 0, 0)
    assert (third.name, third.pid, third.ready) == (other, 77, False)
