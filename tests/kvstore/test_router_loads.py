from __future__ import annotations

from kvstore.router_loads import NO_LOAD, Load, load_of_others, router_loads
from muxmesh.step_cost import context_of
from muxmesh.types import KvDemand, Role
from tests.kvstore.small_unit import attach_ready, make_unit, queued, schedule

HASHES = tuple(bytes([value]) * 16 for value in range(4))
"""Of a prompt of model `a`, whose blocks have 8 tokens: 32 tokens."""


def test_queued_requests_and_leases_count_for_their_router_until_their_prompt_is_computed() -> None:
    unit = make_unit()
    unit.offer("r1", queued(1, num_tokens=40, hashes=HASHES, max_cached_tokens=39))
    assert router_loads(unit)["a"] == {"r1": Load(1, 32, context_of(0, 32))}, "it waits for workers"
    prefill, decode = attach_ready(unit, "a")
    (credit,) = schedule(unit).credits
    assert router_loads(unit)["a"] == {"r1": Load(1, 32, context_of(0, 32))}
    lease = unit.acquire(credit.lease.ref, prefill)
    assert router_loads(unit)["a"] == {"r1": Load(1, 32, context_of(0, 32))}
    lease = unit.move(lease.ref, prefill, decode, 33, (1,))
    assert router_loads(unit)["a"] == {"r1": Load(1)}
    unit.offer("r2", queued(2, num_tokens=40, hashes=HASHES[:3], max_cached_tokens=20))
    loads = router_loads(unit)["a"]
    assert loads["r2"] == Load(1, 24 - 20, context_of(20, 4)), "it may use 20 tokens of the prefix cache"
    unit.release(lease.ref, decode)
    assert router_loads(unit)["a"].keys() == {"r2"}


def test_a_swapped_lease_counts_once() -> None:
    unit = make_unit(swap_bytes=1 << 20)
    _, decode = attach_ready(unit, "a")
    prefill = unit.ready_workers(Role.PREFILL, "a")[0].name
    unit.offer("r1", queued(1))
    (credit,) = schedule(unit).credits
    lease = unit.move(unit.acquire(credit.lease.ref, prefill).ref, prefill, decode, 7, (1,))
    unit.leases.begin_swap_out(lease.ref, decode, 64)
    unit.leases.finish_swap_out(lease.ref, decode)
    unit.request_swap_in(lease.ref, decode, KvDemand(8, 8), credit.scheduling)
    assert router_loads(unit)["a"] == {"r1": Load(1)}


def test_the_load_of_others_leaves_out_the_router_s_own() -> None:
    loads = {"r1": Load(1, 2, 3), "r2": Load(4, 5, 6), "r3": Load(7, 8, 9)}
    assert load_of_others(loads, "r2") == Load(8, 10, 12)
    assert load_of_others(loads, "r4") == Load(12, 15, 18)
    assert load_of_others({}, "r1") == NO_LOAD


def test_a_router_that_has_connected_again_is_not_another_one() -> None:
    loads = {"r-1f#1": Load(1, 2, 3), "r-2e#1": Load(4, 5, 6)}
    assert load_of_others(loads, "r-1f#2") == Load(4, 5, 6)
