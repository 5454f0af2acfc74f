"""Workers that go on from any state of a unit until everything has finished, for tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from kvstore.leases import LeaseRecord, LeaseState
from kvstore.sequence_progress import SequenceProgress
from kvstore.unit import Unit
from muxmesh.errors import InvalidRequest, Overloaded, WorkerLost
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.types import KvDemand, QueuedRequest, Role

ROUND_S = 0.5
GROWTH_BLOCKS = 3
"""Each sequence grows by so many token blocks before it ends, as far as the pool can hold it. One that is pre-empted
keeps its tokens, and gets a block more when it goes on.
"""
_HELD = (LeaseState.RESIDENT, LeaseState.PAUSED)


class UnitDrain:
    """A router and the workers of a unit, which do what they are to do; nothing new arrives."""

    def __init__(
        self,
        unit: Unit,
        policy: SchedulingPolicy,
        entries: Mapping[int, QueuedRequest],
        requests: Mapping[int, QueuedRequest],
        now_s: float,
    ) -> None:
        """``entries``: requests by the ids of their entries; ``requests``: those of the leases."""
        self._unit, self._policy, self._now_s = unit, policy, now_s
        self._entries, self._requests = dict(entries), dict(requests)
        self._num_grown = Counter[int]()
        """By lease."""
        self._num_grown_of_entry = Counter[int]()
        self._demands: dict[int, KvDemand] = {}
        """Of swapped leases."""
        self._last_entry = 10**6

    def run(self) -> int:
        """Goes on until nothing waits and no lease is left; returns the rounds that it took."""
        unit = self._unit
        num_items = len(unit.leases) + len(unit.admission.waiting)
        max_rounds = 60 + 40 * num_items
        for number in range(max_rounds):
            if not unit.leases and not unit.admission.waiting:
                return number
            self._now_s += ROUND_S
            self._round()
        raise AssertionError(f"not finished: {unit.leases._records} {unit.admission._entries}")

    def _round(self) -> None:
        unit = self._unit
        for worker in unit.workers.values():
            worker.ready = True
            worker.report(worker.num_told)
        self._schedule()
        for record in list(unit.leases._records.values()):
            if unit.leases.find(record.lease.ref.lease_id) is record:
                self._advance(record)
        self._choose_batches()
        for record in self._in_order(unit.leases._records.values()):
            has_ended = unit.leases.find(record.lease.ref.lease_id) is not record
            if not has_ended and record.state is LeaseState.RESIDENT and record.owner == record.assignment.decode:
                self._decode(record)

    def _advance(self, record: LeaseRecord) -> None:
        """Does what a lease waits for: its hand-off, or a copy."""
        leases, ref, owner = self._unit.leases, record.lease.ref, record.owner
        match record.state:
            case LeaseState.CREDIT:
                try:
                    self._unit.acquire(ref, record.assignment.prefill)
                except WorkerLost:
                    self._again(record)
            case LeaseState.SWAPPING_OUT:
                leases.finish_swap_out(ref, owner)
            case LeaseState.SWAPPING_IN:
                leases.finish_swap_in(ref, owner)
            case LeaseState.SWAPPED if (owner, ref.lease_id) not in self._unit.admission.waiting:
                given = self._requests[ref.lease_id].demand
                demand = self._demands.get(ref.lease_id, KvDemand(given.num_tokens, given.max_tokens))
                self._unit.request_swap_in(ref, owner, demand, record.scheduling)
            case LeaseState.PAUSED | LeaseState.RESIDENT if owner == record.assignment.prefill:
                if record.state is LeaseState.PAUSED:
                    leases.resume(ref, owner)
                decodes = self._unit.ready_workers(Role.DECODE, record.lease.model)
                to = record.assignment.decode
                if to not in self._unit.workers:
                    if not decodes:
                        self._again(record)
                        return
                    to = decodes[0].name
                self._unit.move(ref, owner, to, record.lease.num_computed_tokens, (1,))

    def _choose_batches(self) -> None:
        """The first sequences of each decode worker are in its batch."""
        unit = self._unit
        num_batched = Counter[str]()
        for record in self._in_order(unit.leases._records.values()):
            if record.state in _HELD and record.owner == record.assignment.decode:
                limit = unit.models[record.lease.model].max_num_seqs
                is_batched = num_batched[record.owner] < limit
                num_batched[record.owner] += is_batched
                unit.report({record.lease.ref.lease_id: SequenceProgress(is_batched)})

    def _decode(self, record: LeaseRecord) -> None:
        """Grows a sequence by one block; it ends when it has its growth. Without memory it is pre-empted."""
        unit, ref = self._unit, record.lease.ref
        capacity = unit.pool.capacity_blocks(record.lease.model)
        if self._num_grown[ref.lease_id] >= GROWTH_BLOCKS or len(record.lease.block_ids) >= capacity:
            unit.release(ref, record.owner)
        elif unit.grow(ref, record.owner, 1, claims=True, unix_s=self._now_s) is not None:
            self._num_grown[ref.lease_id] += 1
        else:
            self._schedule()
            if unit.leases.find(ref.lease_id) is record and record.state in _HELD and not unit.reclaim.serves(ref):
                self._free_blocks(record)

    def _schedule(self) -> None:
        """Schedules the unit, and pre-empts what it decides. Its other decisions show in the states of leases."""
        decisions = self._unit.schedule(self._now_s, self._now_s)
        for credit in decisions.credits:
            lease_id = credit.lease.ref.lease_id
            self._requests[lease_id] = self._entries[credit.entry_id]
            self._num_grown[lease_id] = self._num_grown_of_entry[credit.entry_id]
        for preemption in decisions.preemptions:
            record = self._unit.leases.find(preemption.lease_id)
            if record is not None and record.state in _HELD:
                self._free_blocks(record)

    def _free_blocks(self, record: LeaseRecord) -> None:
        """Swaps a sequence out, or frees its blocks and queues its request again."""
        unit, ref = self._unit, record.lease.ref
        num_blocks = min(len(record.lease.block_ids) + 1, unit.pool.capacity_blocks(record.lease.model))
        num_tokens = num_blocks * record.block_size
        self._num_grown[ref.lease_id] += 1
        try:
            unit.reclaim.begin_swap_out(ref, record.owner, unit.reclaim.kv_bytes(record), self._now_s)
            self._demands[ref.lease_id] = KvDemand(num_tokens, num_tokens)
        except Overloaded:
            self._again(record, num_tokens)

    def _again(self, record: LeaseRecord, num_tokens: int | None = None) -> None:
        """Ends a lease, and queues its request again if its model is still served. ``num_tokens``: of its demand."""
        ref = record.lease.ref
        self._unit.release(ref, record.owner)
        self._last_entry += 1
        request = replace(self._requests[ref.lease_id], entry_id=self._last_entry)
        if num_tokens is not None:
            request = replace(request, demand=replace(request.demand, num_tokens=num_tokens, max_tokens=num_tokens))
        self._entries[self._last_entry] = request
        self._num_grown_of_entry[self._last_entry] = self._num_grown[ref.lease_id]
        try:
            self._unit.offer("router", request)
        except InvalidRequest:
            assert request.model == "c", "only `c` is ever removed"

    def _in_order(self, records: Iterable[LeaseRecord]) -> list[LeaseRecord]:
        key = self._policy.sort_key
        return sorted(records, key=lambda one: (key(one.scheduling, self._now_s), one.lease.ref.lease_id))
