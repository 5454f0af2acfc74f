"""The decode phase of a request: lease arrives → tokens streamed → lease released."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from decode_svc.arrivals import Arrivals
from decode_svc.growth import Growth
from kvstore.client.worker import Services, WorkerParts
from muxmesh.engine.api import EngineJob, Failed, Finished, Tokens, Until
from muxmesh.errors import EngineFailed, MeshError
from muxmesh.internal.v1 import decode_pb2, decode_pb2_grpc
from muxmesh.prefix import chain_of
from muxmesh.rpc import convert
from muxmesh.types import Lease


class DecodeService(decode_pb2_grpc.DecodeServiceServicer):
    """Serves one model's answers after the first token."""

    def __init__(self, parts: WorkerParts) -> None:
        self._engine = parts.engine
        self._leases = parts.leases
        self._block_size = parts.block_size
        self._progress = parts.progress
        self._give_up = parts.give_up
        self._arrivals = Arrivals(self._release_unused)

    async def watch(self) -> None:
        """Takes in leases for as long as the unit lives. Without them this worker is of no use, so it ends too."""
        reason = "the stream ended"
        try:
            async for lease in self._leases.watch():
                self._arrivals.lease_arrived(lease)
        except MeshError as error:
            reason = str(error)
        self._give_up(f"no more leases from the unit: {reason}")

    async def Decode(
        self, request: decode_pb2.DecodeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        """See the proto. Whatever ends this call, the lease is released."""
        asked = convert.request_from_wire(request.request)
        lease = await self._arrivals.wait_for(request.lease_id)
        lease_id = lease.ref.lease_id
        chain = chain_of(asked, self._block_size)
        num_committed = 0
        last = lease.sampled_token_ids  # sampled, and not computed yet
        self._progress.begin(lease_id)
        growth = Growth(self._engine, self._leases, lease, asked, self._block_size)
        try:
            job = EngineJob(
                job_id=lease.ref.lease_id,
                request=asked,
                until=Until.FINISH,
                block_ids=lease.block_ids,
                num_computed_tokens=lease.num_computed_tokens,
                sampled_token_ids=lease.sampled_token_ids,
                handoff=lease.handoff,
            )
            async for event in self._engine.submit(job):
                if isinstance(event, Tokens):
                    chain.extend((*last, *event.token_ids[:-1]))
                    last = event.token_ids[-1:]
                    growth.watch(event.start_index + len(event.token_ids))
                    if len(chain.hashes) > num_committed:
                        self._progress.commit(lease_id, num_committed, chain.hashes[num_committed:])
                        num_committed = len(chain.hashes)
                    yield decode_pb2.DecodeResponse(
                        start_index=event.start_index,
                        token_ids=event.token_ids,
                        logprobs=convert.logprobs_to_wire(event.logprobs) if event.logprobs else None,
                    )
                elif isinstance(event, Finished):
                    yield decode_pb2.DecodeResponse(finish=convert.finish_to_wire(event.finish))
                elif isinstance(event, Failed):
                    raise growth.failure or EngineFailed(event.reason)
        finally:
            self._progress.end(lease_id)
            self._leases.release_after(functools.partial(self._quiesce, lease_id, growth), lease.ref, chain.hashes)

    def _release_unused(self, lease: Lease) -> None:
        self._leases.release_after(functools.partial(self._engine.cancel, lease.ref.lease_id), lease.ref)

    async def _quiesce(self, job_id: int, growth: Growth) -> None:
        """Returns when nothing touches the lease's blocks, and no more will come."""
        await growth.stop()
        await self._engine.cancel(job_id)


@asynccontextmanager
async def open_services(parts: WorkerParts) -> AsyncIterator[Services]:
    """The services of a decode worker, and the watch on its leases."""
    service = DecodeService(parts)
    watch = asyncio.create_task(service.watch(), name="lease watch")
    register = functools.partial(decode_pb2_grpc.add_DecodeServiceServicer_to_server, service)
    try:
        yield {decode_pb2.DESCRIPTOR.services_by_name["DecodeService"]: register}
    finally:
        watch.cancel()
