"""The decode phase of a request: its lease arrives, its tokens go to the router's watcher, its lease is released."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from decode_svc.lease_arrivals import LeaseArrivals
from decode_svc.sequence_execution import SequenceExecution
from decode_svc.token_outbox import TokenOutboxes
from muxmesh.background_task import background
from muxmesh.engine.api import Batched, Displaced, EngineJob, Failed, Finished, Preempted, Tokens
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.errors import InternalError, MeshError, RequestPreempted
from muxmesh.execution import Execution
from muxmesh.internal.v1 import decode_pb2, decode_pb2_grpc, request_pb2
from muxmesh.rpc import convert
from muxmesh.types import Lease
from worker.lease_client import LeaseStandings
from worker.sequence_kv import SequenceKv
from worker.tenant_standings import TenantStandings
from worker.worker_process import Services, WorkerContext

Context = grpc.aio.ServicerContext[Any, Any]


class DecodeService(decode_pb2_grpc.DecodeServiceServicer):
    """Serves DecodeService for one model: everything after the tokens that prefill samples."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._engine = context.engine
        self._leases = context.leases
        self._arrivals = LeaseArrivals(self._release_unused)
        self._outboxes = TokenOutboxes()
        self._standings = TenantStandings()
        self._executions: dict[int, SequenceExecution] = {}
        """By lease id, of the sequences that the engine has."""

    async def watch_leases(self) -> None:
        """Receives leases, pre-emptions and standings of tenants for as long as the unit serves; then gives up, as no
        lease can arrive.
        """
        reason = "the stream ended"
        try:
            async for event in self._leases.watch():
                if isinstance(event, Lease):
                    self._arrivals.lease_arrived(event)
                elif isinstance(event, LeaseStandings):
                    self._standings.change(event)
                else:
                    if event.lease_id in self._executions:
                        self._executions[event.lease_id].kv_claimed(event.reason)
                    self._engine.preempt(event.lease_id)
        except MeshError as error:
            reason = str(error)
        self._context.give_up(f"no more leases from the unit: {reason}")

    async def WatchTokens(
        self, request: decode_pb2.WatchTokensRequest, context: Context
    ) -> AsyncIterator[decode_pb2.WatchTokensResponse]:
        with self._outboxes.watching(request.watcher) as outbox:
            await context.send_initial_metadata(())  # from now on the router may call Decode
            while True:
                yield decode_pb2.WatchTokensResponse(sequences=await outbox.take())

    async def Decode(self, request: decode_pb2.DecodeRequest, context: Context) -> decode_pb2.DecodeResponse:
        """Decodes one sequence. However the call ends, the lease is released.

        A sequence whose KV is freed before its end is no error: the response has all of its tokens, so that none that
        is on its way is lost.
        """
        engine_request = convert.request_from_wire(request.request)
        outbox = self._outboxes.outbox(request.watcher)
        called_at_s = self._context.clock.monotonic_s()
        lease = await self._arrivals.wait_for(request.lease_id)
        engine_request = engine_request.after_wait(self._context.clock.monotonic_s() - called_at_s)
        try:
            kv = self._sequence_kv(lease, self._context.sequence(engine_request, lease))
        except ValueError:
            self._release_unused(lease)
            raise
        is_sound, sequence = False, kv.sequence
        self._standings.begin(request.lease_id, sequence)
        execution = self._executions[request.lease_id] = self._execution(request.lease_id, sequence)
        try:
            events = self._engine.submit(EngineJob(request.lease_id, kv.sequence))
            is_sound = True
            async for event in events:
                if isinstance(event, Tokens):
                    kv.on_tokens()
                    outbox.put(_new_tokens(request.lease_id, event, execution.news()))
                elif isinstance(event, Finished):
                    finish = convert.finish_to_wire(event.finish)
                    return _ended(sequence, execution, finish=finish)
                elif isinstance(event, Displaced):
                    execution.displaced(event.reason)
                    kv.on_batch_changed(is_batched=False)
                elif isinstance(event, Batched):
                    execution.batched()
                    kv.on_batch_changed(is_batched=True)
                elif isinstance(event, Preempted):
                    execution.kv_preempted()
                    await kv.on_preempted()
                    execution.kv_restored()
                elif isinstance(event, Failed):
                    is_sound = False
                    raise event.error
            raise InternalError(f"job {request.lease_id}: the engine sent no final event")
        except RequestPreempted as error:
            execution.recomputed()
            return _ended(sequence, execution, preempted=str(error))
        finally:
            del self._executions[request.lease_id]
            self._standings.end(request.lease_id)
            execution.end()
            kv.end(publishes=is_sound)

    def _execution(self, lease_id: int, sequence: SequenceRecord) -> SequenceExecution:
        context = self._context
        return SequenceExecution(
            lease_id, sequence, context.counters, context.clock, context.policy, context.traces_decisions
        )

    def _sequence_kv(self, lease: Lease, sequence: SequenceRecord) -> SequenceKv:
        context = self._context
        kv_format = sequence.request.kv_swap_format or context.config.kv_swap_format
        return SequenceKv(
            lease.ref, sequence, context.engine, context.leases, context.progress, context.swapper, kv_format
        )

    def _release_unused(self, lease: Lease) -> None:
        self._leases.release_after(functools.partial(self._engine.cancel, lease.ref.lease_id), lease.ref)


def _ended(
    sequence: SequenceRecord,
    execution: SequenceExecution,
    finish: request_pb2.Finish | None = None,
    preempted: str = "",
) -> decode_pb2.DecodeResponse:
    return decode_pb2.DecodeResponse(
        finish=finish,
        num_output_tokens=sequence.num_output_tokens,
        execution=convert.execution_to_wire(execution.report()),
        preempted=preempted,
    )


def _new_tokens(lease_id: int, event: Tokens, execution: Execution | None) -> decode_pb2.NewTokens:
    return decode_pb2.NewTokens(
        lease_id=lease_id,
        start_index=event.start_index,
        token_ids=event.token_ids,
        logprobs=convert.logprobs_to_wire(event.logprobs) if event.logprobs else None,
        execution=None if execution is None else convert.execution_to_wire(execution),
    )


@asynccontextmanager
async def open_services(context: WorkerContext) -> AsyncIterator[Services]:
    """Opens the services of a decode worker, and watches its leases until the context ends."""
    service = DecodeService(context)
    register = functools.partial(decode_pb2_grpc.add_DecodeServiceServicer_to_server, service)
    async with background(service.watch_leases(), "lease watch", context.give_up):
        yield {decode_pb2.DESCRIPTOR.services_by_name["DecodeService"]: register}
