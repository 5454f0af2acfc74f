"""The KV of one answer while it is decoded: what of it is computed, how it grows, how it is swapped out and in."""

from __future__ import annotations

from decode_svc.growth import Growth
from decode_svc.room import GROWTH_TOKENS
from kvstore.client.swapper import Swapper
from kvstore.client.worker import WorkerParts
from muxmesh.engine.api import Tokens
from muxmesh.errors import GaveWay, MeshError, Overloaded
from muxmesh.prefix import chain_of
from muxmesh.types import EngineRequest, KvDemand, Lease


class LeasedKv:
    """Owns one lease's KV on behalf of its job, which has the lease's id.

    Invariant: ``computed`` names full blocks that are in the pool, in the lease's blocks, and may be shared.
    """

    def __init__(self, parts: WorkerParts, lease: Lease, request: EngineRequest) -> None:
        self.failure: MeshError | None = None
        self._engine = parts.engine
        self._leases = parts.leases
        self._progress = parts.progress
        self._swapper = parts.swapper
        self._ref, self._request = lease.ref, request
        self._kv_format = request.kv_swap_format or parts.kv_swap_format
        self._chain = chain_of(request, parts.block_size)
        self._pending = lease.sampled_token_ids  # sampled, and not computed yet
        self._num_computed_tokens = lease.num_computed_tokens
        self._num_committed = 0
        self._is_exact = True
        self._in_pool = True
        self._growth = Growth(parts, lease, request, self._on_full, self._fail)
        self._progress.begin(lease.ref.lease_id)

    @property
    def computed(self) -> list[bytes]:
        """Hashes of the blocks that others may use."""
        return self._chain.hashes if self._is_exact and self._in_pool else []

    def take(self, event: Tokens) -> None:
        """New tokens: those before the last are computed, and what is full can be found if this process dies."""
        newly_computed = (*self._pending, *event.token_ids[:-1])
        self._chain.extend(newly_computed)
        self._num_computed_tokens += len(newly_computed)
        self._pending = event.token_ids[-1:]
        self._growth.watch(event.start_index + len(event.token_ids))
        self._commit()

    async def give_way(self) -> None:
        """The job is paused: its KV goes to host memory and comes back, into other blocks, when there is room.

        Without room there the job fails, and whoever goes on with the request computes it again.
        """
        await self._growth.stop()
        try:
            if self._swapper is None:
                raise Overloaded("the unit has no memory to swap to")
            await self._swap_out(self._swapper)
            await self._swap_in(self._swapper)
        except Overloaded:
            self._fail(GaveWay("out of KV memory; the request goes on when there is room"))
        except MeshError as error:
            self._fail(error)

    async def _quiesce(self) -> None:
        """Returns when nothing touches the lease's memory, and no more will come."""
        await self._growth.stop()
        await self._engine.cancel(self._ref.lease_id)
        if self._swapper is not None:
            await self._swapper.quiesce(self._ref.lease_id)

    def end(self) -> None:
        """No more is computed."""
        self._progress.end(self._ref.lease_id)
        self._leases.release_after(self._quiesce, self._ref, self.computed)

    def _commit(self) -> None:
        if len(self.computed) > self._num_committed:
            self._progress.commit(self._ref.lease_id, self._num_committed, self.computed[self._num_committed :])
            self._num_committed = len(self.computed)

    def _on_full(self) -> None:
        """No token block is to be had, and the answer cannot go on without one."""
        self._engine.preempt(self._ref.lease_id)

    async def _swap_out(self, swapper: Swapper) -> None:
        computed = self.computed
        self._progress.end(self._ref.lease_id)
        self._in_pool, self._num_committed = False, 0
        try:
            await swapper.copy_out(
                self._ref, self._growth.block_ids, self._num_computed_tokens, self._kv_format, computed
            )
        except Overloaded:
            self._in_pool = True
            raise

    async def _swap_in(self, swapper: Swapper) -> None:
        num_known = self._num_computed_tokens + len(self._pending)
        demand = KvDemand(
            num_tokens=min(self._request.most_tokens, num_known + GROWTH_TOKENS),
            most_tokens=self._request.most_tokens,
            block_hashes=tuple(self._chain.hashes) if self._is_exact else (),
            max_cached_tokens=0 if self._request.bypass_prefix_cache else self._num_computed_tokens,
        )
        num_output_tokens = num_known - len(self._request.prompt_token_ids)
        since = len(self._request.resume_token_ids)
        standing = self._request.standing.after(num_output_tokens, self._request.prediction, since)
        block_ids, num_cached = await self._leases.swap_in(self._ref, standing, demand)
        await swapper.copy_in(self._ref, block_ids, self._num_computed_tokens, num_cached)
        self._is_exact = self._is_exact and self._kv_format == "raw"
        self._in_pool = True
        self._progress.begin(self._ref.lease_id)
        self._commit()
        self._growth.moved(block_ids)
        self._engine.resume(self._ref.lease_id, block_ids)

    def _fail(self, error: MeshError) -> None:
        self.failure = error
        self._engine.abandon(self._ref.lease_id, str(error))
