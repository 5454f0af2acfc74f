"""Which sequences give up token blocks when the pool is full, when, and where their KV goes. Pure.

`MemoryReclaim` is the part of a unit that chooses victims; workers then swap their KV out or free it. Three kinds of
callers lack memory:

- a queued request or a swapped sequence: it takes the blocks of paused sequences that follow it in the order;
- a growing sequence: as above, and when it has nearly no slot left it claims those of sequences of the batch too;
- an entry within its model's quota: after a second, loans to other models are reclaimed.

By the costs of `kvstore.preemption_costs`, the first two wait instead where memory will be free by itself soon, and a
victim that would be swapped is computed again where that costs less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from kvstore.admission import Admission, AdmissionEntry
from kvstore.block_table import BlockTable
from kvstore.leases import LeaseRecord, LeaseState, LeaseTable
from kvstore.preemption_costs import (
    KvCosts,
    WayCosts,
    expected_wait_s,
    free_after_s,
    keep_cost_s,
    recompute_cost_s,
    swap_cost_s,
)
from kvstore.swap_space import SwapSpace
from kvstore.unit_model import UnitModel
from kvstore.victim_choice import NO_LEASE, Order, Victim, last_after, last_in_order, lease_order
from muxmesh.errors import Overloaded
from muxmesh.execution import PreemptionReason
from muxmesh.kv_cost import copy_s
from muxmesh.scheduling_policy import SchedulingPolicy, SortKey
from muxmesh.types import SWAP_PAGE_BYTES, LeaseRef, PreemptionMode, SchedulingState, blocks_for

RECLAIM_AFTER_S = 1.0
"""Once an entry within its model's quota has waited for memory this long, loans are reclaimed by pre-emption."""
RECLAIM_EVERY_S = 0.1
"""Minimum time between two pre-emption requests."""


@dataclass(frozen=True, slots=True)
class PreemptionRequest:
    """A request that ``worker`` frees the token blocks of a lease, by swapping them out or by releasing the lease."""

    worker: str
    lease_id: int
    reason: PreemptionReason


@dataclass(frozen=True, slots=True)
class MemoryLack:
    """A request or a growing sequence for whose ``num_blocks`` the pool had no memory.

    ``num_waiting``: entries of its model that wait with it. ``lease_id``: of the growing sequence; None for a request.
    ``claims_batched``: whether it may take the blocks of sequences that a batch has.
    """

    model: str
    scheduling: SchedulingState
    num_blocks: int
    num_waiting: int = 1
    lease_id: int | None = None
    claims_batched: bool = False

    @property
    def reason(self) -> PreemptionReason:
        """Why its victim is pre-empted."""
        return PreemptionReason.KV_ADMISSION if self.lease_id is None else PreemptionReason.KV_GROWTH


class MemoryReclaim:
    """Owns when memory is reclaimed next, and which growing sequences wait for it."""

    def __init__(
        self,
        leases: LeaseTable,
        blocks: BlockTable,
        swap: SwapSpace,
        admission: Admission,
        models: Mapping[str, UnitModel],
        policy: SchedulingPolicy,
        mode: PreemptionMode,
    ) -> None:
        self.costs_of: Callable[[str], KvCosts] = lambda model: KvCosts()
        """The costs of a model's KV as measured; asked only when memory lacks."""
        self.on_choice: Callable[[LeaseRecord, MemoryLack, WayCosts], None] = lambda record, lack, costs: None
        """Called with each choice that is made by expected cost: the victim, who needs its memory, and the costs."""
        self._leases, self._blocks, self._swap, self._admission = leases, blocks, swap, admission
        self._models, self._policy, self._mode = models, policy, mode
        self._loans_at_s: float | None = None
        self._followers_at_s: float | None = None
        self._growth_lacks: dict[str, MemoryLack] = {}
        """Model → the first of its sequences in order that could not grow since the last `reclaim_followers`."""
        self._claims: dict[int, str] = {}
        """Growing leases for which a victim frees its blocks → their models."""

    @property
    def is_claimed(self) -> bool:
        """Whether an entry within its model's quota waits for memory: no model grows past its quota then."""
        return self._loans_at_s is not None

    @property
    def has_growth_lacks(self) -> bool:
        """Whether the next `reclaim_followers` looks for blocks for a growing sequence."""
        return bool(self._growth_lacks)

    def next_change_s(self) -> Iterable[float | None]:
        """Monotonic times at which `Unit.schedule` has to be called."""
        return self._loans_at_s, self._followers_at_s

    def serves(self, ref: LeaseRef) -> bool:
        """Whether a victim frees its blocks for a growing lease, as of the last call of `reclaim_followers`."""
        return ref.lease_id in self._claims

    def claim_ends(self, ref: LeaseRef) -> None:
        """To be called when a lease got blocks, or may have none: it claims none any more."""
        self._claims.pop(ref.lease_id, None)

    def follows_a_claim(
        self, model: str, scheduling: SchedulingState, unix_s: float, lease_id: float = NO_LEASE
    ) -> bool:
        """Whether a growing sequence of ``model`` that precedes ``scheduling`` waits for blocks that a victim frees.

        They are not for others: the victim itself would take them back. ``lease_id``: the lease of ``scheduling``.
        """
        own = None
        for claiming, of_model in list(self._claims.items()):
            record = self._leases.find(claiming)
            if record is None or record.state not in (LeaseState.RESIDENT, LeaseState.PAUSED):
                del self._claims[claiming]
            elif of_model == model:
                own = own or (self._policy.sort_key(scheduling, unix_s), lease_id)
                if lease_order(record, self._order(unix_s)) < own:
                    return True
        return False

    def growth_failed(self, lack: MemoryLack, unix_s: float) -> None:
        """A lease could not grow. The next `reclaim_followers` looks for blocks for the first such in the order."""
        known = self._growth_lacks.get(lack.model)
        order = self._order(unix_s)

        def position(one: MemoryLack) -> tuple[bool, SortKey, float]:
            return not one.claims_batched, order(one.scheduling), NO_LEASE if one.lease_id is None else one.lease_id

        if known is None or position(lack) < position(known):
            self._growth_lacks[lack.model] = lack

    def reclaim_loans(
        self, lacks_memory: bool, borrowed: Callable[[], Iterable[LeaseRecord]], now_s: float, unix_s: float
    ) -> list[PreemptionRequest]:
        """Waits for loans to return as requests end; after `RECLAIM_AFTER_S`, pre-empts the last sequence in order.

        ``lacks_memory``: an entry within its model's quota lacks memory. ``borrowed``: the leases of decode workers of
        models that use more than their quota.
        """
        if not lacks_memory:
            self._loans_at_s = None
        elif self._loans_at_s is None:
            self._loans_at_s = now_s + RECLAIM_AFTER_S
        elif now_s >= self._loans_at_s:
            self._loans_at_s = now_s + RECLAIM_EVERY_S
            return self._preempt(last_in_order(borrowed(), self._order(unix_s)), PreemptionReason.KV_QUOTA)
        return []

    def reclaim_followers(self, lacking: Iterable[MemoryLack], now_s: float, unix_s: float) -> list[PreemptionRequest]:
        """Pre-empts the last sequence in order for each that lacks memory and precedes it, unless waiting costs less.

        ``lacking``: requests that lack memory, at most one of each model; growing sequences are known.
        """
        growing = list(self._growth_lacks.values())
        self._growth_lacks.clear()
        for lack in growing:
            if lack.lease_id is not None:
                self._claims.pop(lack.lease_id, None)
        lacks = [*growing, *lacking]
        due_s = self._followers_at_s
        is_early = due_s is not None and now_s < due_s
        requests: list[PreemptionRequest] = []
        has_victim = False
        for lack in lacks:
            if is_early and not lack.claims_batched:
                continue
            victim = self._victim_for(lack, unix_s)
            if victim is None:
                continue
            has_victim = True
            if self._is_kept(victim, lack, unix_s):
                continue
            if lack.lease_id is not None and lack.claims_batched:
                self._claims[lack.lease_id] = lack.model
            is_leaving = victim.record.state is LeaseState.SWAPPING_OUT
            if victim.is_new or not (is_early or is_leaving):
                requests += self._preempt(victim, lack.reason)
        if not is_early:
            self._followers_at_s = now_s + RECLAIM_EVERY_S if has_victim else None
        return requests

    def begin_swap_out(self, ref: LeaseRef, owner: str, num_bytes: int, unix_s: float) -> tuple[int, ...]:
        """Returns swap pages for a copy of a lease's KV. Raises LeaseLost.

        Raises Overloaded if its KV has to be freed instead: the region has too few free pages, or a swap costs more.
        """
        record = self._leases.owned(ref, owner)
        if self._swap.num_free_pages < blocks_for(num_bytes, SWAP_PAGE_BYTES):
            raise Overloaded(f"the swap region has fewer than {num_bytes} free bytes")
        best = self.way_costs(record, num_bytes, None, unix_s).best if self._mode == "auto" else self._mode
        if best == "recompute":
            raise Overloaded("to compute its KV again costs less than a swap")
        pages = self._leases.begin_swap_out(ref, owner, num_bytes)
        assert pages is not None, "enough pages are free"
        return pages

    def is_due_soon(self, entry: AdmissionEntry, ahead_s: float, unix_s: float) -> bool:
        """Whether a swapped lease that waits gets a slot within the time of its copy in and ``ahead_s``."""
        assert entry.swapped is not None
        record = self._leases.owned(entry.swapped, entry.source)
        model = entry.model
        copying_s = copy_s(len(record.swap_pages) * SWAP_PAGE_BYTES, self.costs_of(model).rates.in_bytes_per_s)
        wait_s = self.expected_wait_s(entry.source, model, entry.request.scheduling, unix_s)
        return wait_s <= copying_s + ahead_s

    def expected_wait_s(
        self, worker: str, model: str, scheduling: SchedulingState, unix_s: float, lease_id: int | None = None
    ) -> float:
        """Seconds until a sequence of ``worker`` gets a slot in its batch again, by the order of now.

        ``lease_id``: its lease, if the batch still has it. The work of sequences without a prediction is not known, so
        the wait for their slots is infinite.
        """
        order = self._order(unix_s)
        key = order(scheduling)
        before = [
            one.scheduling
            for one in self._leases.of_models([model])
            if one.owner == worker and one.state in (LeaseState.PAUSED, LeaseState.SWAPPED)
        ]
        before += self._admission.requests_of(model)
        preceding = sorted((order(one), one.remaining_s or math.inf) for one in before if order(one) < key)
        running = [
            one.scheduling.remaining_s or math.inf
            for one in self._leases.decoding_in(worker)
            if one.lease.ref.lease_id != lease_id
        ]
        return expected_wait_s(self._models[model].max_num_seqs, running, [work_s for _, work_s in preceding])

    def _victim_for(self, lack: MemoryLack, unix_s: float) -> Victim | None:
        """The sequence that may free its blocks for ``lack``; None if there is none."""
        if self._mode == "keep" and not lack.claims_batched:
            return None
        order = self._order(unix_s)
        growing = None if lack.lease_id is None else self._leases.find(lack.lease_id)
        after = (order(lack.scheduling), NO_LEASE) if growing is None else lease_order(growing, order)  # as of now
        records = [
            one
            for one in self._leases.of_models([lack.model])
            if one.owner == one.assignment.decode and one is not growing
        ]
        return last_after(records, order, after, lack.claims_batched)

    def _is_kept(self, victim: Victim, lack: MemoryLack, unix_s: float) -> bool:
        """Whether it costs less to wait for other memory. A claim does not wait, since its sequence cannot go on."""
        if not victim.is_new or lack.claims_batched or self._mode != "auto":
            return False
        costs = self.way_costs(victim.record, self.kv_bytes(victim.record), lack, unix_s)
        self.on_choice(victim.record, lack, costs)
        return costs.best == "keep"

    def way_costs(self, record: LeaseRecord, num_bytes: int, lack: MemoryLack | None, unix_s: float) -> WayCosts:
        """Cost of keeping, swapping or recomputing the KV of a victim.

        ``lack``: what needs its memory; None: it is freed in any case, so it cannot be kept.
        """
        kept_s = math.inf
        if lack is not None:
            missing = lack.num_blocks - self._blocks.num_available(lack.model)
            freed_s = free_after_s(missing, self._running(lack.model, lack.lease_id))
            kept_s = keep_cost_s(freed_s, lack.num_waiting)
        swapped_s = self._swap_cost_s(record, num_bytes, unix_s)
        return WayCosts(kept_s, swapped_s, self._recompute_cost_s(record))

    def _recompute_cost_s(self, record: LeaseRecord) -> float:
        costs = self.costs_of(record.lease.model)
        num_tokens = len(record.lease.block_ids) * record.block_size
        num_others = sum(len(self._running(model, record.lease.ref.lease_id)) for model in self._models)
        return recompute_cost_s(num_tokens, num_others, costs)

    def _swap_cost_s(self, record: LeaseRecord, num_bytes: int, unix_s: float) -> float:
        model = record.lease.model
        if not self._swap.num_pages:
            return math.inf
        wait_s = self.expected_wait_s(record.owner, model, record.scheduling, unix_s, record.lease.ref.lease_id)
        queued = sum(
            self.kv_bytes(one)
            for one in self._leases.of_models([model])
            if one.state in (LeaseState.SWAPPING_OUT, LeaseState.SWAPPING_IN)
        )
        returns_s = free_after_s(len(record.lease.block_ids), self._running(model, record.lease.ref.lease_id))
        return swap_cost_s(num_bytes, max(wait_s, returns_s), self.costs_of(model), queued)

    def kv_bytes(self, record: LeaseRecord) -> int:
        """Bytes of the token blocks of a lease."""
        return len(record.lease.block_ids) * self._models[record.lease.model].shape.token_block_bytes

    def _running(self, model: str, beside: int | None = None) -> list[tuple[float, int]]:
        """Remaining seconds and token blocks of the sequences that decode workers have in their batches.

        Those of a sequence without a prediction are infinite, since its work is not known. Without lease ``beside``.
        """
        return [
            (one.scheduling.decode_s or math.inf, len(one.lease.block_ids))
            for one in self._leases.of_models([model])
            if one.state is LeaseState.RESIDENT
            and one.owner == one.assignment.decode
            and one.lease.ref.lease_id != beside
        ]

    def _order(self, unix_s: float) -> Order:
        return lambda state: self._policy.sort_key(state, unix_s)

    @staticmethod
    def _preempt(victim: Victim | None, reason: PreemptionReason) -> list[PreemptionRequest]:
        if victim is None:
            return []
        victim.record.num_preemption_requests += 1
        return [PreemptionRequest(victim.record.owner, victim.record.lease.ref.lease_id, reason)]
