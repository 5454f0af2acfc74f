"""A small lease table, with leases in any state."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.block_table import BlockTable
from kvstore.leases import Assignment, LeaseState, LeaseTable
from kvstore.slab_pool import SlabPool
from kvstore.swap_space import SwapSpace
from muxmesh.types import SWAP_PAGE_BYTES, KvDemand, Lease, LeaseRef, SchedulingState

BLOCK_SIZE = 8
NUM_PAGES = 8
WORKERS = Assignment("prefill", "decode")

OPERATIONS: dict[str, Callable[[LeaseTable, LeaseRef, str], object]] = {
    "acquire": lambda table, ref, owner: table.acquire(ref, "prefill"),
    "move": lambda table, ref, owner: table.move(ref, owner, "decode", 24, (7,)),
    "grow": lambda table, ref, owner: table.grow(ref, owner, 1),
    "pause": lambda table, ref, owner: table.pause(ref, owner),
    "resume": lambda table, ref, owner: table.resume(ref, owner),
    "begin_swap_out": lambda table, ref, owner: table.begin_swap_out(ref, owner, 2 * SWAP_PAGE_BYTES),
    "finish_swap_out": lambda table, ref, owner: table.finish_swap_out(ref, owner),
    "begin_swap_in": lambda table, ref, owner: table.begin_swap_in(ref, KvDemand(24, 24)),
    "finish_swap_in": lambda table, ref, owner: table.finish_swap_in(ref, owner),
}
OPERATIONS_BEFORE = {
    LeaseState.CREDIT: (),
    LeaseState.RESIDENT: ("acquire",),
    LeaseState.PAUSED: ("acquire", "pause"),
    LeaseState.SWAPPING_OUT: ("acquire", "begin_swap_out"),
    LeaseState.SWAPPED: ("acquire", "begin_swap_out", "finish_swap_out"),
    LeaseState.SWAPPING_IN: ("acquire", "begin_swap_out", "finish_swap_out", "begin_swap_in"),
}


class SmallUnit:
    """A lease table over two slabs, each of 8 blocks of `m` or 4 of `other`, and 8 swap pages."""

    def __init__(self, last_id: int = 0) -> None:
        self.blocks = BlockTable(SlabPool(2))
        self.blocks.add_model("m", 8)
        self.blocks.add_model("other", 4)
        self.swap = SwapSpace(NUM_PAGES * SWAP_PAGE_BYTES)
        self.table = LeaseTable(self.blocks, self.swap, last_id)

    def try_credit(
        self,
        num_tokens: int = 24,
        router: str = "router",
        model: str = "m",
        hashes: tuple[bytes, ...] = (),
        assignment: Assignment = WORKERS,
        expires_at_s: float = 30.0,
        arrived_at_s: float = 0.0,
        max_new_slabs: int | None = None,
    ) -> Lease | None:
        demand = KvDemand(num_tokens, num_tokens, hashes, max(0, num_tokens - 1))
        scheduling = SchedulingState(0, arrived_at_s)
        return self.table.issue_credit(
            model, BLOCK_SIZE, demand, scheduling, router, assignment, expires_at_s, max_new_slabs
        )

    def credit(self, num_tokens: int = 24, router: str = "router", model: str = "m",
        hashes: tuple[bytes, ...] = (), assignment: Assignment = WORKERS, expires_at_s: float = 30.0,
        arrived_at_s: float = 0.0) -> Lease:  # fmt: skip
        lease = self.try_credit(num_tokens, router, model, hashes, assignment, expires_at_s, arrived_at_s)
        assert lease is not None
        return lease

    def resident(
        self, num_tokens: int = 24, worker: str = "decode", model: str = "m", arrived_at_s: float = 0.0
    ) -> Lease:
        return self.table.acquire(self.credit(num_tokens, model=model, arrived_at_s=arrived_at_s).ref, worker)

    def in_state(self, state: LeaseState) -> tuple[LeaseRef, str]:
        """A lease of three blocks in ``state``, and its owner."""
        ref, owner = self.credit().ref, "router"
        for operation in OPERATIONS_BEFORE[state]:
            OPERATIONS[operation](self.table, ref, owner)
            ref, owner = self.table.of_owner("prefill")[0].ref, "prefill"
        assert self.table.state_of(ref, owner) is state
        return ref, owner

    def swapped(self, num_tokens: int = 24, computed: tuple[bytes, ...] = ()) -> Lease:
        lease = self.resident(num_tokens)
        assert self.table.begin_swap_out(lease.ref, "decode", SWAP_PAGE_BYTES) is not None
        self.table.finish_swap_out(lease.ref, "decode", computed)
        return lease

    def check(self, blocks: int, pages: int, num_leases: int) -> None:
        """Token blocks in use, allocated swap pages, and leases."""
        self.table.check_integrity()
        num_pages = NUM_PAGES - self.swap.num_free_pages
        assert (self.blocks.num_in_use("m"), num_pages, len(self.table)) == (blocks, pages, num_leases)
