"""Leases as a worker handles them: acquire, move, release, and never forget one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

import grpc

from muxmesh import prefix
from muxmesh.errors import LeaseLost, MeshError
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.rpc import convert
from muxmesh.rpc.status import from_rpc_error
from muxmesh.types import KvDemand, Lease, LeaseRef, Standing

_log = logging.getLogger(__name__)


class LeaseClient:
    """Calls of one worker to its unit. Errors are the mesh's own (LeaseLost, WorkerLost, Unavailable).

    A caller may be cancelled at any moment; a lease that arrives for a cancelled caller is released in the
    background. `close` waits for what is in the background.
    """

    def __init__(self, channel: grpc.aio.Channel, worker: str) -> None:
        self._stub = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        self._worker = worker
        self._background: set[asyncio.Task[Any]] = set()

    async def acquire(self, ref: LeaseRef) -> Lease:
        """The credit ``ref`` becomes this worker's lease. Raises LeaseLost."""
        request = kvstore_pb2.AcquireLeaseRequest(lease=convert.ref_to_wire(ref), owner=self._worker)
        call = self._spawn(_answer(self._stub.AcquireLease(request)))
        try:
            response = await asyncio.shield(call)
        except asyncio.CancelledError:
            call.add_done_callback(self._release_unwanted)
            raise
        return convert.lease_from_wire(response.lease)

    async def move(
        self, ref: LeaseRef, to: str, num_computed_tokens: int, sampled: tuple[int, ...], handoff: bytes
    ) -> None:
        """The hand-off to worker ``to``. Raises LeaseLost; WorkerLost if ``to`` is gone."""
        request = kvstore_pb2.MoveLeaseRequest(
            lease=convert.ref_to_wire(ref),
            owner=self._worker,
            to_worker=to,
            num_computed_tokens=num_computed_tokens,
            sampled_token_ids=sampled,
            handoff=handoff,
        )
        await _answer(self._stub.MoveLease(request))

    async def grow(self, ref: LeaseRef, num_blocks: int) -> tuple[int, ...]:
        """More token blocks for a lease of ours. Raises Overloaded if the pool has no room, LeaseLost."""
        request = kvstore_pb2.GrowLeaseRequest(
            lease=convert.ref_to_wire(ref), owner=self._worker, num_blocks=num_blocks
        )
        return tuple((await _answer(self._stub.GrowLease(request))).block_ids)

    async def swap_out(self, ref: LeaseRef, num_bytes: int) -> tuple[int, ...]:
        """Pages of the swap region for a copy of the lease's KV. Raises Overloaded if there is no room, LeaseLost."""
        request = kvstore_pb2.SwapOutRequest(lease=convert.ref_to_wire(ref), owner=self._worker, num_bytes=num_bytes)
        return tuple((await _answer(self._stub.SwapOut(request))).pages)

    async def swapped_out(self, ref: LeaseRef, computed: Sequence[bytes]) -> None:
        """The copy is made; the lease's token blocks are not ours any more. ``computed``: see `release_after`."""
        request = kvstore_pb2.FinishSwapOutRequest(
            lease=convert.ref_to_wire(ref), owner=self._worker, block_hashes=prefix.joined(computed)
        )
        await _answer(self._stub.FinishSwapOut(request))

    async def swap_in(self, ref: LeaseRef, standing: Standing, demand: KvDemand) -> tuple[tuple[int, ...], int]:
        """Waits for token blocks for a swapped lease; how many of the first need no copy. Raises LeaseLost."""
        request = kvstore_pb2.SwapInRequest(
            lease=convert.ref_to_wire(ref),
            owner=self._worker,
            standing=convert.standing_to_wire(standing),
            demand=convert.demand_to_wire(demand),
        )
        response = await _answer(self._stub.SwapIn(request))
        return tuple(response.block_ids), response.num_cached_blocks

    async def swapped_in(self, ref: LeaseRef) -> None:
        """The KV is copied back; the pages are not ours any more. Raises LeaseLost."""
        request = kvstore_pb2.FinishSwapInRequest(lease=convert.ref_to_wire(ref), owner=self._worker)
        await _answer(self._stub.FinishSwapIn(request))

    def release_after(
        self, quiesce: Callable[[], Awaitable[None]], ref: LeaseRef, computed: Sequence[bytes] = ()
    ) -> None:
        """In the background: waits until nothing touches the blocks any more, then releases the lease.

        ``computed``: hashes of its first blocks, whose KV others may use from now on. A lease that is not ours any
        more is fine.
        """

        async def release() -> None:
            await quiesce()
            try:
                await self.release(ref, computed)
            except LeaseLost:
                pass
            except MeshError as error:  # the unit is going: it takes its leases with it
                _log.warning("lease %d could not be released: %s", ref.lease_id, error)

        self._spawn(release())

    async def watch(self) -> AsyncIterator[Lease | int]:
        """Leases that arrive at this worker, and ids of those that are to give way, for as long as the unit lives."""
        call = self._stub.WatchLeases(kvstore_pb2.WatchLeasesRequest(owner=self._worker))
        try:
            async for response in call:
                arrived = response.WhichOneof("news") == "arrived"
                yield convert.lease_from_wire(response.arrived) if arrived else response.give_way
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def close(self) -> None:
        """Waits for what is in the background."""
        await asyncio.gather(*self._background, return_exceptions=True)

    async def release(self, ref: LeaseRef, computed: Sequence[bytes]) -> None:
        """Ends the lease of a job that has ended. See `release_after`. Raises LeaseLost."""
        request = kvstore_pb2.ReleaseLeaseRequest(
            lease=convert.ref_to_wire(ref), owner=self._worker, block_hashes=prefix.joined(computed)
        )
        await _answer(self._stub.ReleaseLease(request))

    def _release_unwanted(self, call: asyncio.Task[Any]) -> None:
        if not call.cancelled() and call.exception() is None:
            self.release_after(_at_once, convert.ref_from_wire(call.result().lease.ref))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


async def _at_once() -> None:
    """Nothing has touched the blocks yet."""


async def _answer(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
