"""The prefill phase of a request: its credit becomes a lease, its prompt is computed, its lease is handed off."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from muxmesh.background_task import background
from muxmesh.engine.api import EngineJob, Failed, Finished, JobDone, PromptLogprobs, Tokens
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.errors import InternalError, MeshError
from muxmesh.internal.v1 import prefill_pb2, prefill_pb2_grpc
from muxmesh.rpc import convert
from muxmesh.sequence_states import SequenceState
from muxmesh.types import LeaseRef
from worker.lease_client import LeaseStandings
from worker.tenant_standings import TenantStandings
from worker.worker_process import Services, WorkerContext

TOKENS_BEFORE_HAND_OFF = 1
"""Output tokens of each request that prefill samples. More of them would take device time from other prompts."""


class PrefillService(prefill_pb2_grpc.PrefillServiceServicer):
    """Serves PrefillService for one model."""

    def __init__(self, context: WorkerContext, num_tokens: int = TOKENS_BEFORE_HAND_OFF) -> None:
        """``num_tokens``: output tokens of each request that are sampled before the hand-off."""
        self._context = context
        self._engine = context.engine
        self._leases = context.leases
        self._clock = context.clock
        self._num_tokens = num_tokens
        self._standings = TenantStandings()

    async def watch_standings(self) -> None:
        """Receives the standings of tenants for as long as the unit serves; then gives up, as no credit is valid."""
        reason = "the stream ended"
        try:
            async for event in self._leases.watch():
                if isinstance(event, LeaseStandings):
                    self._standings.change(event)
        except MeshError as error:
            reason = str(error)
        self._context.give_up(f"no more leases from the unit: {reason}")

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> prefill_pb2.PrefillResponse:
        """Computes one prompt. However the call ends, the lease is handed off or released.

        The prompt's blocks are shared only after a token was sampled behind them: attention over KV that is not finite
        gives logits that are not finite, and these fail the job.
        """
        engine_request = convert.request_from_wire(request.request)
        lease = await self._leases.acquire(convert.ref_from_wire(request.lease))
        job_id, is_done = lease.ref.lease_id, False
        states = self._context.counters.states
        states.begin(job_id, SequenceState.PREFILL, self._clock.monotonic_s())
        try:
            sequence = self._context.sequence(engine_request, lease)
            self._standings.begin(job_id, sequence)
            response = prefill_pb2.PrefillResponse(num_cached_tokens=lease.num_computed_tokens)
            submitted_at_s = self._clock.monotonic_s()
            async for event in self._engine.submit(EngineJob(job_id, sequence, self._num_tokens)):
                if isinstance(event, Tokens):
                    if not response.token_ids:
                        elapsed_s = self._clock.monotonic_s() - submitted_at_s
                        response.device_wait_s = max(0.0, elapsed_s - sequence.computing_s)
                    response.token_ids.extend(event.token_ids)
                    if event.logprobs:
                        response.logprobs.MergeFrom(convert.logprobs_to_wire(event.logprobs))
                elif isinstance(event, PromptLogprobs):
                    response.prompt_logprobs.MergeFrom(convert.logprobs_to_wire(event.logprobs))
                elif isinstance(event, Finished):
                    response.finish.CopyFrom(convert.finish_to_wire(event.finish))
                    # Before the response: the router's next request may have the same prompt, and finds it cached.
                    await self._release(lease.ref, sequence)
                    is_done = True
                    return response
                elif isinstance(event, JobDone):
                    moved_at_s = self._clock.monotonic_s()
                    await self._leases.move(
                        lease.ref, request.decode_worker, sequence.num_computed_tokens, tuple(response.token_ids)
                    )
                    self._context.counters.handoff_s.observe(self._clock.monotonic_s() - moved_at_s)
                    is_done = True
                    return response
                elif isinstance(event, Failed):
                    raise event.error
            raise InternalError(f"job {job_id}: the engine sent no final event")
        finally:
            self._standings.end(job_id)
            states.end(job_id, self._clock.monotonic_s())
            if not is_done:
                self._leases.release_after(functools.partial(self._engine.cancel, job_id), lease.ref)

    async def _release(self, ref: LeaseRef, sequence: SequenceRecord) -> None:
        await self._leases.release(ref, sequence.block_hashes(0, sequence.num_shareable_blocks))


@asynccontextmanager
async def open_services(context: WorkerContext) -> AsyncIterator[Services]:
    """Opens the services of a prefill worker, and watches the standings of its leases until the context ends."""
    service = PrefillService(context)
    register = functools.partial(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, service)
    async with background(service.watch_standings(), "lease watch", context.give_up):
        yield {prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"]: register}
