"""The KV of one sequence in a decode worker: its lease grows, is swapped out and in, and ends.

`SequenceRecord` owns the sequence's tokens, blocks and hashes. This module makes the calls to kvstore that change the
blocks; it decides no order and samples nothing.
"""

from __future__ import annotations

import asyncio

from kvstore.progress_page import ProgressPage
from kvstore.sequence_progress import SequenceProgress
from muxmesh.engine.api import Engine
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.errors import InternalError, MeshError, Overloaded, RequestPreempted
from muxmesh.types import KvDemand, KvFormat, LeaseRef
from worker.block_growth import CLAIM_RETRY_S, GROWTH_TOKENS, BlockGrowth
from worker.kv_swapper import KvSwapper
from worker.lease_client import LeaseClient


class SequenceKv:
    """Owns the lease of one sequence. The sequence's job in the engine has the lease's id.

    Invariant: at most one call that changes the lease's blocks is in progress, and every block that the progress page
    names is full, computed exactly, and one of the lease's blocks in the pool.
    """

    def __init__(
        self,
        ref: LeaseRef,
        sequence: SequenceRecord,
        engine: Engine,
        leases: LeaseClient,
        progress: ProgressPage,
        swapper: KvSwapper | None,
        kv_format: KvFormat,
    ) -> None:
        """``swapper`` is None if the unit has no swap region. ``kv_format``: of swapped KV."""
        self.sequence = sequence
        self._ref = ref
        self._engine = engine
        self._leases = leases
        self._progress = progress
        self._swapper = swapper
        self._kv_format = kv_format
        self._growth = BlockGrowth(sequence.block_size, sequence.max_blocks)
        self._growing: asyncio.Task[None] | None = None
        self._error: MeshError | None = None
        self._is_leaving = False
        """Whether the sequence is about to give its blocks up."""
        self._num_committed_blocks = 0
        self._is_batched = True
        self._reported = sequence.request.scheduling
        progress.begin(ref.lease_id)

    def on_tokens(self) -> None:
        """To be called after new tokens: commits full blocks, and requests more blocks ahead of need."""
        self._commit()
        sequence = self.sequence
        if sequence.scheduling is not self._reported:
            self._report()
        num_blocks = self._growth.blocks_to_request(len(sequence.block_ids), sequence.num_free_slots)
        if num_blocks and self._growing is None:
            self._growing = asyncio.create_task(self._grow(num_blocks), name="lease growth")
            self._growing.add_done_callback(self._on_growth_ended)

    def on_batch_changed(self, is_batched: bool) -> None:
        """To be called when the job leaves the batch of the engine, with its KV in place, or is in it again."""
        self._is_batched = is_batched
        self._report()

    async def on_preempted(self) -> None:
        """To be called when the job is paused: swaps its KV out, waits for token blocks, swaps it in, resumes the job.

        Raises RequestPreempted if the KV cannot be swapped; the request's next attempt computes it again. Raises the
        MeshError of a call to kvstore that failed, a growth in the background among them.
        """
        await self._wait_for_growth()
        if self._error is not None:
            raise self._error
        try:
            if self._swapper is None:
                raise Overloaded("the unit has no swap region")
            await self._swap_out(self._swapper)
        except Overloaded as error:
            raise RequestPreempted(f"pre-empted, and not swapped: {error}") from error
        await self._swap_in(self._swapper)
        self._engine.resume(self._ref.lease_id)

    def end(self, publishes: bool = True) -> None:
        """To be called once, when nothing more is to be computed: releases the lease in the background.

        ``publishes``: the full blocks stay in the prefix cache. Those of a sequence that failed are freed.
        """
        hashes: tuple[bytes, ...] = ()
        try:
            self._progress.end(self._ref.lease_id)
            if publishes:
                hashes = self.sequence.block_hashes(0, self.sequence.num_shareable_blocks)
        finally:
            served_s = self.sequence.work.served_s(self.sequence.num_output_tokens)
            self._leases.release_after(self._quiesce, self._ref, hashes, served_s)

    async def _quiesce(self) -> None:
        """Waits until nothing accesses the lease's memory and no call adds to it."""
        await self._wait_for_growth()
        await self._engine.cancel(self._ref.lease_id)
        if self._swapper is not None:
            await self._swapper.quiesce(self._ref.lease_id)

    async def _wait_for_growth(self) -> None:
        """Waits for the growth in progress, which adds blocks to the lease; it claims none any more."""
        if self._growing is not None:
            self._is_leaving = True
            await asyncio.gather(self._growing, return_exceptions=True)
            self._is_leaving = False

    async def _grow(self, num_blocks: int) -> None:
        sequence, job_id = self.sequence, self._ref.lease_id
        block_ids = await self._free_blocks(num_blocks)
        if block_ids is None and self._growth.is_claim(sequence.num_free_slots):
            block_ids = await self._claimed_block()
        self._growing = None
        if block_ids is not None:
            sequence.add_blocks(block_ids)
            self._growth.on_granted()
            self._engine.sequence_changed(job_id)
        elif self._growth.on_pool_full(sequence.num_free_slots):
            self._engine.preempt(job_id)

    async def _free_blocks(self, num_blocks: int) -> tuple[int, ...] | None:
        """Up to ``num_blocks`` more blocks that are free; None if there are none."""
        while num_blocks:
            try:
                return await self._leases.grow(self._ref, num_blocks)
            except Overloaded:
                num_blocks = self._growth.smaller_request(num_blocks)
        return None

    async def _claimed_block(self) -> tuple[int, ...] | None:
        """One block of a sequence that follows in the order; waits while that one frees its blocks. None: none does."""
        while not self._is_leaving:
            try:
                block_ids = await self._leases.claim(self._ref, 1)
            except Overloaded:
                return None
            if block_ids is not None:
                return block_ids
            await asyncio.sleep(CLAIM_RETRY_S)
        return None

    def _on_growth_ended(self, growth: asyncio.Task[None]) -> None:
        """Ends the attempt if the growth failed: without blocks its job would wait for ever."""
        if growth.cancelled() or (error := growth.exception()) is None:
            return
        self._error = error if isinstance(error, MeshError) else InternalError(f"{type(error).__name__}: {error}")
        self._engine.preempt(self._ref.lease_id)  # `on_preempted` raises the error

    def _commit(self) -> None:
        """Names new full blocks in the progress page, so that kvstore publishes them if this process dies."""
        num_blocks, first = self.sequence.num_shareable_blocks, self._num_committed_blocks
        if num_blocks > first:
            self._progress.commit(self._ref.lease_id, first, self.sequence.block_hashes(first, num_blocks))
            self._num_committed_blocks = num_blocks

    def _report(self) -> None:
        """Reports the sequence's remaining work to the unit, and whether it is in the batch."""
        self._reported = state = self.sequence.scheduling
        sequence = self.sequence
        progress = SequenceProgress(
            self._is_batched,
            state.decode_s,
            state.served_s,
            sequence.is_protected,
            sequence.num_preemptions,
        )
        self._progress.report(self._ref.lease_id, progress)

    async def _swap_out(self, swapper: KvSwapper) -> None:
        sequence = self.sequence
        await swapper.copy_out(self._ref, sequence.block_ids, sequence.num_computed_tokens, self._kv_format)
        hashes = sequence.block_hashes(0, sequence.num_shareable_blocks)
        self._progress.end(self._ref.lease_id)
        self._num_committed_blocks = 0
        await self._leases.finish_swap_out(self._ref, hashes)
        sequence.swap_out()

    async def _swap_in(self, swapper: KvSwapper) -> None:
        sequence, request = self.sequence, self.sequence.request
        demand = KvDemand(
            num_tokens=min(request.max_tokens, sequence.num_tokens + GROWTH_TOKENS),
            max_tokens=request.max_tokens,
            block_hashes=sequence.block_hashes(0, sequence.num_hashable_blocks),
            max_cached_tokens=0 if request.bypass_prefix_cache else sequence.num_computed_tokens,
        )
        block_ids, num_cached = await self._leases.begin_swap_in(self._ref, sequence.scheduling, demand)
        await swapper.copy_in(self._ref, block_ids, num_cached)
        await self._leases.finish_swap_in(self._ref)
        sequence.swap_in(block_ids, is_exact=self._kv_format == "raw")
        self._growth.on_granted()
        self._progress.begin(self._ref.lease_id)
        self._is_batched = True
        self._report()
        self._commit()
