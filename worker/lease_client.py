"""A worker's calls to the lease service of its unit. A lease that a worker gets is always moved on or released.

Knows the wire format of kvstore, no engine and no memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from muxmesh.block_hashes import join_hashes
from muxmesh.errors import LeaseLost, MeshError
from muxmesh.execution import PreemptionReason
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.rpc import convert
from muxmesh.rpc.status_codes import from_rpc_error, response_of
from muxmesh.types import KvDemand, Lease, LeaseRef, SchedulingState, TenantStanding

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreemptLease:
    """The unit claims the token blocks of this lease for a sequence that precedes it, or for another model."""

    lease_id: int
    reason: PreemptionReason


@dataclass(frozen=True, slots=True)
class LeaseStandings:
    """The unit orders these leases by another standing of their tenant from now on."""

    lease_ids: tuple[int, ...]
    standing: TenantStanding


class LeaseClient:
    """Calls of one worker to its unit.

    Every call raises Unavailable if the unit cannot be reached, and LeaseLost if the lease is not this worker's at
    this epoch or its state forbids the call. A caller may be cancelled at any moment: a lease that is acquired for a
    cancelled caller is released in the background.
    """

    def __init__(self, channel: grpc.aio.Channel, worker: str) -> None:
        """``worker``: this worker's name in the unit, see `Attachment`."""
        self._stub = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        self._worker = worker
        self._background: set[asyncio.Task[Any]] = set()

    async def acquire(self, ref: LeaseRef) -> Lease:
        """Turns the credit ``ref`` into a lease of this worker."""
        request = kvstore_pb2.AcquireLeaseRequest(lease=convert.ref_to_wire(ref), owner=self._worker)
        call = self._spawn(response_of(self._stub.AcquireLease(request)))
        try:
            response = await asyncio.shield(call)
        except asyncio.CancelledError:
            call.add_done_callback(self._release_unwanted)
            raise
        return convert.lease_from_wire(response.lease)

    async def move(self, ref: LeaseRef, to: str, num_computed_tokens: int, sampled: tuple[int, ...]) -> None:
        """Hands the lease off to worker ``to``. Raises WorkerLost if ``to`` is gone; then this worker still has it."""
        request = kvstore_pb2.MoveLeaseRequest(
            lease=convert.ref_to_wire(ref),
            owner=self._worker,
            to_worker=to,
            num_computed_tokens=num_computed_tokens,
            sampled_token_ids=sampled,
        )
        await response_of(self._stub.MoveLease(request))

    async def grow(self, ref: LeaseRef, num_blocks: int) -> tuple[int, ...]:
        """Returns the ids of ``num_blocks`` more token blocks of the lease. Raises Overloaded if the pool is full."""
        return tuple((await self._grow(ref, num_blocks, claims=False)).block_ids)

    async def claim(self, ref: LeaseRef, num_blocks: int) -> tuple[int, ...] | None:
        """As `grow`, but another sequence may be pre-empted for the blocks.

        None: one is freeing its blocks, so a call soon after may succeed.
        """
        response = await self._grow(ref, num_blocks, claims=True)
        return None if response.is_pending else tuple(response.block_ids)

    async def _grow(self, ref: LeaseRef, num_blocks: int, claims: bool) -> kvstore_pb2.GrowLeaseResponse:
        request = kvstore_pb2.GrowLeaseRequest(
            lease=convert.ref_to_wire(ref), owner=self._worker, num_blocks=num_blocks, claims=claims
        )
        return await response_of(self._stub.GrowLease(request))

    async def begin_swap_out(self, ref: LeaseRef, num_bytes: int) -> tuple[int, ...]:
        """Returns the pages of the swap region for a copy of ``num_bytes``.

        Raises Overloaded if the KV has to be freed instead: the region is full, or to compute it again costs less.
        """
        request = kvstore_pb2.SwapOutRequest(lease=convert.ref_to_wire(ref), owner=self._worker, num_bytes=num_bytes)
        return tuple((await response_of(self._stub.SwapOut(request))).pages)

    async def finish_swap_out(self, ref: LeaseRef, computed: Sequence[bytes]) -> None:
        """Frees the lease's token blocks, whose copy is complete. ``computed``: see `release_after`."""
        request = kvstore_pb2.FinishSwapOutRequest(
            lease=convert.ref_to_wire(ref), owner=self._worker, block_hashes=join_hashes(computed)
        )
        await response_of(self._stub.FinishSwapOut(request))

    async def begin_swap_in(
        self, ref: LeaseRef, scheduling: SchedulingState, demand: KvDemand
    ) -> tuple[tuple[int, ...], int]:
        """Waits for token blocks for a swapped lease. Returns their ids, and how many of the first need no copy."""
        request = kvstore_pb2.SwapInRequest(
            lease=convert.ref_to_wire(ref),
            owner=self._worker,
            scheduling=convert.scheduling_to_wire(scheduling),
            demand=convert.demand_to_wire(demand),
        )
        response = await response_of(self._stub.SwapIn(request))
        return tuple(response.block_ids), response.num_cached_blocks

    async def finish_swap_in(self, ref: LeaseRef) -> None:
        """Frees the swap pages of the lease, whose KV is copied back to the pool."""
        request = kvstore_pb2.FinishSwapInRequest(lease=convert.ref_to_wire(ref), owner=self._worker)
        await response_of(self._stub.FinishSwapIn(request))

    def release_after(
        self,
        quiesce: Callable[[], Awaitable[None]],
        ref: LeaseRef,
        computed: Sequence[bytes] = (),
        served_s: float = 0.0,
    ) -> None:
        """Releases the lease in the background, once ``quiesce`` has returned: nothing accesses its memory then.

        ``computed``: hashes of its first blocks, whose KV other requests may use. ``served_s``: work done, as in
        `SchedulingState.served_s`; 0: as reported last. Does nothing if the lease is not this worker's; logs other
        errors.
        """

        async def release() -> None:
            await quiesce()
            try:
                await self.release(ref, computed, served_s)
            except LeaseLost:
                pass
            except MeshError as error:  # a unit that shuts down ends all of its leases
                _log.warning("lease %d could not be released: %s", ref.lease_id, error)

        self._spawn(release())

    async def release(self, ref: LeaseRef, computed: Sequence[bytes], served_s: float = 0.0) -> None:
        """Releases the lease. ``computed``, ``served_s``: see `release_after`."""
        request = kvstore_pb2.ReleaseLeaseRequest(
            lease=convert.ref_to_wire(ref), owner=self._worker, block_hashes=join_hashes(computed), served_s=served_s
        )
        await response_of(self._stub.ReleaseLease(request))

    async def watch(self) -> AsyncIterator[Lease | PreemptLease | LeaseStandings]:
        """Yields leases that arrive at this worker, those that it has to pre-empt and those whose tenants' standing has
        changed, for as long as the unit serves.

        Begins with the leases that this worker has already. Ends when the unit stops, or raises the error of the call
        (Unavailable, RequestAborted).
        """
        call = self._stub.WatchLeases(kvstore_pb2.WatchLeasesRequest(owner=self._worker))
        try:
            async for response in call:
                event = response.WhichOneof("event")
                if event == "arrived":
                    yield convert.lease_from_wire(response.arrived)
                elif event == "standings":
                    lease_ids = tuple(response.standings.lease_ids)
                    yield LeaseStandings(lease_ids, convert.standing_from_wire(response.standings))
                else:
                    yield PreemptLease(response.preempt.lease_id, PreemptionReason(response.preempt.reason))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def close(self) -> None:
        """Waits for releases and cancelled calls that are still in the background."""
        while self._background:  # a cancelled `acquire` that succeeds adds its release
            await asyncio.wait(self._background)

    def _release_unwanted(self, call: asyncio.Task[Any]) -> None:
        if not call.cancelled() and call.exception() is None:
            self.release_after(_nothing_to_quiesce, convert.ref_from_wire(call.result().lease.ref))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


async def _nothing_to_quiesce() -> None:
    """Quiesces a lease whose memory was never accessed."""
