"""The prefill phase of a request: credit → lease → prompt computed → lease moved to the decode worker."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from kvstore.client.worker import Services, WorkerParts
from muxmesh.engine.api import EngineJob, Failed, Finished, PrefillDone, PromptScored, Tokens, Until
from muxmesh.errors import EngineFailed, InternalError
from muxmesh.internal.v1 import prefill_pb2, prefill_pb2_grpc
from muxmesh.prefix import chain_of
from muxmesh.rpc import convert


class PrefillService(prefill_pb2_grpc.PrefillServiceServicer):
    """Serves one model's prompts."""

    def __init__(self, parts: WorkerParts) -> None:
        self._engine = parts.engine
        self._leases = parts.leases
        self._block_size = parts.block_size

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> prefill_pb2.PrefillResponse:
        """See the proto. Whatever ends this call, the lease is moved or released."""
        lease = await self._leases.acquire(convert.ref_from_wire(request.lease))
        job_id = lease.ref.lease_id
        done = False
        try:
            asked = convert.request_from_wire(request.request)
            job = EngineJob(job_id, asked, Until.FIRST_TOKEN, lease.block_ids, lease.num_computed_tokens)
            response = prefill_pb2.PrefillResponse(num_cached_tokens=lease.num_computed_tokens)
            async for event in self._engine.submit(job):
                if isinstance(event, Tokens):
                    (response.token_id,) = event.token_ids
                    if event.logprobs:
                        response.logprobs.CopyFrom(convert.logprobs_to_wire(event.logprobs))
                elif isinstance(event, PromptScored):
                    response.prompt_logprobs.MergeFrom(convert.logprobs_to_wire(event.logprobs))
                elif isinstance(event, Finished):
                    response.finish.CopyFrom(convert.finish_to_wire(event.finish))
                    # Before the answer: the router may send others with the same prompt at once.
                    await self._leases.release(lease.ref, chain_of(asked, self._block_size).hashes)
                    done = True
                    return response
                elif isinstance(event, PrefillDone):
                    sampled = (response.token_id,)
                    await self._leases.move(
                        lease.ref, request.decode_worker, event.num_computed_tokens, sampled, event.handoff
                    )
                    done = True
                    return response
                elif isinstance(event, Failed):
                    raise EngineFailed(event.reason)
            raise InternalError("the engine's events ended without a last one")
        finally:
            if not done:
                self._leases.release_after(functools.partial(self._engine.cancel, job_id), lease.ref)


@asynccontextmanager
async def open_services(parts: WorkerParts) -> AsyncIterator[Services]:
    """The services of a prefill worker."""
    register = functools.partial(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, PrefillService(parts))
    yield {prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"]: register}
