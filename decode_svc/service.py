"""The decode phase of a request: lease arrives → tokens to its watcher → lease released."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from decode_svc.arrivals import Arrivals
from decode_svc.leased_kv import LeasedKv
from decode_svc.watchers import Watchers
from kvstore.client.worker import Services, WorkerParts
from muxmesh.engine.api import EngineJob, Failed, Finished, Preempted, Tokens, Until
from muxmesh.errors import EngineFailed, InternalError, MeshError
from muxmesh.internal.v1 import decode_pb2, decode_pb2_grpc
from muxmesh.rpc import convert
from muxmesh.types import Lease

Context = grpc.aio.ServicerContext[Any, Any]


class DecodeService(decode_pb2_grpc.DecodeServiceServicer):
    """Serves one model's answers after the first token."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._engine = parts.engine
        self._leases = parts.leases
        self._give_up = parts.give_up
        self._arrivals = Arrivals(self._release_unused)
        self._watchers = Watchers()

    async def watch(self) -> None:
        """Takes in leases for as long as the unit lives. Without them this worker is of no use, so it ends too."""
        reason = "the stream ended"
        try:
            async for news in self._leases.watch():
                if isinstance(news, Lease):
                    self._arrivals.lease_arrived(news)
                else:
                    self._engine.preempt(news)
        except MeshError as error:
            reason = str(error)
        self._give_up(f"no more leases from the unit: {reason}")

    async def WatchTokens(
        self, request: decode_pb2.WatchTokensRequest, context: Context
    ) -> AsyncIterator[decode_pb2.WatchTokensResponse]:
        """See the proto."""
        with self._watchers.watching(request.watcher) as outbox:
            await context.send_initial_metadata(())  # tells the router that Decode may be called
            while True:
                yield decode_pb2.WatchTokensResponse(answers=await outbox.take())

    async def Decode(self, request: decode_pb2.DecodeRequest, context: Context) -> decode_pb2.DecodeResponse:
        """See the proto. Whatever ends this call, the lease is released."""
        asked = convert.request_from_wire(request.request)
        outbox = self._watchers.outbox(request.watcher)
        lease = await self._arrivals.wait_for(request.lease_id)
        kv = LeasedKv(self._parts, lease, asked)
        num_output_tokens = 0
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
                    kv.take(event)
                    outbox.put(
                        decode_pb2.NewTokens(
                            lease_id=request.lease_id,
                            start_index=event.start_index,
                            token_ids=event.token_ids,
                            logprobs=convert.logprobs_to_wire(event.logprobs) if event.logprobs else None,
                        )
                    )
                    num_output_tokens = event.start_index + len(event.token_ids)
                elif isinstance(event, Finished):
                    finish = convert.finish_to_wire(event.finish)
                    return decode_pb2.DecodeResponse(finish=finish, num_output_tokens=num_output_tokens)
                elif isinstance(event, Preempted):
                    await kv.give_way()
                elif isinstance(event, Failed):
                    raise kv.failure or EngineFailed(event.reason)
            raise InternalError("the engine's events ended without a last one")
        finally:
            kv.end()

    def _release_unused(self, lease: Lease) -> None:
        self._leases.release_after(functools.partial(self._engine.cancel, lease.ref.lease_id), lease.ref)


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
