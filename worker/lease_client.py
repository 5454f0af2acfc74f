"""Leases as a worker handles them: acquire, move, grow, swap and release, without ever losing one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from muxmesh.block_hashes import join_hashes
from muxmesh.errors import LeaseLost, MeshError
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.rpc import convert
from muxmesh.rpc.status_codes import from_rpc_error
from muxmesh.types import KvDemand, Lease, LeaseRef, SchedulingState

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreemptLease:
    """The unit needs the token blocks of this lease for another model."""

    lease_id: int


class LeaseClient:
    """Calls of one worker to its unit. Errors are the mesh's own (LeaseLost, WorkerLost, Unavailable).

    A caller may be cancelled at any moment; a lease that arrives for a cancelled caller is released in the
    background. `close` waits for the background.
    """

    def __init__(self, channel: grpc.aio.Channel, worker: str) -> None:
        self._stub = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        self._worker = worker
        self._background: set[asyncio.Task[Any]] = set()

    async def acquire(self, ref: LeaseRef) -> Lease:
        """The credit ``ref`` becomes this worker's lease. Raises LeaseLost."""
        request = kvstore_pb2.AcquireLeaseRequest(lease=convert.ref_to_wire(ref), owner=self._worker)
        call = self._spawn(_result(self._stub.AcquireLease(request)))
        try:
            response = await asyncio.shield(call)
        except asyncio.CancelledError:
            call.add_done_callback(self._release_unwanted)
            raise
        return convert.lease_from_wire(response.lease)

    async def move(self, ref: LeaseRef, to: str, num_computed_tokens: int, sampled: tuple[int, ...]) -> None:
        """The hand-off to worker ``to``. Raises LeaseLost; WorkerLost if ``to`` is gone."""
        request = kvstore_pb2.MoveLeaseRequest(
            lease=convert.ref_to_wire(ref),
            owner=self._worker,
            to_worker=to,
            num_computed_tokens=num_computed_tokens,
            sampled_token_ids=sampled,
        )
        await _result(self._stub.MoveLease(request))

    async def grow(self, ref: LeaseRef, num_blocks: int) -> tuple[int, ...]:
        """More token blocks for a lease. Raises Overloaded if the pool is full, LeaseLost."""
        request = kvstore_pb2.GrowLeaseRequest(
            lease=convert.ref_to_wire(ref), owner=self._worker, num_blocks=num_blocks
        )
        return tuple((await _result(self._stub.GrowLease(request))).block_ids)

    async def begin_swap_out(self, ref: LeaseRef, num_bytes: int) -> tuple[int, ...]:
        """Pages of the swap region for a copy of the lease's KV. Raises Overloaded if it is full, LeaseLost."""
        request = kvstore_pb2.SwapOutRequest(lease=convert.ref_to_wire(ref), owner=self._worker, num_bytes=num_bytes)
        return tuple((await _result(self._stub.SwapOut(request))).pages)

    async def finish_swap_out(self, ref: LeaseRef, computed: Sequence[bytes]) -> None:
        """The copy is complete: frees the lease's token blocks. ``computed``: see `release_after`."""
        request = kvstore_pb2.FinishSwapOutRequest(
            lease=convert.ref_to_wire(ref), owner=self._worker, block_hashes=join_hashes(computed)
        )
        await _result(self._stub.FinishSwapOut(request))

    async def begin_swap_in(
        self, ref: LeaseRef, scheduling: SchedulingState, demand: KvDemand
    ) -> tuple[tuple[int, ...], int]:
        """Waits for token blocks for a swapped lease; returns how many of the first need no copy. Raises LeaseLost."""
        request = kvstore_pb2.SwapInRequest(
            lease=convert.ref_to_wire(ref),
            owner=self._worker,
            scheduling=convert.scheduling_to_wire(scheduling),
            demand=convert.demand_to_wire(demand),
        )
        response = await _result(self._stub.SwapIn(request))
        return tuple(response.block_ids), response.num_cached_blocks

    async def finish_swap_in(self, ref: LeaseRef) -> None:
        """The KV is copied back: frees the swap pages. Raises LeaseLost."""
        request = kvstore_pb2.FinishSwapInRequest(lease=convert.ref_to_wire(ref), owner=self._worker)
        await _result(self._stub.FinishSwapIn(request))

    def release_after(
        self, quiesce: Callable[[], Awaitable[None]], ref: LeaseRef, computed: Sequence[bytes] = ()
    ) -> None:
        """In the background: waits until nothing accesses the blocks any more, then releases the lease.

        ``computed``: hashes of its first blocks, whose KV other requests may use from now on. A lease that is no
        longer this worker's is ignored.
        """

        async def release() -> None:
            await quiesce()
            try:
                await self.release(ref, computed)
            except LeaseLost:
                pass
            except MeshError as error:  # the unit is going, and its leases with it
                _log.warning("lease %d could not be released: %s", ref.lease_id, error)

        self._spawn(release())

    async def release(self, ref: LeaseRef, computed: Sequence[bytes]) -> None:
        """Ends the lease of a job that has ended. See `release_after`. Raises LeaseLost."""
        request = kvstore_pb2.ReleaseLeaseRequest(
            lease=convert.ref_to_wire(ref), owner=self._worker, block_hashes=join_hashes(computed)
        )
        await _result(self._stub.ReleaseLease(request))

    async def watch(self) -> AsyncIterator[Lease | PreemptLease]:
        """Leases that arrive at this worker, and those that it has to pre-empt, for as long as the unit lives."""
        call = self._stub.WatchLeases(kvstore_pb2.WatchLeasesRequest(owner=self._worker))
        try:
            async for response in call:
                if response.WhichOneof("event") == "arrived":
                    yield convert.lease_from_wire(response.arrived)
                else:
                    yield PreemptLease(response.preempt)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def close(self) -> None:
        """Waits for the background."""
        await asyncio.gather(*self._background, return_exceptions=True)

    def _release_unwanted(self, call: asyncio.Task[Any]) -> None:
        if not call.cancelled() and call.exception() is None:
            self.release_after(_unused, convert.ref_from_wire(call.result().lease.ref))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


async def _unused() -> None:
    """Nothing has accessed the blocks yet."""


async def _result(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
