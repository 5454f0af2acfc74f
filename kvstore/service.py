"""The gRPC edge of a unit: translates calls, applies them to the `Unit`, and sends its decisions.

It decides nothing: every change of state is a method of `Unit` or of one of its parts. After a change it calls
`KvStoreService.changed`, which schedules and puts the decisions into the queues of the routers' and workers' streams.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import grpc

from kvstore.attach_server import AttachServer
from kvstore.grant_table import GrantTable
from kvstore.leases import StandingChange
from kvstore.memory_reclaim import PreemptionRequest
from kvstore.preemption_costs import CALLS_S, KvCosts
from kvstore.router_clock import RouterClock
from kvstore.router_loads import Load, incarnation, load_of_others, router_loads
from kvstore.unit import IssuedCredit, IssuedSwapIn, Unit
from kvstore.unit_status import unit_status
from kvstore.worker_slots import WorkerRecord
from muxmesh.block_hashes import split_hashes
from muxmesh.clock import Clock
from muxmesh.config.schema import UnitConfig
from muxmesh.errors import InvalidRequest, LeaseLost, Overloaded, WorkerLost
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.kv_cost import CopyRates
from muxmesh.quoting import named, quoted
from muxmesh.rpc import convert
from muxmesh.types import Lease, QueuedRequest, Role

_log = logging.getLogger(__name__)

LOADS_EVERY_S = 0.25
"""Shortest interval between two reports of the loads of other routers."""
Context = grpc.aio.ServicerContext[Any, Any]
_Responses = asyncio.Queue[kvstore_pb2.AdmitResponse | None]


class KvStoreService(kvstore_pb2_grpc.KvStoreServiceServicer):
    """Serves the routers (admission) and the workers (leases) of one unit.

    Invariant: each router in ``_routers`` has an open Admit stream, each worker in ``_watchers`` an open WatchLeases
    stream, and each future in ``_swap_ins`` belongs to an open SwapIn call of the lease.
    """

    def __init__(
        self,
        config: UnitConfig,
        unit: Unit,
        grants: GrantTable,
        clock: Clock,
        fingerprints: Mapping[str, str],
        trace_decisions: bool = False,
    ) -> None:
        """``fingerprints``: of the weights, by model; see `model_added`. ``trace_decisions``: logs each credit with the
        reason for its position in the order.
        """
        self._config = config
        self._unit = unit
        self._grants = grants
        self._clock = clock
        self._fingerprints = fingerprints
        self._trace_decisions = trace_decisions
        self.num_overtaken: Counter[str] = Counter()
        """Model → requests that were overtaken, once for each credit that overtook them."""
        self.attach: AttachServer | None = None
        self._routers: dict[str, _Responses] = {}
        self._watchers: dict[str, asyncio.Queue[Lease | PreemptionRequest | StandingChange]] = {}
        self._swap_ins: dict[int, asyncio.Future[IssuedSwapIn]] = {}
        self.on_changed: list[Callable[[], None]] = []
        """Called after each change, when its decisions are sent."""
        self._num_streams = 0
        self._timer: asyncio.TimerHandle | None = None
        self._loads_timer: asyncio.TimerHandle | None = None
        self._sent_loads: dict[str, kvstore_pb2.UnitLoads] = {}
        """Router → what was last sent to it."""
        unit.reclaim.costs_of = self._kv_costs

    def changed(self) -> None:
        """Schedules, sends the decisions, and sets the timer for the next change. Called after each change."""
        now_s = self._clock.monotonic_s()
        if self._unit.admission.waiting or self._unit.reclaim.has_growth_lacks:
            self._report()
        decisions = self._unit.schedule(now_s, self._clock.unix_s())
        for credit in decisions.credits:
            self._routers[credit.router].put_nowait(_credit_to_wire(credit))
            self.num_overtaken[credit.lease.model] += credit.num_overtaken
            if self._trace_decisions:
                self._log_decision(credit)
        for swap_in in decisions.swap_ins:
            if not (waiting := self._swap_ins[swap_in.lease_id]).done():  # its call may be cancelled
                waiting.set_result(swap_in)
        for preemption in decisions.preemptions:
            if preemption.worker in self._watchers:
                self._watchers[preemption.worker].put_nowait(preemption)
            if self._trace_decisions:
                _log.info(
                    "lease %d of %s has to free its memory: %s",
                    preemption.lease_id,
                    preemption.worker,
                    preemption.reason,
                )
        self._tell_standings(decisions.standings)
        for command in decisions.commands:
            if self.attach is not None:
                self.attach.tell(command)
        for call in self.on_changed:
            call()
        self._set_timer()
        self._send_loads_soon()
        if self._unit.costs_are_due(now_s):
            for queue in self._routers.values():
                queue.put_nowait(kvstore_pb2.AdmitResponse(costs=self._costs()))

    def _tell_standings(self, changes: Iterable[StandingChange]) -> None:
        for change in changes:
            if change.worker in self._watchers:
                self._watchers[change.worker].put_nowait(change)

    def _send_loads_soon(self) -> None:
        """Sends the loads at the end of the interval, unless they are about to be sent."""
        if self._loads_timer is None and self._routers:
            self._loads_timer = asyncio.get_running_loop().call_later(LOADS_EVERY_S, self._send_loads)

    def _send_loads(self) -> None:
        """Sends each router the loads of the others, if they are not those that it knows.

        They change without a call of `changed` too, by hand-offs: while there are any, the next report follows.
        """
        self._loads_timer = None
        has_others = len(set(map(incarnation, self._routers))) > 1
        loads = router_loads(self._unit) if has_others else dict[str, dict[str, Load]].fromkeys(self._unit.models, {})
        states = self._unit.states
        for router, queue in self._routers.items():
            message = kvstore_pb2.UnitLoads()
            for model, by_router in loads.items():
                others = load_of_others(by_router, router)
                message.models.add(
                    model=model,
                    is_asleep=not states.admits(model),
                    num_sequences=others.num_sequences,
                    prefill_tokens=others.prefill_tokens,
                    prefill_context=others.prefill_context,
                )
            if message != self._sent_loads.get(router):
                self._sent_loads[router] = message
                queue.put_nowait(kvstore_pb2.AdmitResponse(loads=message))
        if has_others and any(loads.values()):
            self._send_loads_soon()

    def _report(self) -> None:
        """Tells the unit what decode workers report of their sequences."""
        if self.attach is not None:
            self._unit.report(self.attach.progress())

    def remove_model(self, model: str) -> None:
        """Stops admitting requests of a model: refuses its queued requests, and lets its leases continue."""
        for entry in self._unit.remove_model(model):
            self._refuse(
                self._routers[entry.source], entry.request.entry_id, "model", f"{quoted(model)} is no longer served"
            )
        self.changed()

    def model_added(self) -> None:
        """To be called when ``fingerprints`` has one more model: tells all routers."""
        for queue in self._routers.values():
            queue.put_nowait(self._hello())
        self.changed()

    def _hello(self) -> kvstore_pb2.AdmitResponse:
        weights = (kvstore_pb2.ModelWeights(model=name, fingerprint=one) for name, one in self._fingerprints.items())
        return kvstore_pb2.AdmitResponse(hello=kvstore_pb2.UnitHello(models=weights))

    def _log_decision(self, credit: IssuedCredit) -> None:
        _log.info(
            "decision %d: request %d of %s for %s overtakes %d: %s",
            credit.decision, credit.entry_id, credit.router, credit.lease.model, credit.num_overtaken,
            self._unit.policy.reason(credit.scheduling, self._clock.unix_s()),
        )  # fmt: skip

    async def Admit(
        self, request_iterator: AsyncIterator[kvstore_pb2.AdmitRequest], context: Context
    ) -> AsyncIterator[kvstore_pb2.AdmitResponse]:
        """See the proto. Raises InvalidRequest if the first message is not a hello.

        Each stream is a router of its own to the unit, so a router that reconnects starts without entries.
        """
        self._num_streams += 1
        number = self._num_streams
        await context.send_initial_metadata(())  # tells the router that the unit serves
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("message") != "hello":
            raise InvalidRequest("hello", "has to be the first message of the stream")
        router = f"{named(first.hello.router)}#{number}"
        queue: _Responses = asyncio.Queue()
        self._routers[router] = queue
        queue.put_nowait(self._hello())
        queue.put_nowait(kvstore_pb2.AdmitResponse(costs=self._costs()))
        reader = asyncio.create_task(self._read_router(router, queue, request_iterator))
        reader.add_done_callback(lambda _: queue.put_nowait(None))
        self._send_loads_soon()
        try:
            while (response := await queue.get()) is not None:
                yield response
            if not reader.cancelled():
                reader.result()  # raises what made it end, such as a message that cannot be parsed
        finally:
            reader.cancel()
            del self._routers[router]
            self._sent_loads.pop(router, None)
            self._unit.router_gone(router)
            self.changed()

    async def _read_router(
        self, router: str, queue: _Responses, requests: AsyncIterator[kvstore_pb2.AdmitRequest]
    ) -> None:
        clock = RouterClock()
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind == "offer":
                if request.sent_at_unix_s:
                    clock.received(request.sent_at_unix_s, self._clock.unix_s())
                try:
                    self._unit.offer(router, _on_own_clock(convert.queued_from_wire(request.offer), clock))
                except InvalidRequest as error:
                    self._refuse(queue, request.offer.entry_id, error.field, error.problem)
            elif kind == "withdraw":
                self._unit.admission.withdraw(router, request.withdraw)
            elif kind == "return_credit":
                self._return_credit(router, request.return_credit)
            self.changed()

    @staticmethod
    def _refuse(queue: _Responses, entry_id: int, field: str, problem: str) -> None:
        refused = kvstore_pb2.RequestRefused(entry_id=entry_id, field=field, problem=problem)
        queue.put_nowait(kvstore_pb2.AdmitResponse(refused=refused))

    def _costs(self) -> kvstore_pb2.UnitCosts:
        """Step costs of the models whose prefill and decode workers have measured theirs."""
        costs = kvstore_pb2.UnitCosts()
        for model in self._unit.models:
            workers = [self._unit.ready_workers(role, model) for role in (Role.PREFILL, Role.DECODE)]
            read = [self.attach.cost_of(ready[0].name) for ready in workers if ready and self.attach]
            measured = [convert.cost_to_wire(cost) for cost in read if cost is not None]
            if len(measured) == len(Role):
                costs.models.append(kvstore_pb2.ModelCost(model=model, prefill=measured[0], decode=measured[1]))
        return costs

    def _kv_costs(self, model: str) -> KvCosts:
        """What moving and computing the KV of a model costs, as its workers have measured."""
        assert self.attach is not None
        costs = KvCosts(prefill_chunk=self._unit.models[model].prefill_token_budget)
        prefills, decodes = (self._unit.ready_workers(role, model) for role in (Role.PREFILL, Role.DECODE))
        if prefills and (prefill := self.attach.cost_of(prefills[0].name)) is not None:
            costs = replace(costs, prefill=prefill)
        if decodes and (rate := self.attach.copy_rate_of(decodes[0].name)) is not None:
            costs = replace(costs, rates=CopyRates(rate, rate, CALLS_S))
        return costs

    def _return_credit(self, router: str, wire: Any) -> None:
        """Releases a credit that the router still owns; a worker may have acquired it, or it may have expired."""
        ref = convert.ref_from_wire(wire)
        if any(lease.ref == ref for lease in self._unit.leases.of_owner(router)):
            self._unit.release(ref, router)

    async def AcquireLease(
        self, request: kvstore_pb2.AcquireLeaseRequest, context: Context
    ) -> kvstore_pb2.AcquireLeaseResponse:
        lease = self._unit.acquire(convert.ref_from_wire(request.lease), request.owner)
        self._tell_standings(self._unit.leases.take_standing_changes())
        return kvstore_pb2.AcquireLeaseResponse(lease=convert.lease_to_wire(lease))

    async def MoveLease(self, request: kvstore_pb2.MoveLeaseRequest, context: Context) -> kvstore_pb2.MoveLeaseResponse:
        lease = self._unit.move(
            convert.ref_from_wire(request.lease),
            request.owner,
            request.to_worker,
            request.num_computed_tokens,
            tuple(request.sampled_token_ids),
        )
        if request.to_worker in self._watchers:
            self._watchers[request.to_worker].put_nowait(lease)
        self._tell_standings(self._unit.leases.take_standing_changes())
        if self._unit.admission.waiting:  # one of them may displace the sequence from the batch
            self.changed()
        return kvstore_pb2.MoveLeaseResponse(lease=convert.ref_to_wire(lease.ref))

    async def ReleaseLease(
        self, request: kvstore_pb2.ReleaseLeaseRequest, context: Context
    ) -> kvstore_pb2.ReleaseLeaseResponse:
        ref, computed = convert.ref_from_wire(request.lease), split_hashes(request.block_hashes)
        self._unit.release(ref, request.owner, computed, request.served_s)
        waiting = self._swap_ins.get(ref.lease_id)
        if waiting is not None and not waiting.done():
            waiting.set_exception(LeaseLost(f"lease {ref.lease_id} was released while it waited for memory"))
        self.changed()
        return kvstore_pb2.ReleaseLeaseResponse()

    async def GrowLease(self, request: kvstore_pb2.GrowLeaseRequest, context: Context) -> kvstore_pb2.GrowLeaseResponse:
        ref, unix_s = convert.ref_from_wire(request.lease), self._clock.unix_s()
        block_ids = self._unit.grow(ref, request.owner, request.num_blocks, request.claims, unix_s)
        if block_ids is None:
            self.changed()
            if request.claims and self._unit.reclaim.serves(ref):
                return kvstore_pb2.GrowLeaseResponse(is_pending=True)
            raise Overloaded(
                f"{request.num_blocks} token blocks are not available to this lease: the KV pool is full, or its model "
                "is past its quota while another one waits"
            )
        return kvstore_pb2.GrowLeaseResponse(block_ids=block_ids)

    async def SwapOut(self, request: kvstore_pb2.SwapOutRequest, context: Context) -> kvstore_pb2.SwapOutResponse:
        ref, unix_s = convert.ref_from_wire(request.lease), self._clock.unix_s()
        self._report()
        pages = self._unit.reclaim.begin_swap_out(ref, request.owner, request.num_bytes, unix_s)
        return kvstore_pb2.SwapOutResponse(pages=pages)

    async def FinishSwapOut(
        self, request: kvstore_pb2.FinishSwapOutRequest, context: Context
    ) -> kvstore_pb2.FinishSwapOutResponse:
        computed = split_hashes(request.block_hashes)
        self._unit.leases.finish_swap_out(convert.ref_from_wire(request.lease), request.owner, computed)
        # No call of `changed`: SwapIn follows, and the freed memory is allocated when this lease waits for it too.
        return kvstore_pb2.FinishSwapOutResponse()

    async def SwapIn(self, request: kvstore_pb2.SwapInRequest, context: Context) -> kvstore_pb2.SwapInResponse:
        """See the proto. A cancelled call leaves the order; blocks issued meanwhile stay with the lease.

        A later call for the same lease replaces an earlier one, which then waits until it is cancelled.
        """
        ref = convert.ref_from_wire(request.lease)
        scheduling, demand = convert.scheduling_from_wire(request.scheduling), convert.demand_from_wire(request.demand)
        self._unit.request_swap_in(ref, request.owner, demand, scheduling)
        waiting = self._swap_ins[ref.lease_id] = asyncio.get_running_loop().create_future()
        try:
            self.changed()
            issued = await waiting
        finally:
            if self._swap_ins.get(ref.lease_id) is waiting:
                del self._swap_ins[ref.lease_id]
                self._unit.admission.withdraw(request.owner, ref.lease_id)
        return kvstore_pb2.SwapInResponse(block_ids=issued.block_ids, num_cached_blocks=issued.num_cached)

    async def FinishSwapIn(
        self, request: kvstore_pb2.FinishSwapInRequest, context: Context
    ) -> kvstore_pb2.FinishSwapInResponse:
        self._unit.leases.finish_swap_in(convert.ref_from_wire(request.lease), request.owner)
        return kvstore_pb2.FinishSwapInResponse()

    async def WatchLeases(
        self, request: kvstore_pb2.WatchLeasesRequest, context: Context
    ) -> AsyncIterator[kvstore_pb2.WatchLeasesResponse]:
        """See the proto. Begins with the leases that the worker has. Raises WorkerLost if it is not attached.

        A later stream of the same worker replaces an earlier one.
        """
        if request.owner not in self._unit.workers:
            raise WorkerLost(f"worker {named(request.owner)} is not attached")
        queue = self._watchers[request.owner] = asyncio.Queue()
        for lease in self._unit.leases.of_owner(request.owner):
            queue.put_nowait(lease)
        try:
            await context.send_initial_metadata(())
            while True:
                event = await queue.get()
                if isinstance(event, Lease):
                    yield kvstore_pb2.WatchLeasesResponse(arrived=convert.lease_to_wire(event))
                elif isinstance(event, StandingChange):
                    standing = convert.standing_to_wire(event.standing)
                    standings = kvstore_pb2.LeaseStandings(lease_ids=event.lease_ids, standing=standing)
                    yield kvstore_pb2.WatchLeasesResponse(standings=standings)
                else:
                    preempt = kvstore_pb2.LeasePreemption(lease_id=event.lease_id, reason=event.reason)
                    yield kvstore_pb2.WatchLeasesResponse(preempt=preempt)
        finally:
            if self._watchers.get(request.owner) is queue:
                del self._watchers[request.owner]

    async def GetUnitStatus(
        self, request: kvstore_pb2.GetUnitStatusRequest, context: Context
    ) -> kvstore_pb2.GetUnitStatusResponse:
        """See the proto. First checks the integrity of the unit's state."""
        assert self.attach is not None
        self._report()
        self._unit.check_integrity()
        status = unit_status(
            self._config,
            self._unit,
            self.attach.transport,
            self._grants.page,
            self.attach.slot_of,
            self._clock.monotonic_s(),
            self._clock.unix_s(),
        )
        return kvstore_pb2.GetUnitStatusResponse(unit=status)

    def _set_timer(self) -> None:
        """Sets the one timer to the unit's next change. An idle unit has none, so it never wakes up."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        change_at_s = self._unit.next_change_s()
        if change_at_s is not None:
            wait_s = max(0.0, change_at_s - self._clock.monotonic_s())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self.changed)


def _on_own_clock(request: QueuedRequest, clock: RouterClock) -> QueuedRequest:
    """The request with its arrival on the unit's clock, by which it is ordered beside those of other routers."""
    arrived_at_s = clock.here(request.scheduling.arrived_at_s)
    return replace(request, scheduling=replace(request.scheduling, arrived_at_s=arrived_at_s))


def _credit_to_wire(issued: IssuedCredit) -> kvstore_pb2.AdmitResponse:
    def worker_ref(worker: WorkerRecord) -> kvstore_pb2.WorkerRef:
        return kvstore_pb2.WorkerRef(name=worker.name, address=worker.address)

    credit = kvstore_pb2.Credit(
        entry_id=issued.entry_id,
        lease=convert.ref_to_wire(issued.lease.ref),
        prefill=worker_ref(issued.prefill),
        decode=worker_ref(issued.decode),
        decision=issued.decision,
        num_overtaken=issued.num_overtaken,
        scheduling=convert.scheduling_to_wire(issued.scheduling),
        waits=convert.waits_to_wire(issued.waits),
    )
    return kvstore_pb2.AdmitResponse(credit=credit)
