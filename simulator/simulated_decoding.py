"""The sequences of one unit between their hand-off and their last token, in virtual time: growth, pre-emption, swap.

A pre-empted sequence is swapped out, or computed again if that costs less or too few swap pages are free. The changes
of a lease are those of `worker.sequence_kv`, through the unit's own methods. This module knows no queue and no arbiter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from kvstore.leases import LeaseRecord, StandingChange
from kvstore.sequence_progress import SequenceProgress
from kvstore.unit import IssuedSwapIn, Unit
from muxmesh.config.model_config import ModelConfig
from muxmesh.device.kv_codec import encoded_bytes
from muxmesh.errors import Overloaded
from muxmesh.models.model_spec import KvShape
from muxmesh.remaining_work import RemainingWork
from muxmesh.slo import RequestSlo, catch_up_s, next_token_due_s
from muxmesh.step_cost import ModelCosts
from muxmesh.types import KvDemand, Lease, SchedulingState, blocks_for
from simulator.simulated_device import Device
from simulator.simulated_request import SimulatedRequest
from simulator.simulated_workers import DecodeJob, DecodeWorker, PrefillWorker
from simulator.swap_copies import SwapCopies
from simulator.timeline import Timeline
from worker.block_growth import CLAIM_RETRY_S, GROWTH_TOKENS, BlockGrowth


@dataclass(slots=True)
class ServedModel:
    """One model of the unit, with its workers and their names."""

    config: ModelConfig
    prefill: PrefillWorker
    decode: DecodeWorker
    prefill_name: str
    decode_name: str
    shape: KvShape
    slo: RequestSlo | None
    swap: SwapCopies
    costs: ModelCosts | None = None


@dataclass(slots=True)
class _DecodingSequence:
    """A sequence between its hand-off and its last token. ``num_blocks``: token blocks of its lease."""

    request: SimulatedRequest
    served: ServedModel
    lease: Lease
    num_blocks: int
    growth: BlockGrowth
    work: RemainingWork
    job: DecodeJob = field(init=False)
    is_preempted: bool = False
    """The unit recalls its blocks."""
    waits_for_block: bool = False
    """It has no free slot, and another sequence frees its blocks for it."""
    due_at_s: float = math.inf
    """When the next token is due, while the sequence is swapped out."""
    is_exact: bool = True
    """False after its KV was quantized: it is not shared then."""

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """Hashes of its first blocks, for the prefix cache."""
        return self.request.hashes if self.is_exact else ()


class SimulatedDecoding:
    """Owns the sequences that a unit's decode workers have, computing, pre-empted or swapped out."""

    def __init__(
        self,
        timeline: Timeline,
        unit: Unit,
        device: Device,
        workers: Sequence[DecodeWorker],
        schedule: Callable[[], None],
        finish: Callable[[SimulatedRequest, Lease, str, tuple[bytes, ...], float], None],
        requeue: Callable[[SimulatedRequest], None],
    ) -> None:
        """``schedule``: schedules the unit. ``finish`` gets a request that has its last token, its lease, the owner of
        that, the hashes of its computed blocks and its work done in seconds. ``requeue`` gets a request whose KV was
        freed.
        """
        self.num_requeued = 0
        self.num_swapped = 0
        self._timeline = timeline
        self._unit = unit
        self._device = device
        self._workers = workers
        self._schedule = schedule
        self._finish = finish
        self._requeue_request = requeue
        self._sequences: dict[int, _DecodingSequence] = {}
        """By the id of their lease."""

    def hand_off(self, request: SimulatedRequest, served: ServedModel, lease: Lease, delay_s: float) -> None:
        """A prefill worker has moved the lease of a request, which the decode worker learns after ``delay_s``."""
        block_size = served.config.block_size
        growth = BlockGrowth(block_size, blocks_for(request.max_tokens, block_size))
        work = RemainingWork(request.arrived, request.prediction, 0, request.max_new_tokens)
        work.update(request.num_sent)
        work.set_standing(self._unit.leases.owned(lease.ref, served.decode_name).scheduling.standing)
        sequence = _DecodingSequence(request, served, lease, len(lease.block_ids), growth, work)
        self._sequences[lease.ref.lease_id] = sequence
        sequence.job = self._decode_job(sequence)
        self._timeline.after(delay_s, lambda: self._add(sequence))

    def preempt(self, lease_id: int) -> None:
        """Pre-empts a sequence after its current step, if it computes."""
        sequence = self._sequences.get(lease_id)
        if sequence is None or (sequence.job.is_removed and not sequence.waits_for_block):
            return
        if sequence.waits_for_block:
            sequence.is_preempted = True
            return
        if sequence.job.is_batched:
            sequence.is_preempted = True
            sequence.served.decode.check_soon(sequence.job)
            self._device.wake(sequence.served.decode)
        elif sequence.job.is_displaced:
            self._timeline.after(0.0, lambda: self._preempt_displaced(sequence))

    def set_standing(self, change: StandingChange) -> None:
        """Orders some sequences by another standing of their tenant from the next step on."""
        workers: dict[int, DecodeWorker] = {}
        for lease_id in change.lease_ids:
            if (sequence := self._sequences.get(lease_id)) is not None:
                decode = sequence.served.decode
                decode.set_standing(sequence.job, change.standing)
                workers[id(decode)] = decode
        for decode in workers.values():
            decode.plan_soon()
            self._device.wake(decode)

    def count_tokens(self) -> Counter[str]:
        """Tenant → output tokens sampled so far, of the sequences that have not ended."""
        tokens = Counter[str]()
        for sequence in self._sequences.values():
            request, job = sequence.request, sequence.job
            tokens[request.tenant] += request.num_sent
            if not job.is_removed:
                tokens[request.tenant] += sequence.served.decode.num_tokens(job)
        return tokens

    def progress(self) -> dict[int, SequenceProgress]:
        """What decode workers report, by lease id: of the sequences that may have changed since the last call."""
        now_s = self._timeline.now_s
        return {job.key: _progress_of(job) for worker in self._workers for job in worker.changed(now_s)}

    @contextmanager
    def true_work(self) -> Iterator[None]:
        """While it is entered, the unit's leases have the true remaining work of their sequences."""
        predicted: list[tuple[LeaseRecord, SchedulingState]] = []
        for sequence in self._sequences.values():
            record, request = self._unit.leases.owned(sequence.lease.ref, sequence.served.decode_name), sequence.request
            predicted.append((record, record.scheduling))
            num_sent = request.num_sent
            if not sequence.job.is_removed:
                num_sent += sequence.served.decode.num_tokens(sequence.job)
            expected = max(1.0, sequence.work.expected_tokens - num_sent)
            share = (request.num_output - num_sent) / expected
            record.scheduling = replace(record.scheduling, decode_s=record.scheduling.decode_s * share)
        try:
            yield
        finally:
            for record, scheduling in predicted:
                record.scheduling = scheduling

    def _decode_job(self, sequence: _DecodingSequence) -> DecodeJob:
        """The job of a sequence for the rest of its output."""
        request, growth = sequence.request, sequence.growth
        tpot_s = request.slo.tpot_s if request.slo else None
        job = DecodeJob(
            request.num_prompt + request.num_sent - 1,
            request.num_output - request.num_sent,
            done=lambda: self._on_decoded(sequence),
            next_check=lambda: growth.tokens_until_request(sequence.num_blocks, self._num_free_slots(sequence)),
            check=lambda: self._check(sequence),
            work=sequence.work,
            num_output=request.num_sent,
            tpot_s=math.inf if tpot_s is None else tpot_s,
            lost_after_s=catch_up_s(request.slo),
            num_preemptions=request.num_preemptions,
            key=sequence.lease.ref.lease_id,
        )
        sequence.served.decode.note_change(job)
        return job

    def _add(self, sequence: _DecodingSequence) -> None:
        """Adds the job of a sequence that comes from prefill."""
        now_s = self._timeline.now_s
        sequence.job.due_at_s = next_token_due_s(sequence.request.slo_at(now_s), now_s)
        decode = sequence.served.decode
        decode.add(sequence.job)
        self._device.wake(decode)

    def _num_free_slots(self, sequence: _DecodingSequence) -> int:
        request, served = sequence.request, sequence.served
        num_tokens = request.num_prompt + request.num_sent + served.decode.num_tokens(sequence.job)
        return sequence.num_blocks * served.config.block_size - num_tokens

    def _check(self, sequence: _DecodingSequence) -> None:
        """Grows the lease of a sequence, or pre-empts it if the unit recalls its blocks or the pool is full."""
        if sequence.is_preempted:
            self._preempt(sequence)
            return
        growth, num_free = sequence.growth, self._num_free_slots(sequence)
        num_wanted = growth.blocks_to_request(sequence.num_blocks, num_free)
        if num_wanted and not self._grow(sequence, num_wanted):
            if growth.is_claim(num_free) and self._claim(sequence):
                return
            if growth.on_pool_full(num_free):
                self._preempt(sequence)
                return
        sequence.served.decode.schedule_check(sequence.job)

    def _grow(self, sequence: _DecodingSequence, num_wanted: int) -> bool:
        """Grows the lease by ``num_wanted`` token blocks or fewer; False if the pool has none."""
        while num_wanted:
            if self._try_grow(sequence, num_wanted):
                return True
            num_wanted = sequence.growth.smaller_request(num_wanted)
        self._schedule()
        return False

    def _try_grow(self, sequence: _DecodingSequence, num_wanted: int, claims: bool = False) -> bool:
        ref, owner = sequence.lease.ref, sequence.served.decode_name
        blocks = self._unit.grow(ref, owner, num_wanted, claims, self._timeline.now_s)
        if blocks is None:
            return False
        sequence.num_blocks += len(blocks)
        sequence.growth.on_granted()
        return True

    def _claim(self, sequence: _DecodingSequence) -> bool:
        """Claims a block of a sequence that follows it; False if none frees its blocks for it.

        While one does, the sequence goes on as long as it has free slots, and asks again with each token, without slots
        after `CLAIM_RETRY_S`.
        """
        claim, decode = self._claim_block(sequence), sequence.served.decode
        if claim == "refused":
            return False
        if claim == "granted" or self._num_free_slots(sequence) > 0:
            decode.schedule_check(sequence.job)
        else:
            sequence.due_at_s = decode.next_due_s(sequence.job)
            self._stop(sequence)
            sequence.waits_for_block = True
            self._timeline.after(CLAIM_RETRY_S, lambda: self._claim_again(sequence))
        return True

    def _claim_block(self, sequence: _DecodingSequence) -> Literal["granted", "awaited", "refused"]:
        """Asks for a block of a sequence that follows it; "awaited": one frees its blocks for it."""
        if self._try_grow(sequence, 1, claims=True):
            return "granted"
        self._schedule()
        return "awaited" if self._unit.reclaim.serves(sequence.lease.ref) else "refused"

    def _claim_again(self, sequence: _DecodingSequence) -> None:
        """Goes on with a sequence that has no free slot left, once it has a block."""
        claim = "refused" if sequence.is_preempted else self._claim_block(sequence)
        if claim == "granted":
            self._continue(sequence)
        elif claim == "awaited":
            self._timeline.after(CLAIM_RETRY_S, lambda: self._claim_again(sequence))
        else:
            self._free_blocks(sequence)

    def _preempt_displaced(self, sequence: _DecodingSequence) -> None:
        if sequence.job.is_displaced and not sequence.job.is_removed:
            self._preempt(sequence)

    def _preempt(self, sequence: _DecodingSequence) -> None:
        """Swaps a sequence out, or frees its KV and queues its request again. Its tokens are kept in both cases."""
        sequence.due_at_s = sequence.served.decode.next_due_s(sequence.job)
        self._stop(sequence)
        self._free_blocks(sequence)

    def _stop(self, sequence: _DecodingSequence) -> None:
        """Takes a sequence out of its worker, with its tokens."""
        decode = sequence.served.decode
        sequence.request.num_sent += decode.num_tokens(sequence.job)
        decode.remove(sequence.job)
        self._device.wake(decode)

    def _continue(self, sequence: _DecodingSequence) -> None:
        """Adds a new job for the rest of the output of a sequence that was stopped."""
        sequence.waits_for_block = False
        num_preemptions, decode = sequence.job.num_preemptions, sequence.served.decode
        sequence.job = self._decode_job(sequence)
        sequence.job.due_at_s, sequence.job.num_preemptions = sequence.due_at_s, num_preemptions
        decode.add(sequence.job)
        self._device.wake(decode)

    def _free_blocks(self, sequence: _DecodingSequence) -> None:
        sequence.waits_for_block = False
        if not self._swap_out(sequence):
            self._requeue(sequence)

    def _requeue(self, sequence: _DecodingSequence) -> None:
        del self._sequences[sequence.lease.ref.lease_id]
        served_s = sequence.work.served_s(sequence.request.num_sent)
        self._unit.release(sequence.lease.ref, sequence.served.decode_name, sequence.hashes, served_s)
        self.num_requeued += 1
        sequence.request.num_preemptions = sequence.job.num_preemptions
        self._requeue_request(sequence.request)

    def _swap_out(self, sequence: _DecodingSequence) -> bool:
        """Begins to swap a sequence out; False if its KV has to be freed instead."""
        request, lease, served = sequence.request, sequence.lease, sequence.served
        num_computed = request.num_prompt + request.num_sent - 1
        num_bytes = encoded_bytes(served.shape, num_computed, served.config.kv_swap_format)
        self._unit.report(self.progress())
        try:
            self._unit.reclaim.begin_swap_out(lease.ref, served.decode_name, num_bytes, self._timeline.now_s)
        except Overloaded:
            return False
        self.num_swapped += 1
        served.swap.copy(num_bytes, lambda: self._on_swapped_out(sequence))
        return True

    def _on_swapped_out(self, sequence: _DecodingSequence) -> None:
        """The copy is complete: its token blocks are free, and the sequence waits for others."""
        request, ref, served = sequence.request, sequence.lease.ref, sequence.served
        self._unit.leases.finish_swap_out(ref, served.decode_name, sequence.hashes)
        sequence.is_preempted = False
        num_known = request.num_prompt + request.num_sent
        demand = KvDemand(
            num_tokens=min(request.max_tokens, num_known + GROWTH_TOKENS),
            max_tokens=request.max_tokens,
            block_hashes=sequence.hashes,
            max_cached_tokens=num_known - 1 if request.hashes else 0,
        )
        sequence.work.update(request.num_sent)
        self._unit.request_swap_in(ref, served.decode_name, demand, sequence.work.state)
        self._schedule()

    def swap_in(self, issued: IssuedSwapIn) -> None:
        """Copies the KV of a swapped sequence to its new blocks, except to those that hold it already."""
        sequence = self._sequences[issued.lease_id]
        request, served = sequence.request, sequence.served
        sequence.num_blocks = len(issued.block_ids)
        num_tokens = request.num_prompt + request.num_sent - 1 - issued.num_cached * served.config.block_size
        num_bytes = encoded_bytes(served.shape, max(0, num_tokens), served.config.kv_swap_format)
        served.swap.copy(num_bytes, lambda: self._on_swapped_in(sequence))

    def _on_swapped_in(self, sequence: _DecodingSequence) -> None:
        served = sequence.served
        self._unit.leases.finish_swap_in(sequence.lease.ref, served.decode_name)
        sequence.growth.on_granted()
        sequence.is_exact &= served.config.kv_swap_format == "raw"
        self._continue(sequence)
        self._schedule()

    def _on_decoded(self, sequence: _DecodingSequence) -> None:
        request = sequence.request
        request.num_sent = request.num_output
        del self._sequences[sequence.lease.ref.lease_id]
        served_s = sequence.work.served_s(request.num_output)
        self._finish(request, sequence.lease, sequence.served.decode_name, sequence.hashes, served_s)


def _progress_of(job: DecodeJob) -> SequenceProgress:
    state = job.scheduling
    return SequenceProgress(not job.is_displaced, state.decode_s, state.served_s, job.is_protected, job.num_preemptions)
