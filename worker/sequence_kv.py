"""The KV of one sequence in a decode worker: how its lease grows, is swapped out and in, and ends.

`SequenceRecord` owns the sequence's tokens, blocks and hashes; this owns the calls to kvstore that change its blocks.
"""

from __future__ import annotations

import asyncio

from kvstore.progress_page import ProgressPage
from muxmesh.engine.api import Engine
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.errors import MeshError, Overloaded, RequestPreempted
from muxmesh.types import KvDemand, KvFormat, LeaseRef
from worker.block_growth import GROWTH_TOKENS, BlockGrowth
from worker.kv_swapper import KvSwapper
from worker.lease_client import LeaseClient


class SequenceKv:
    """Owns the lease of one sequence, whose job has the lease's id.

    Invariant: at most one call that changes the lease's blocks is in progress. The progress page names full blocks
    that are in the pool, in the lease's blocks, and may be shared.
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
        """``swapper`` None: the unit has no memory to swap to. ``kv_format``: of swapped KV."""
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
        self._num_committed_blocks = 0
        progress.begin(ref.lease_id)

    def on_tokens(self) -> None:
        """The sequence has grown: commits full blocks, and requests more blocks before they are needed."""
        self._commit()
        sequence = self.sequence
        num_blocks = self._growth.blocks_to_request(len(sequence.block_ids), sequence.num_free_slots)
        if num_blocks and self._growing is None:
            self._growing = asyncio.create_task(self._grow(num_blocks), name="lease growth")

    async def on_preempted(self) -> None:
        """The job is paused. Swaps the KV out, waits for token blocks, swaps it in and resumes the job.

        Raises RequestPreempted if the KV cannot be swapped: whoever continues the request computes it again. Raises
        what a call to kvstore raised.
        """
        await self._wait_for_growth()
        if self._error is not None:
            raise self._error
        try:
            if self._swapper is None:
                raise Overloaded("the unit has no memory to swap to")
            await self._swap_out(self._swapper)
        except Overloaded as error:
            raise RequestPreempted(f"pre-empted, and not swapped: {error}") from error
        await self._swap_in(self._swapper)
        self._engine.resume(self._ref.lease_id)

    def end(self) -> None:
        """Nothing more is computed: releases the lease once nothing accesses its memory."""
        self._progress.end(self._ref.lease_id)
        hashes = self.sequence.block_hashes(0, self.sequence.num_shareable_blocks)
        self._leases.release_after(self._quiesce, self._ref, hashes)

    async def _quiesce(self) -> None:
        """Returns when nothing accesses the lease's memory, and no more of it will come."""
        await self._wait_for_growth()
        await self._engine.cancel(self._ref.lease_id)
        if self._swapper is not None:
            await self._swapper.quiesce(self._ref.lease_id)

    async def _wait_for_growth(self) -> None:
        """Blocks that a call in progress brings belong to the lease."""
        if self._growing is not None:
            await asyncio.gather(self._growing, return_exceptions=True)

    async def _grow(self, num_blocks: int) -> None:
        sequence, job_id = self.sequence, self._ref.lease_id
        try:
            while num_blocks:
                try:
                    sequence.add_blocks(await self._leases.grow(self._ref, num_blocks))
                    break
                except Overloaded:
                    num_blocks = self._growth.smaller_request(num_blocks)
        except MeshError as error:
            self._error = error
            self._engine.preempt(job_id)  # the job's owner raises the error then
            return
        self._growing = None
        if num_blocks:
            self._growth.on_granted()
            self._engine.sequence_changed(job_id)
        elif self._growth.on_pool_full(sequence.num_free_slots):
            self._engine.preempt(job_id)

    def _commit(self) -> None:
        """Full blocks that are in the pool are found by others if this process dies."""
        num_blocks, first = self.sequence.num_shareable_blocks, self._num_committed_blocks
        if num_blocks > first:
            self._progress.commit(self._ref.lease_id, first, self.sequence.block_hashes(first, num_blocks))
            self._num_committed_blocks = num_blocks

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
        num_resumed = len(request.resume_token_ids)
        scheduling = request.scheduling.after_output(sequence.num_output_tokens, request.prediction, num_resumed)
        block_ids, num_cached = await self._leases.begin_swap_in(self._ref, scheduling, demand)
        await swapper.copy_in(self._ref, block_ids, num_cached)
        await self._leases.finish_swap_in(self._ref)
        sequence.swap_in(block_ids, is_exact=self._kv_format == "raw")
        self._growth.on_granted()
        self._progress.begin(self._ref.lease_id)
        self._commit()
